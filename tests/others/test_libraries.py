"""Libraries that change the same models as we do, on real models: results and undoing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mindiesd
from tests.tiny import flux_inputs, tiny_flux_transformer

pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def unpatched_afterwards() -> Any:
    yield
    mindiesd.unpatch_all()
    torch.compiler.reset()


@torch.no_grad()
def run(model: Any, **given: Any) -> torch.Tensor:
    # Not from the model itself: offloaded weights are on the meta device.
    like: Any = SimpleNamespace(config=model.config, parameters=lambda: iter([torch.zeros(1)]))
    return model(**flux_inputs(like, **given), return_dict=False)[0]


def counts(migration: mindiesd.Migration) -> dict[str, int]:
    return {p.name: p.redirected for p in migration.report().patches if p.redirected}


def both_ways(model: Any, change: Any, undo: Any, atol: float = 1e-4) -> None:
    """Change the model before it is patched, and while: both give what they give unpatched."""
    fresh = run(model)
    change(model)
    changed = run(model)
    migration = mindiesd.patch_all()
    torch.testing.assert_close(run(model), changed, atol=atol, rtol=1e-3)
    assert counts(migration)["sdpa"] >= 2
    undo(model)
    torch.testing.assert_close(run(model), fresh, atol=atol, rtol=1e-3)
    change(model)
    torch.testing.assert_close(run(model), changed, atol=atol, rtol=1e-3)
    mindiesd.unpatch_all()
    assert torch.equal(run(model), changed)
    undo(model)
    assert torch.equal(run(model), fresh)


# accelerate.


def test_accelerates_offload_hooks() -> None:
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    both_ways(
        tiny_flux_transformer(),
        lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
        lambda model: remove_hook_from_module(model, recurse=True),
    )


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerator_prepare(precision: str) -> None:
    """It puts a forward of its own on the instance: autocast, and float32 results."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        model = accelerator.prepare_model(tiny_flux_transformer(), evaluation_mode=True)
        expected = run(model)
        migration = mindiesd.patch_all()
        got = run(model)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(
            got, expected, atol=0.05 if precision == "bf16" else 1e-4, rtol=1e-2
        )
        assert counts(migration)["sdpa"] == 2
        mindiesd.unpatch_all()
        with mindiesd.patch_pipeline(model) as scoped:
            torch.testing.assert_close(run(model), got, atol=1e-2, rtol=1e-2)
        assert counts(scoped)["sdpa"] == 2
        plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        torch.testing.assert_close(run(plain), run(tiny_flux_transformer()))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_training_with_accelerate_is_as_without_us() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def train() -> list[float]:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        model = tiny_flux_transformer().train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        losses = []
        for _ in range(3):
            loss = model(**flux_inputs(model), return_dict=False)[0].square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        AcceleratorState._reset_state(reset_partial_state=True)
        return losses

    expected = train()
    migration = mindiesd.patch_all()
    assert train() == expected
    assert "sdpa" not in counts(migration)


# peft.


def test_peft_adapters() -> None:
    from peft import LoraConfig

    def change(model: Any) -> None:
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))

    def undo(model: Any) -> None:
        model.delete_adapters("default")
        model.unload_lora()

    both_ways(tiny_flux_transformer(), change, undo)


def test_peft_on_a_text_encoder() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = get_peft_model(
        T5EncoderModel(config).eval(),
        LoraConfig(r=2, init_lora_weights=False, target_modules=["q", "v"]),
    ).eval()
    tokens = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        expected = model(input_ids=tokens).last_hidden_state
        with mindiesd.patch_pipeline(model) as migration:
            got = model(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert counts(migration)
        merged = model.merge_and_unload()
        with mindiesd.patch_pipeline(merged):
            again = merged(input_ids=tokens).last_hidden_state
        torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


# torchao.


def test_torchao_quantized_linears() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_flux_transformer()
    plain = run(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = run(model)
    assert not torch.equal(expected, plain), "or nothing is quantized"
    migration = mindiesd.patch_all(verify=1)
    torch.testing.assert_close(run(model), expected, atol=1e-4, rtol=1e-3)
    assert counts(migration)["sdpa"] == 2
    assert migration.report().failed_verification == 0
    mindiesd.unpatch_all()
    assert torch.equal(run(model), expected)


# diffusers' own hooks.


def caches() -> dict[str, Any]:
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
    from diffusers.hooks import TaylorSeerCacheConfig

    step = iter(range(10_000))

    def now() -> int:
        return 500 - next(step) % 100

    return {
        "first block": lambda: FirstBlockCacheConfig(threshold=0.1),
        "pyramid attention": lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 900),
            current_timestep_callback=now,
        ),
        "taylor": lambda: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    }


@pytest.mark.parametrize("name", ["first block", "pyramid attention", "taylor"])
def test_diffusers_caches(name: str) -> None:
    """Several steps, of which some are taken from the cache: as many as without us."""

    def steps(model: Any) -> list[torch.Tensor]:
        model.enable_cache(caches()[name]())
        try:
            if hasattr(model, "cache_context"):
                with model.cache_context("cond"):
                    return [run(model, seed=1 + step // 3) for step in range(6)]
            return [run(model, seed=1 + step // 3) for step in range(6)]
        finally:
            model.disable_cache()

    model = tiny_flux_transformer(num_layers=2, num_single_layers=2)
    plain = run(model)
    expected = steps(model)
    migration = mindiesd.patch_all()
    for got, wanted in zip(steps(model), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
    assert counts(migration)["sdpa"] > 0
    mindiesd.unpatch_all()
    assert torch.equal(run(model), plain)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "while patched"])
def test_compiled_repeated_blocks(when: str) -> None:
    model = tiny_flux_transformer(num_layers=2, num_single_layers=2)
    plain = run(model)
    if when == "before":
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(run(model), plain, atol=1e-4, rtol=1e-3)
    migration = mindiesd.patch_all()
    if when != "before":
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(model), plain, atol=1e-4, rtol=1e-3)
    traced = {p.name: p.traced for p in migration.report().patches}
    assert traced["sdpa"] and traced["diffusers_rope"]
    # One graph serves all blocks of a class: more of them are not compiled anew.
    run(model)
    assert {p.name: p.traced for p in migration.report().patches} == traced
    mindiesd.unpatch_all()
    torch.testing.assert_close(run(model), plain, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_cache_dit() -> None:
    """In a process of its own: importing it replaces backends of diffusers for good."""
    pytest.importorskip("cache_dit")
    cases = Path(__file__).with_name("cache_dit_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout, done.stdout


def test_the_layers_module_is_the_layers_api() -> None:
    import mindiesd.layers

    for name in mindiesd.layers.__all__:
        assert getattr(mindiesd.layers, name) is getattr(mindiesd, name)
    with pytest.raises(AttributeError, match="attention_forward"):
        _ = mindiesd.layers.quantize
