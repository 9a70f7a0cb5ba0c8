"""``patch_pipeline`` on real diffusers pipelines, with what people do to them inside a block."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mindiesd
from mindiesd.patches.engine import ENGINE
from tests.tiny import tiny_flux_pipeline

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flux")
    tiny_flux_pipeline(path)
    return path


@pytest.fixture
def pipe(folder: Path) -> Any:
    return tiny_flux_pipeline(folder)


def draw(pipe: Any, **given: Any) -> np.ndarray:
    given.setdefault("generator", torch.Generator().manual_seed(7))
    return pipe(
        "a red boat", height=32, width=32, num_inference_steps=2, output_type="np", **given
    ).images


def close(one: np.ndarray, other: np.ndarray, atol: float = 1e-4) -> bool:
    return bool(np.abs(one - other).max() < atol)


def counts(migration: mindiesd.Migration) -> dict[str, int]:
    return {p.name: p.redirected for p in migration.report().patches if p.redirected}


def held(pipe: Any) -> list[Any]:
    return [
        (name, type(m).__name__, sorted(vars(m)), [id(v) for v in vars(m).values()])
        for component in pipe.components.values()
        if isinstance(component, torch.nn.Module)
        for name, m in component.named_modules()
    ]


def test_every_component_is_in_scope(pipe: Any) -> None:
    expected, before = draw(pipe), held(pipe)
    with mindiesd.patch_pipeline(pipe) as migration:
        assert close(draw(pipe), expected)
        whole = counts(migration)
    parts: dict[str, int] = {}
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        with mindiesd.patch_pipeline(getattr(pipe, name)) as migration:
            assert close(draw(pipe), expected)
            own = counts(migration)
        assert own, f"nothing of the {name} is redirected"
        for patch, count in own.items():
            parts[patch] = parts.get(patch, 0) + count
    assert whole == parts
    assert held(pipe) == before
    assert np.array_equal(draw(pipe), expected)


def test_the_same_generator_gives_the_same_picture(pipe: Any) -> None:
    """We draw no random number: two generators end up in the same state."""
    one, two = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    expected = draw(pipe, generator=one)
    with mindiesd.patch_pipeline(pipe):
        assert close(draw(pipe, generator=two), expected)
    assert torch.equal(one.get_state(), two.get_state())


def test_to_another_dtype_and_back_inside(pipe: Any) -> None:
    expected, before = draw(pipe), [row[:2] for row in held(pipe)]
    with mindiesd.patch_pipeline(pipe) as migration:
        pipe.to(torch.bfloat16)
        first = draw(pipe)
        assert np.isfinite(first).all()
        once = counts(migration)
        pipe.to("cpu", torch.float32)
        draw(pipe)
        assert sum(counts(migration).values()) > sum(once.values())
    assert [row[:2] for row in held(pipe)] == before
    assert all("forward" not in attributes for _, _, attributes, _ in held(pipe))
    assert close(draw(pipe), expected, 0.05), "the weights went through bfloat16"


def lora(pipe: Any) -> dict[str, torch.Tensor]:
    """A LoRA for the attention of the transformer, in diffusers' own format."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("to_q", "to_k", "to_v")):
            out, into = module.weight.shape
            down = torch.randn(2, into, generator=generator)
            state[f"transformer.{name}.lora_A.weight"] = down
            state[f"transformer.{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator)
    return state


def test_lora_loaded_and_unloaded_inside(pipe: Any) -> None:
    pytest.importorskip("peft")
    plain = draw(pipe)
    pipe.load_lora_weights(lora(pipe))
    with_lora = draw(pipe)
    pipe.unload_lora_weights()
    assert not close(plain, with_lora), "or this test would not test anything"
    before = held(pipe)
    with mindiesd.patch_pipeline(pipe) as migration:
        assert close(draw(pipe), plain)
        once = counts(migration)
        pipe.load_lora_weights(lora(pipe))
        assert close(draw(pipe), with_lora)
        assert counts(migration)["sdpa"] == 2 * once["sdpa"]
        pipe.fuse_lora()
        assert close(draw(pipe), with_lora)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert close(draw(pipe), plain)
    # peft leaves attributes of its own behind; of us nothing stays.
    assert [row[:2] for row in held(pipe)] == [row[:2] for row in before]
    assert all("forward" not in attributes for _, _, attributes, _ in held(pipe))
    assert close(draw(pipe), plain, 1e-5)


def test_lora_loaded_inside_and_unloaded_outside_and_the_other_way_round(pipe: Any) -> None:
    pytest.importorskip("peft")
    plain = draw(pipe)
    with mindiesd.patch_pipeline(pipe):
        pipe.load_lora_weights(lora(pipe))
        with_lora = draw(pipe)
    assert close(draw(pipe), with_lora) and not close(plain, with_lora)
    with mindiesd.patch_pipeline(pipe):
        pipe.unload_lora_weights()
        assert close(draw(pipe), plain)
    assert close(draw(pipe), plain)
    assert all("forward" not in attributes for _, _, attributes, _ in held(pipe))


@pytest.mark.parametrize("when", ["before", "inside"])
def test_model_offload(pipe: Any, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes its hooks off and puts them on again after each call of the pipeline."""
    pytest.importorskip("accelerate")
    expected = draw(pipe)
    # What a model calls in its own forward, not in a part of it.
    class_forward, in_force = type(pipe.transformer).forward, ENGINE.state("sdpa").site.in_force
    seen: list[bool] = []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(in_force())
        return class_forward(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", functools.wraps(class_forward)(watched))
    if when == "before":
        pipe.enable_model_cpu_offload(device="cpu")
        assert close(draw(pipe), expected)
    with mindiesd.patch_pipeline(pipe) as migration:
        if when == "inside":
            pipe.enable_model_cpu_offload(device="cpu")
        seen.clear()
        assert close(draw(pipe), expected)
        once = counts(migration)
        assert once["sdpa"] > 0
        for number in (2, 3):
            assert close(draw(pipe), expected)
            assert counts(migration) == {name: number * count for name, count in once.items()}
        pipe.remove_all_hooks()
        assert close(draw(pipe), expected)
        assert counts(migration)["sdpa"] == 4 * once["sdpa"]
        assert len(seen) == 8 and all(seen)
        inside = counts(migration)
    assert close(draw(pipe), expected)
    assert counts(migration) == inside
    pipe.remove_all_hooks()
    left = {name for _, _, attributes, _ in held(pipe) for name in attributes}
    assert not any("mindiesd" in name for name in left)
    # accelerate leaves the class's forward as an attribute behind; ours is nowhere.
    forwards = [
        vars(module)["forward"]
        for component in pipe.components.values()
        if isinstance(component, torch.nn.Module)
        for module in component.modules()
        if "forward" in vars(module)
    ]
    assert all(forward.__func__ is type(forward.__self__).forward for forward in forwards)
    assert close(draw(pipe), expected)


def test_model_offload_in_nested_blocks(pipe: Any) -> None:
    """The inner block counts its calls, also after the hooks were put on anew."""
    pytest.importorskip("accelerate")
    expected = draw(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    with mindiesd.patch_pipeline(pipe) as outer:
        draw(pipe)
        once = counts(outer)
        with mindiesd.patch_pipeline(pipe.transformer) as inner:
            draw(pipe)
            first = counts(inner)
            assert close(draw(pipe), expected)
            assert counts(inner) == {name: 2 * count for name, count in first.items()}
        assert close(draw(pipe), expected)
        for name, count in once.items():
            assert counts(outer)[name] == 4 * count - counts(inner).get(name, 0)
    assert close(draw(pipe), expected)


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(pipe: Any, kind: str, when: str) -> None:
    from diffusers.hooks import apply_group_offloading

    expected = draw(pipe)

    def offload() -> None:
        more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(
            pipe.transformer,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type=kind,
            **more,
        )

    if when == "before":
        offload()
        before = held(pipe)
    with mindiesd.patch_pipeline(pipe) as migration:
        if when == "inside":
            offload()
        assert close(draw(pipe), expected)
        assert counts(migration)["sdpa"] > 0 and counts(migration)["diffusers_rope"] > 0
        inside = counts(migration)
    assert close(draw(pipe), expected)
    assert counts(migration) == inside
    if when == "before":
        assert held(pipe) == before


def test_layerwise_casting_and_cache_hooks_inside(pipe: Any) -> None:
    """Hooks of diffusers' HookRegistry put over our forward and taken off again inside."""
    from diffusers import FirstBlockCacheConfig

    expected, before = draw(pipe), [row[:3] for row in held(pipe)]
    with mindiesd.patch_pipeline(pipe) as migration:
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        assert close(draw(pipe), expected)
        inside = counts(migration)
        assert inside["sdpa"] > 0
        pipe.transformer.disable_cache()
        assert close(draw(pipe), expected)
        assert counts(migration)["sdpa"] == 2 * inside["sdpa"]
    assert np.array_equal(draw(pipe), expected)
    assert len([row[:3] for row in held(pipe)]) == len(before)


def test_hooks_from_before_that_are_taken_off_inside(pipe: Any) -> None:
    from diffusers import FirstBlockCacheConfig

    expected = draw(pipe)
    with mindiesd.patch_pipeline(pipe) as migration:
        draw(pipe)
    once = counts(migration)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with mindiesd.patch_pipeline(pipe) as migration:
        assert close(draw(pipe), expected)
        pipe.transformer.disable_cache()
        before = counts(migration)
        assert close(draw(pipe), expected)
        assert {name: count - before[name] for name, count in counts(migration).items()} == once
        # Somebody who puts a forward of their own there has us around it.
        pipe.transformer.forward = pipe.transformer.forward
        inner = type(pipe.transformer).forward.__get__(pipe.transformer)
        pipe.transformer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
        before = counts(migration)
        assert close(draw(pipe), expected)
        assert {name: count - before[name] for name, count in counts(migration).items()} == once
        own = pipe.transformer.forward
    assert pipe.transformer.forward is not own
    assert pipe.transformer.forward.__name__ == "<lambda>", "theirs is what stays"
    del pipe.transformer.forward
    left = {name for _, _, attributes, _ in held(pipe) for name in attributes}
    assert not any("mindiesd" in name for name in left)
    assert np.array_equal(draw(pipe), expected)


def test_a_users_subclass(pipe: Any) -> None:
    from diffusers import FluxPipeline

    class Mine(FluxPipeline):
        """With a component that it registers as diffusers documents, and one that it does not."""

        def __init__(
            self,
            scheduler: Any,
            vae: Any,
            text_encoder: Any,
            tokenizer: Any,
            text_encoder_2: Any,
            tokenizer_2: Any,
            transformer: Any,
            extra: torch.nn.Module,
            image_encoder: Any = None,
            feature_extractor: Any = None,
        ) -> None:
            super().__init__(
                scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer,
                image_encoder, feature_extractor,
            )  # fmt: skip
            self.register_modules(extra=extra)
            self.helper = torch.nn.LayerNorm(8)

        @torch.no_grad()
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.helper(self.extra(x))

    mine = Mine(extra=torch.nn.Sequential(torch.nn.LayerNorm(8)), **pipe.components)
    mine.set_progress_bar_config(disable=True)
    x = torch.randn(2, 8)
    expected = mine(x)
    with mindiesd.patch_pipeline(mine) as migration:
        assert torch.allclose(mine(x), expected, atol=1e-6)
        assert counts(migration) == {"torch_layer_norm": 2}
        pipe.transformer.norm_out.norm(torch.randn(1, 64))
        assert counts(migration) == {"torch_layer_norm": 3}, "the components it took over"
    assert torch.equal(mine(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in place", "repeated blocks", "assigned"])
def test_compiled_parts(pipe: Any, how: str) -> None:
    expected = draw(pipe)
    torch.compiler.reset()
    if how == "in place":
        pipe.transformer.compile(backend="aot_eager")
    elif how == "repeated blocks":
        pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    assert close(draw(pipe), expected)
    with mindiesd.patch_pipeline(pipe) as migration:
        assert close(draw(pipe), expected)
        traced = {p.name: p.traced for p in migration.report().patches if p.traced}
        assert traced["sdpa"] >= 2 and traced["diffusers_rope"] >= 4, traced
    assert close(draw(pipe), expected)
    assert traced == {p.name: p.traced for p in migration.report().patches if p.traced}
    torch.compiler.reset()
