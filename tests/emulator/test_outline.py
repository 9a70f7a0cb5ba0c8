"""Runs without values: what is launched is what a run with values launches, launch by launch."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from mindiesd.emulator import EmulatorUnavailable, record, runtime, trace
from mindiesd.emulator.outline import LIMIT, is_unknown, outline, withhold
from tests.emulator.tiny_models import MODELS, move


class Launches:
    """Every launch and copy with the shape, strides and dtype of what it reads and writes."""

    def __init__(self):
        self.seen = []

    def on_launch(self, name, inputs, outputs):
        self.seen.append((name, described(inputs), described(outputs)))

    def on_copy(self, name, source, target):
        self.seen.append((name, described(source), described(target)))


def described(value):
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.device.type, tuple(value.shape), value.stride())
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if isinstance(value, dict):
        return {key: described(item) for key, item in value.items()}
    return value


@contextmanager
def launches():
    seen = Launches()
    record.add(seen)
    try:
        yield seen.seen
    finally:
        record.remove(seen)


def run(model, tiny):
    inputs = move(tiny.make_inputs(), lambda tensor: tensor.to("npu"))
    with torch.no_grad():
        model(**inputs)  # what is kept with parameters is made once
        with launches() as seen:
            model(**inputs)
    return seen


@pytest.fixture(scope="module", params=["unpatched", "patched"])
def patched(request):
    if request.param == "patched":
        mindiesd.patch_all()
    yield
    mindiesd.unpatch_all()


# The models of docs/estimates.md.
@pytest.mark.slow
@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize(
    "name", ["flux", "wan", "hunyuan_video", "qwenimage", "unet_sdxl", "t5", "vae"]
)
def test_launches_are_those_of_a_real_run(name):
    tiny = MODELS[name]
    model = tiny.build().to("npu")
    real = run(model, tiny)
    with outline():
        for parameter in model.parameters():
            withhold(parameter)
        on_paper = run(model, tiny)
    assert len(real) > 20
    for number, (one, other) in enumerate(zip(real, on_paper, strict=False)):
        assert one == other, f"launch {number}"
    assert len(real) == len(on_paper)


def big():
    """More than this machine has memory for, if it were touched."""
    return withhold(torch.empty(1 << 17, 1 << 16, dtype=torch.bfloat16, device="npu"))


def resident():
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def test_memory_is_not_touched():
    with outline():
        before = resident()
        a = big()
        b = F.silu(a @ withhold(torch.empty(1 << 16, 1 << 13, dtype=a.dtype, device="npu")))
        c = torch.cat([a[:, : 1 << 13], b], 1).to(torch.float32)
        d = torch.zeros(1 << 30, device="npu")
        assert c.shape == (1 << 17, 1 << 14) and c.dtype == torch.float32
        assert all(map(is_unknown, (a, b, c, d)))
        assert resident() - before < 100 << 20


def test_the_device_can_be_larger_than_the_machine():
    with outline():
        torch.npu.reset_peak_memory_stats()
        x = torch.ones(1 << 20, 1 << 20, dtype=torch.bool, device="npu")
        assert (~x).shape == x.shape
        assert torch.npu.max_memory_allocated() >= 2 << 40
        free, total = torch.npu.mem_get_info()
        assert 0 < free <= total < 1 << 40


def test_what_is_known_is_computed():
    with outline():
        x = torch.arange(6.0).to("npu")
        assert (x * 2 + 1).tolist() == [1, 3, 5, 7, 9, 11]
        assert not is_unknown(x * 2)


def test_what_comes_from_the_unknown_is_unknown():
    with outline():
        x = withhold(torch.empty(4, 4, device="npu"))
        known = torch.ones(4, 4, device="npu")
        assert is_unknown(x + known)
        assert is_unknown(x.t()) and is_unknown(x[1])
        assert not is_unknown(known)
        known[0] = x[0]
        assert is_unknown(known)
        fresh = torch.ones(4, 4, device="npu")
        fresh.add_(x)
        assert is_unknown(fresh)
        out = torch.empty(4, 4, device="npu")
        torch.mul(x, 2, out=out)
        assert is_unknown(out)


def test_memory_used_again_is_not_unknown():
    with outline():
        for _ in range(20):
            x = withhold(torch.empty(300, device="npu"))
            del x
            assert torch.ones(300, device="npu").sum().item() == 300


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).all()),
        lambda x: torch.empty(4).copy_(x),
        lambda x: torch.equal(x, x + 1),
        lambda x: repr(x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
    ],
)
def test_values_that_are_not_there_cannot_be_read(read):
    with outline():
        x = withhold(torch.empty(4, device="npu"))
        with pytest.raises((NotImplementedError, RuntimeError), match="not outlined"):
            read(x)


def test_a_block_that_fails_ends_its_outline():
    with pytest.raises(KeyError), outline():
        raise KeyError
    x = withhold(torch.zeros(4, device="npu"))
    assert (x + 1).tolist() == [1, 1, 1, 1]


def test_outlines_can_be_nested():
    x = withhold(torch.zeros(4, device="npu"))
    with outline():
        with outline():
            assert is_unknown(x + 1)
        assert is_unknown(x + 1)


def test_without_the_emulator_it_says_so(monkeypatch):
    monkeypatch.setattr(runtime, "_keep", [])
    with pytest.raises(EmulatorUnavailable, match="start"), outline():
        pass


def test_outside_of_an_outline_everything_is_computed():
    with outline():
        x = withhold(torch.zeros(4, device="npu"))
    assert (x + 1).tolist() == [1, 1, 1, 1]


def test_large_known_tensors_are_not_computed():
    with outline():
        x = torch.ones(LIMIT + 1, device="npu")
        assert is_unknown(x)
        side = torch.ones(1 << 13, device="npu")
        assert not is_unknown(side)
        assert is_unknown(side[:, None] * side[None])


@pytest.mark.parametrize("layout", ["BNSD", "BSND"])
def test_limits_of_the_operators_hold(layout):
    import torch_npu

    q = withhold(torch.empty(1, 2, 4, 1024, dtype=torch.float16, device="npu"))
    heads = 2 if layout == "BNSD" else 4
    with outline(), pytest.raises(RuntimeError, match="head_dim must be 1"):
        torch_npu.npu_fusion_attention(q, q, q, heads, layout)


def test_attention_of_a_long_video_is_one_launch():
    q = withhold(torch.empty(1, 24, 118_800, 128, dtype=torch.bfloat16, device="npu"))
    with outline(), trace() as counted:
        out = F.scaled_dot_product_attention(q, q, q)
    assert out.shape == q.shape and is_unknown(out)
    assert counted.total == 1
