"""The SiLU that blocks share: bitwise equal, never stale, seen by nobody but the projection."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mindiesd
from mindiesd.patches import conditioning, memory
from tests.emulator.tiny_models import MODELS, first_tensor


@pytest.fixture(autouse=True)
def unpatched_afterwards():
    memory.MEMORY.clear()
    yield
    mindiesd.unpatch_all()
    memory.MEMORY.clear()


def layers(blocks: int = 3) -> list[nn.Sequential]:
    torch.manual_seed(4)
    return [nn.Sequential(nn.SiLU(), nn.Linear(6, 5)) for _ in range(blocks)]


@torch.no_grad()
def test_one_silu_for_all_projections(monkeypatch) -> None:
    blocks, x = layers(), torch.randn(2, 6)
    expected = [block(x) for block in blocks]
    calls: list = []
    functions = {"silu": nn.functional.silu}

    def counted(x, inplace=False):
        calls.append(tuple(x.shape))
        return functions["silu"](x, inplace)

    monkeypatch.setattr(nn.functional, "silu", counted)
    migration = mindiesd.patch_all(only="torch_sequential")
    got = [block(x) for block in blocks]
    assert all(map(torch.equal, got, expected))
    assert len(calls) == 1 and migration.report().redirected == len(blocks)
    x.mul_(2)
    assert all(torch.equal(block(x), block[1](functions["silu"](x))) for block in blocks)
    assert len(calls) == 2
    del x
    calls.clear()
    assert len(memory.MEMORY) == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block[0].register_forward_hook(lambda *_: None),
        lambda block: block[1].register_forward_pre_hook(lambda *_: None),
        lambda block: block.__setitem__(0, nn.SiLU(inplace=True)),
    ],
)
@torch.no_grad()
def test_other_layers_are_called(change) -> None:
    (block,), x = layers(1), torch.randn(2, 6)
    expected = block(x)
    change(block)
    migration = mindiesd.patch_all(only="torch_sequential")
    assert torch.equal(block(x), expected)
    report = migration.report()
    assert not report.redirected and report.fell_back
    assert not len(memory.MEMORY)


@torch.no_grad()
def test_sequences_that_start_otherwise_are_not_looked_at() -> None:
    migration = mindiesd.patch_all(only="torch_sequential")
    x = torch.randn(2, 6)
    for block in (
        nn.Sequential(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6)),
        nn.Sequential(nn.SiLU()),
        nn.Sequential(),
        type("Own", (nn.Sequential,), {})(nn.SiLU(), nn.Linear(6, 6)),
    ):
        expected = x
        for layer in block:
            expected = layer(expected)
        assert torch.equal(block(x), expected)
    report = migration.report()
    assert not report.redirected and not report.fell_back


def test_training_is_left_alone() -> None:
    (block,), x = layers(1), torch.randn(2, 6, requires_grad=True)
    migration = mindiesd.patch_all(only="torch_sequential")
    block(x).sum().backward()
    assert x.grad is not None and block[1].weight.grad is not None
    assert migration.report().fell_back
    # Of the weights only: the SiLU needs none, and its result is part of no graph.
    block.zero_grad()
    free = torch.randn(2, 6)
    block(free).sum().backward()
    torch.testing.assert_close(
        block[1].weight.grad, nn.functional.silu(free).sum(0).expand(5, 6), rtol=1e-5, atol=1e-6
    )


def test_inference_mode_is_told() -> None:
    (block,) = layers(1)
    migration = mindiesd.patch_all(only="torch_sequential")
    with torch.inference_mode():
        block(torch.randn(2, 6))
    assert migration.report().fell_back and not len(memory.MEMORY)


def test_a_cast_to_another_dtype_is_told() -> None:
    reasons: list = []

    class Recorder:
        def takes(self, reason) -> bool:
            reasons.append(reason)
            return reason is None

    linear, silu, x = nn.Linear(6, 5), nn.SiLU(), torch.randn(2, 6)

    def original(linear, silu, x, dtype):
        return linear(silu(x).to(dtype))

    made = conditioning.build_cast_projection(original, Recorder())
    with torch.no_grad():
        assert torch.equal(made(linear, silu, x, torch.float32), linear(silu(x)))
        made(linear.double(), silu, x, torch.float64)
    assert reasons[0] is None and reasons[1] is not None


@pytest.mark.parametrize("name", ["flux", "qwenimage", "sd3", "mochi", "hunyuan_dit"])
@torch.no_grad()
def test_models_are_bitwise_equal(name: str) -> None:
    tiny = MODELS[name]
    model, inputs = tiny.build(), tiny.make_inputs()
    plain = first_tensor(model(**inputs))
    migration = mindiesd.patch_all(only=("conditioning", "sequential", "ada_norm"))
    projections = {"torch_sequential", *(r.name for r in conditioning.RECORDS)}
    got = [first_tensor(model(**inputs)) for _ in range(2)]
    assert torch.equal(*got)
    torch.testing.assert_close(got[0], plain, rtol=1e-4, atol=1e-5)
    report = migration.report()
    assert report.redirected
    if name in ("qwenimage", "hunyuan_dit"):
        assert any(p.redirected for p in report.patches if p.name in projections)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@torch.no_grad()
def test_compiled(backend: str) -> None:
    (block,), x = layers(1), torch.randn(2, 6)
    expected = block(x)
    torch.compiler.reset()
    migration = mindiesd.patch_all(only="torch_sequential")
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    assert [p.traced for p in migration.report().patches] == [1]
    torch.compiler.reset()
