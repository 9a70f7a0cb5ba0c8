"""``patch_pipeline``: this pipeline and no other, and exactly undone."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
import torch.nn.functional as F

import mindiesd
from tests.tiny import flux_inputs, tiny_flux_transformer


class Pipe:
    """A pipeline of the user's own: modules in attributes."""

    def __init__(self, **modules: torch.nn.Module) -> None:
        self.__dict__.update(modules)


class Vae(torch.nn.Module):
    """Entered through another method than forward, as diffusers' autoencoders are."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x)


def state(*models: torch.nn.Module) -> list:
    return [
        (id(m), sorted(vars(m)), list(map(id, vars(m).values())))
        for model in models
        for m in model.modules()
    ]


@torch.no_grad()
def run(model: torch.nn.Module) -> torch.Tensor:
    return model(**flux_inputs(model), return_dict=False)[0]


def test_this_pipeline_is_redirected_and_another_is_not() -> None:
    mine, other = tiny_flux_transformer(), tiny_flux_transformer()
    expected = run(mine)
    before = state(mine, other)
    with mindiesd.patch_pipeline(Pipe(transformer=mine)) as migration:
        assert torch.equal(run(other), expected)
        assert migration.report().redirected == 0
        assert torch.allclose(run(mine), expected, atol=1e-6)
        counts = {patch.name: patch.redirected for patch in migration.report().patches}
        assert counts["sdpa"] == 2 and counts["torch_rms_norm"] and counts["diffusers_rope"] == 4
        q = torch.randn(1, 2, 3, 8)
        F.scaled_dot_product_attention(q, q, q)
        assert torch.equal(run(other), expected)
        assert {p.name: p.redirected for p in migration.report().patches} == counts
    assert state(mine, other) == before
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
    run(mine)
    assert {p.name: p.redirected for p in migration.report().patches} == counts


def test_modules_entered_through_other_methods() -> None:
    vae = Vae()
    with torch.no_grad(), mindiesd.patch_pipeline(Pipe(vae=vae)) as migration:
        vae.decode(torch.randn(2, 3, 8))
    assert {p.name: p.redirected for p in migration.report().patches}["torch_layer_norm"] == 1


def test_other_thread_with_a_model_of_the_same_class() -> None:
    mine, other = tiny_flux_transformer(), tiny_flux_transformer()
    expected = run(mine)
    wrong: list[str] = []
    go = threading.Barrier(2)

    def background() -> None:
        go.wait()
        for _ in range(20):
            if not torch.equal(run(other), expected):
                wrong.append("other result")

    thread = threading.Thread(target=background)
    with mindiesd.patch_pipeline(mine) as migration:
        thread.start()
        go.wait()
        for _ in range(20):
            run(mine)
        thread.join()
        assert not wrong
        counts = {patch.name: patch.redirected for patch in migration.report().patches}
        assert counts["sdpa"] == 40, "calls of the other thread were counted, or some of ours lost"


def test_two_pipelines_at_once_with_their_own_options_and_counts() -> None:
    first, second = tiny_flux_transformer(), tiny_flux_transformer()
    with (
        mindiesd.patch_pipeline(first, only="sdpa") as one,
        mindiesd.patch_pipeline(second, only="torch_layer_norm") as two,
    ):
        run(first)
        run(second)
        run(second)
    assert [p.name for p in one.report().patches] == ["sdpa"]
    assert one.report().redirected == 2
    assert [p.name for p in two.report().patches] == ["torch_layer_norm"]
    assert two.report().redirected > 0 and two.report().redirected % 2 == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_undone_after_an_exception(error: type[BaseException]) -> None:
    model = tiny_flux_transformer()
    before = state(model)

    def fail(*args: object) -> None:
        raise error

    with pytest.raises(error), mindiesd.patch_pipeline(model):
        handle = model.transformer_blocks[0].register_forward_pre_hook(fail)
        try:
            run(model)
        finally:
            handle.remove()
    assert state(model) == before
    with mindiesd.patch_pipeline(model) as migration:
        run(model)
        assert migration.report().redirected
    with mindiesd.patch_pipeline(tiny_flux_transformer()) as migration:
        run(model)
        assert migration.report().redirected == 0, "a flag was left behind on this thread"


def test_nested_and_overlapping_blocks_on_one_module() -> None:
    model = tiny_flux_transformer()
    before = state(model)
    expected = run(model)
    outer = mindiesd.patch_pipeline(model, only="sdpa")
    inner = mindiesd.patch_pipeline(model, only="rope")
    one = outer.__enter__()
    two = inner.__enter__()
    assert torch.allclose(run(model), expected, atol=1e-6)
    assert two.report().redirected == 4, "the innermost block decides"
    outer.__exit__(None, None, None)  # not in order
    assert torch.allclose(run(model), expected, atol=1e-6)
    assert two.report().redirected == 8
    inner.__exit__(None, None, None)
    assert state(model) == before
    assert torch.equal(run(model), expected)
    assert one.report().redirected + two.report().redirected == 8


def test_inside_patch_all() -> None:
    model = tiny_flux_transformer()
    everywhere = mindiesd.patch_all(only="sdpa")
    with mindiesd.patch_pipeline(model, only="torch_layer_norm") as scoped:
        run(model)
        assert {p.name: p.redirected for p in scoped.report().patches}["torch_layer_norm"] > 0
    run(model)
    assert everywhere.report().redirected == 2
    assert F.scaled_dot_product_attention is not torch._C._nn.scaled_dot_product_attention


def test_signature_of_forward_is_kept() -> None:
    import inspect

    model = tiny_flux_transformer()
    signature = inspect.signature(model.forward)
    with mindiesd.patch_pipeline(model):
        assert inspect.signature(model.forward) == signature


def test_deepcopy_pickle_and_save_inside_the_block() -> None:
    model = tiny_flux_transformer()
    expected = run(model)
    with mindiesd.patch_pipeline(model) as migration:
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        before = migration.report().redirected
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.allclose(run(model), expected, atol=1e-6), "the copy shares our weights"
        assert migration.report().redirected > before
        assert not torch.allclose(run(twin), expected)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(run(loaded), expected)
    assert torch.equal(run(copy.deepcopy(model)), expected)


def test_instance_level_forward_that_was_there_before_or_is_put_there_inside() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = tiny_flux_transformer()
    clean = state(model)
    expected = run(model)
    add_hook_to_module(model, AlignDevicesHook("cpu"))
    hooked = state(model)
    with mindiesd.patch_pipeline(model) as migration:
        assert torch.allclose(run(model), expected, atol=1e-6)
        assert migration.report().redirected
    assert state(model) == hooked
    remove_hook_from_module(model)
    with mindiesd.patch_pipeline(model) as migration:
        add_hook_to_module(model, AlignDevicesHook("cpu"))
        assert torch.allclose(run(model), expected, atol=1e-6)
        assert migration.report().redirected
    assert torch.equal(run(model), expected)
    remove_hook_from_module(model)
    assert torch.equal(run(model), expected)
    vars(model).pop(
        "forward", None
    )  # accelerate leaves the bound method behind, with or without us
    assert state(model) == clean


class Block(torch.nn.Module):
    """Attention behind a norm; small, so that compiling it is quick."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        q = self.norm(q)
        return F.scaled_dot_product_attention(q, q, q)


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, q: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            q = block(q)
        return q


