"""Group norms with an activation, off the NPU: what is taken anyway, and that nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mindiesd
from mindiesd.ops import norm as norms
from mindiesd.patches import group_norm
from tests.emulator.tiny_models import MODELS, first_tensor


class Recorder:
    """A site that keeps the reasons."""

    everywhere = True

    def __init__(self) -> None:
        self.reasons: list = []

    def takes(self, reason) -> bool:
        self.reasons.append(reason)
        return reason is None


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    yield
    mindiesd.unpatch_all()


def norm_act(act, norm, x):
    return act(norm(x))


def parts(dtype=torch.float32):
    torch.manual_seed(2)
    norm = nn.GroupNorm(2, 8).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return nn.SiLU(), norm, torch.randn(2, 8, 5, 3).to(dtype)


@torch.no_grad()
def test_off_the_device_the_original_is_called() -> None:
    act, norm, x = parts()
    site = Recorder()
    got = group_norm.build_norm_act(norm_act, site)(act, norm, x)
    assert site.reasons == [norms.NO_GROUP_NORM_SILU]
    assert torch.equal(got, act(norm(x)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda act, norm: norm.register_forward_hook(lambda *_: None), group_norm.OTHER_NORM),
        (lambda act, norm: act.register_forward_hook(lambda *_: None), group_norm.OTHER_ACTIVATION),
        (
            lambda act, norm: norm.__setattr__("__class__", type("Own", (nn.GroupNorm,), {})),
            group_norm.OTHER_NORM,
        ),
    ],
)
@torch.no_grad()
def test_what_is_more_than_a_group_norm_and_a_silu_is_called(change, reason) -> None:
    act, norm, x = parts()
    expected = act(norm(x))
    change(act, norm)
    site = Recorder()
    got = group_norm.build_norm_act(norm_act, site)(act, norm, x)
    assert site.reasons == [reason]
    assert torch.equal(got, expected)


def test_gradients_are_told() -> None:
    act, norm, x = parts()
    site = Recorder()
    got = group_norm.build_norm_act(norm_act, site)(act, norm, x)
    assert got.requires_grad and site.reasons == ["needs gradients"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1, 2.0, True, torch.tensor(1.0)])
def test_dividing_by_one(dtype, factor) -> None:
    a, b = torch.randn(2, 3, 4).to(dtype).unbind()
    a[0, 0], a[0, 1], b[0, 2] = float("inf"), float("nan"), -0.0
    summed, alone = Recorder(), Recorder()
    got = group_norm.build_scaled_sum(lambda a, b, f: (a + b) / f, summed)(a, b, factor)
    quotient = group_norm.build_quotient(lambda x, f: x / f, alone)(a, factor)
    for ours, theirs in ((got, (a + b) / factor), (quotient, a / factor)):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    taken = type(factor) in (int, float) and factor == 1
    assert (summed.reasons == alone.reasons == [None]) is taken


def test_integers_are_divided() -> None:
    site = Recorder()
    got = group_norm.build_scaled_sum(lambda a, b, f: (a + b) / f, site)(
        torch.arange(3), torch.arange(3), 1.0
    )
    assert got.dtype is torch.float32 and site.reasons != [None]


# Models.

NAMES = ("unet2d", "vae", "svd", "vae_cogvideox")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_model_is_the_same_and_undone(name: str) -> None:
    tiny = MODELS[name]
    model, inputs = tiny.build(), tiny.make_inputs()
    plain = first_tensor(model(**copy.deepcopy(inputs)))
    migration = mindiesd.patch_all(only=("group_norm", "sequential", "conditioning", "modulation"))
    got = first_tensor(model(**copy.deepcopy(inputs)))
    report = migration.report()
    assert report.redirected or report.fell_back
    assert not any("rewritten" in reason for p in report.patches for reason in p.fell_back)
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-5)
    mindiesd.unpatch_all()
    assert torch.equal(first_tensor(model(**copy.deepcopy(inputs))), plain)
