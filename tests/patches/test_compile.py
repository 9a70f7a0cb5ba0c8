"""``torch.compile``: the patched code is inside the graph, and switching takes effect."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from mindiesd.ops import attention, norm, rope
from tests.tiny import flux_inputs, sd3_inputs, tiny_flux_transformer, tiny_sd3_transformer

MODELS = {
    "flux": (tiny_flux_transformer, flux_inputs),
    "sd3": (tiny_sd3_transformer, sd3_inputs),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("name", MODELS)
def test_fullgraph_with_every_patch(name: str, backend: str, monkeypatch) -> None:
    build, make_inputs = MODELS[name]
    model = build()
    inputs = make_inputs(model)
    expected = run(model, inputs)
    migration = mindiesd.patch_all()
    torch.testing.assert_close(run(model, inputs), expected, rtol=1e-5, atol=1e-5)
    eager = {patch.name: patch.redirected for patch in migration.report().patches}

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(run(compiled, inputs), expected, rtol=1e-4, atol=1e-4)
    traced = {patch.name: patch.traced for patch in migration.report().patches}
    assert traced == eager, "each eager redirect is one traced redirect"
    assert traced["sdpa"]
    if name == "flux":
        assert traced["torch_rms_norm"] and traced["diffusers_rope"]
        # The layer norms are part of modulations here.
        assert traced["flux.FluxTransformerBlock"] and traced["normalization.AdaLayerNormZero"]
    else:
        assert traced["torch_layer_norm"]
    assert not migration.report().fell_back

    # Running again neither recompiles nor counts.
    frames = torch._dynamo.utils.counters["frames"]["total"]
    run(compiled, inputs)
    assert torch._dynamo.utils.counters["frames"]["total"] == frames
    assert {patch.name: patch.traced for patch in migration.report().patches} == traced


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_patched_code_is_demonstrably_in_the_graph(backend: str, monkeypatch) -> None:
    """A marker added by the redirected function shows up in the compiled result."""
    monkeypatch.setattr(
        attention, "attend", lambda q, k, v, mask, scale, causal: torch.full_like(q, 7.0)
    )
    monkeypatch.setattr(norm, "rms_norm", lambda x, *rest: torch.full_like(x, 11.0))
    monkeypatch.setattr(
        norm, "layer_norm", lambda x, shape, weight, bias, eps: torch.full_like(x, 13.0)
    )
    monkeypatch.setattr(rope, "rotate", lambda x, cos, sin, inter: torch.full_like(x, 17.0))
    from diffusers.models import embeddings, normalization

    layer, diffusers_rms = torch.nn.LayerNorm(8), normalization.RMSNorm(8, 1e-6)
    fp32 = normalization.FP32LayerNorm(8)

    def everything(q: torch.Tensor, table: torch.Tensor) -> list[float]:
        return (
            F.scaled_dot_product_attention(q, q, q)
            + 100 * F.rms_norm(q, [8])
            + 10_000 * layer(q)
            + embeddings.apply_rotary_emb(q, (table, table))
            + fp32(q)
            + diffusers_rms(q)
        )

    q, table = torch.randn(1, 2, 3, 8), torch.randn(3, 8)
    mindiesd.patch_all()
    with torch.no_grad():
        result = torch.compile(everything, backend=backend, fullgraph=True)(q, table)
    assert torch.equal(result, torch.full_like(q, 7 + 1100 + 130_000 + 17 + 13 + 11))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_patching_and_unpatching_after_compiling(backend: str) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(self.norm(q), q, q)

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return self.block(q)

    compiled = torch.compile(Outer(), backend=backend, fullgraph=True)
    q = torch.randn(1, 2, 3, 8)
    with torch.no_grad():
        expected = compiled(q)
        for _ in range(3):
            migration = mindiesd.patch_all()
            assert torch.equal(compiled(q), expected)
            traced = {patch.name: patch.traced for patch in migration.report().patches}
            assert traced["sdpa"] == 1 and traced["torch_layer_norm"] == 1, (
                "the old code still runs"
            )
            assert any("torch.compiler.reset()" in note for note in migration.report().notes)
            mindiesd.unpatch_all()
            assert torch.equal(compiled(q), expected)
            assert migration.report().traced == 2


def test_dynamic_shapes_and_masks() -> None:
    migration = mindiesd.patch_all()

    def attend(q: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, mask)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (3, 5, 9):
            q = torch.randn(1, 2, length, 8)
            for mask in (None, torch.randn(length, length), torch.rand(1, 1, 1, length) > 0.3):
                expected = torch._C._nn.scaled_dot_product_attention(q, q, q, mask)
                torch.testing.assert_close(compiled(q, mask), expected)
    assert migration.report().traced and not migration.report().fell_back


def test_gradients_under_compile_go_to_the_original() -> None:
    migration = mindiesd.patch_all()
    layer = torch.nn.LayerNorm(8)
    compiled = torch.compile(
        lambda q: F.scaled_dot_product_attention(layer(q), q, q),
        backend="aot_eager",
        fullgraph=True,
    )
    q = torch.randn(1, 2, 3, 8, requires_grad=True)
    compiled(q).sum().backward()
    assert q.grad is not None and layer.weight.grad is not None
    assert migration.report().traced == 0


def test_autocast_inside_a_compiled_function() -> None:
    """The redirect is decided per region: outside autocast ours, inside the original."""
    migration = mindiesd.patch_all()
    layer = torch.nn.LayerNorm(8)

    def both(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = layer(q) @ q.transpose(-1, -2)
        return inside, layer(q)

    q = torch.randn(1, 2, 3, 8)
    with torch.no_grad():
        inside, outside = torch.compile(both, backend="aot_eager", fullgraph=True)(q)
        mindiesd.unpatch_all()
        expected_inside, expected_outside = both(q)
    assert inside.dtype == expected_inside.dtype == torch.bfloat16
    torch.testing.assert_close(inside, expected_inside)
    torch.testing.assert_close(outside, expected_outside)
    assert migration.report().traced == 1


def test_export() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(F.rms_norm(q, [8]), q, q)

    q = torch.randn(1, 2, 3, 8)
    expected = Attention()(q)
    mindiesd.patch_all()
    for strict in (True, False):
        with torch.no_grad():
            exported = torch.export.export(Attention(), (q,), strict=strict)
        torch.testing.assert_close(exported.module()(q), expected)