def traced(migration: mindiesd.Migration) -> dict[str, int]:
    return {patch.name: patch.traced for patch in migration.report().patches if patch.traced}


@torch.no_grad()
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("when", ["before", "inside", "inner before"])
def test_compiled_models(when: str, fullgraph: bool) -> None:
    """Compiled before or inside the block, whole or an inner module; another is never touched."""
    torch.compiler.reset()
    mine, other = Stack(), Stack()
    q = torch.randn(1, 2, 3, 8)
    expected, expected_other = mine(q), other(q)

    def compiled(model: torch.nn.Module) -> torch.nn.Module:
        return torch.compile(model, backend="aot_eager", fullgraph=fullgraph)

    target, run_mine, run_other = mine, mine, other
    if when == "before":
        target = run_mine = compiled(mine)
        run_other = compiled(other)
    elif when == "inner before":
        mine.blocks[0], other.blocks[0] = compiled(mine.blocks[0]), compiled(other.blocks[0])
    run_mine(q)
    run_other(q)
    with mindiesd.patch_pipeline(Pipe(transformer=target)) as migration:
        if when == "inside":
            run_mine, run_other = compiled(mine), compiled(other)
        assert torch.allclose(run_other(q), expected_other, atol=1e-6)
        assert traced(migration) == {}
        assert torch.allclose(run_mine(q), expected, atol=1e-6)
        number = 1 if when == "inner before" else 2
        assert traced(migration) == {"sdpa": number, "torch_layer_norm": number}
        assert torch.allclose(run_other(q), expected_other, atol=1e-6)
        assert traced(migration) == {"sdpa": number, "torch_layer_norm": number}
    assert torch.allclose(run_mine(q), expected, atol=1e-6)
    assert torch.allclose(run_other(q), expected_other, atol=1e-6)
    assert traced(migration) == {"sdpa": number, "torch_layer_norm": number}
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_flux() -> None:
    torch.compiler.reset()
    model = tiny_flux_transformer()
    expected = run(model)
    with mindiesd.patch_pipeline(model) as migration:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.allclose(run(compiled), expected, atol=1e-5)
        assert traced(migration)["sdpa"] == 2
        assert traced(migration)["diffusers_rope"] == 4
    assert torch.allclose(run(compiled), expected, atol=1e-5)
    torch.compiler.reset()


def test_nothing_to_patch_is_an_error() -> None:
    with pytest.raises(mindiesd.ParametersInvalid, match="pipe"), mindiesd.patch_pipeline(object()):
        raise AssertionError("entered")
