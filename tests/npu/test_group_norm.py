"""Group norm and SiLU in one kernel on the emulated device: float64, launches, limits."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mindiesd
from mindiesd.emulator import trace
from mindiesd.ops import norm as norms
from mindiesd.ops.backends.npu import soc
from tests import oracles
from tests.emulator.tiny_models import MODELS, first_tensor, move, without_torch_npu

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    yield
    mindiesd.unpatch_all()


def exact(x, norm) -> torch.Tensor:
    """``silu(group_norm(x))`` in float64, from the formula."""
    x = x.double()
    batch, channels = x.shape[:2]
    grouped = x.reshape(batch, norm.num_groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    shape = (1, channels) + (1,) * (x.dim() - 2)
    y = y.reshape(x.shape) * norm.weight.detach().double().reshape(shape)
    y = y + norm.bias.detach().double().reshape(shape)
    return y / (1 + (-y).exp())


def made(groups: int, channels: int, dtype=torch.float32) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, channels)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm.to(dtype)


@settings(deadline=None, max_examples=25)
@given(
    groups=st.sampled_from([1, 2, 4]),
    per_group=st.integers(1, 3),
    batch=st.integers(1, 3),
    space=st.lists(st.integers(1, 4), min_size=0, max_size=4),
    dtype=st.sampled_from(FLOATS),
    order=st.sampled_from(["dense", "channels last", "slice"]),
)
@torch.no_grad()
def test_a_sequence(groups, per_group, batch, space, dtype, order) -> None:
    channels = groups * per_group
    norm = made(groups, channels, dtype)
    x = torch.randn(batch, channels, *space).to(dtype)
    if order == "slice":
        x = torch.stack([x, x], -1)[..., 0]
    elif order == "channels last":
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    layers = nn.Sequential(norm, nn.SiLU(), nn.Identity())
    reference = exact(x, norm)
    plain_layers = copy.deepcopy(layers).npu()
    device_x = x.npu()
    if x.numel() == groups * batch:
        # One number in a group: the norm is the bias, or torch's error.
        with mindiesd.patch_pipeline(plain_layers) as migration:
            try:
                plain_layers(device_x)
            except ValueError as error:
                assert "more than 1 value" in str(error)  # noqa: PT017
        assert not migration.report().redirected
        return
    plain = plain_layers(device_x)
    migration = mindiesd.patch_all(only="torch_sequential")
    with trace() as counted:
        got = plain_layers(device_x)
    mindiesd.unpatch_all()
    assert migration.report().redirected == 1
    made_dense = {} if device_x.is_contiguous() else {"aten::clone": 1}
    assert counted.launches == {"npu::npu_group_norm_silu": 1, **made_dense}
    assert (got.dtype, got.shape, got.device) == (plain.dtype, plain.shape, plain.device)
    oracles.assert_as_accurate(got.cpu(), plain.cpu(), reference)


@pytest.mark.parametrize(
    ("number", "dtype", "taken"),
    [
        (220, torch.bfloat16, True),
        (250, torch.bfloat16, True),
        (202, torch.float16, True),
        (202, torch.bfloat16, False),
        (260, torch.float16, False),
        (0, torch.float16, False),
    ],
)
def test_each_series(monkeypatch, number, dtype, taken) -> None:
    monkeypatch.setattr(soc, "_found", soc.of_number(number))
    if not number:
        monkeypatch.setattr(soc, "_detected", lambda: soc.UNKNOWN)
    norm, x = made(2, 8, dtype).npu(), torch.randn(1, 8, 4).to(dtype).npu()
    reason = norms.group_norm_silu_refusal(x, norm.weight, norm.bias, 2, norm.eps)
    assert (reason is None) is taken


@pytest.mark.parametrize(
    "change",
    [
        {"weight": None},
        {"bias": None},
        {"weight": torch.ones(4)},
        {"weight": torch.ones(8).double()},
        {"groups": 3},
        {"eps": 0.0},
        {"x": torch.randn(8)},
        {"x": torch.randn(2, 8)[:, :, None].expand(2, 8, 1), "groups": 8},
        {"x": torch.randn(0, 8, 4)},
        {"x": torch.randn(1, 8, 4).double()},
    ],
)
def test_limits(change) -> None:
    given = {"x": torch.randn(1, 8, 4), "weight": torch.ones(8), "bias": torch.zeros(8)}
    given |= {"groups": 2, "eps": 1e-5} | change
    given = {k: v.npu() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    assert norms.group_norm_silu_refusal(**given) is not None


NAMES = ("vae", "svd", "vae_cogvideox")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_models(name: str, dtype) -> None:
    tiny = MODELS[name]
    model = tiny.build().to(dtype)
    inputs = tiny.make_inputs()

    def cast(to, values):
        return move(values, lambda t: t.to(to) if t.is_floating_point() else t)

    low = cast(dtype, inputs)
    with without_torch_npu():
        reference = first_tensor(copy.deepcopy(model).double()(**cast(torch.float64, low)))
    model = model.npu()
    given = move(low, lambda t: t.npu())
    with trace() as before:
        plain = first_tensor(model(**given))
    migration = mindiesd.patch_all(only=("group_norm", "sequential"))
    with trace() as after:
        got = first_tensor(model(**given))
    norms_before = before.launches["aten::native_group_norm"]
    fused = after.launches["npu::npu_group_norm_silu"]
    assert fused > 0 and after.launches["aten::native_group_norm"] == norms_before - fused
    assert after.total < before.total
    assert not any("rewritten" in r for p in migration.report().patches for r in p.fell_back)
    ours, theirs = ((one.cpu().double() - reference).square().mean() for one in (got, plain))
    floor = torch.finfo(torch.float32).eps * max(1.0, reference.abs().max().item())
    assert ours.sqrt() <= 1.1 * theirs.sqrt() + floor


@torch.no_grad()
def test_verified() -> None:
    tiny = MODELS["vae"]
    model = tiny.build().npu()
    given = move(tiny.make_inputs(), lambda t: t.npu())
    migration = mindiesd.patch_all(only=("group_norm", "sequential"), verify=2)
    model(**given)
    report = migration.report()
    assert sum(patch.verified for patch in report.patches) > 0
    assert not any(patch.failed_verification for patch in report.patches)
