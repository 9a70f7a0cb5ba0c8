"""Whole models and pipelines under ``patch_all``: same picture, copies, files, other processes."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch

import mindiesd
from tests.tiny import (
    flux_inputs,
    sd3_inputs,
    tiny_flux_pipeline,
    tiny_flux_transformer,
    tiny_sd3_transformer,
)

MODELS = {
    "flux": (tiny_flux_transformer, flux_inputs),
    "sd3": (tiny_sd3_transformer, sd3_inputs),
}


@torch.no_grad()
def run(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_result_is_at_least_as_accurate(name: str, dtype: torch.dtype) -> None:
    """Against the same weights in float64, unpatched."""
    build, make_inputs = MODELS[name]
    model = build().to(dtype)
    inputs = make_inputs(model)
    plain = run(model, inputs)
    exact_model = copy.deepcopy(model).double()
    exact = run(exact_model, make_inputs(exact_model))
    migration = mindiesd.patch_all()
    patched = run(model, inputs)
    assert migration.report().redirected > 0
    assert patched.dtype == plain.dtype
    ours, theirs = (patched - exact).abs().max(), (plain - exact).abs().max()
    assert ours <= 1.1 * theirs + 1e-6 * exact.abs().max(), (ours, theirs)


def test_copies_and_files_made_while_patched_are_ordinary() -> None:
    model = tiny_flux_transformer()
    inputs = flux_inputs(model)
    expected = run(model, inputs)
    mindiesd.patch_all()
    twin = copy.deepcopy(model)
    data = pickle.dumps(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    mindiesd.unpatch_all()
    buffer.seek(0)
    for other in (twin, pickle.loads(data), torch.load(buffer, weights_only=False)):
        assert torch.equal(run(other, inputs), expected)
        assert not any("forward" in vars(module) for module in other.modules())


def test_two_models_in_threads() -> None:
    models = [tiny_flux_transformer(), tiny_sd3_transformer()]
    inputs = [flux_inputs(models[0]), sd3_inputs(models[1])]
    expected = [run(model, given) for model, given in zip(models, inputs, strict=True)]
    migration = mindiesd.patch_all()
    single = []
    for model, given in zip(models, inputs, strict=True):
        run(model, given)  # what is redirected inside of tables that are kept comes once
        before = migration.report().redirected
        run(model, given)
        single.append(migration.report().redirected - before)
    before = migration.report().redirected
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(10):
            if not torch.allclose(run(models[index], inputs[index]), expected[index], atol=1e-6):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert migration.report().redirected - before == 20 * sum(single)


@pytest.mark.slow
def test_pipeline_draws_the_same_picture_through_every_door(tmp_path) -> None:
    pipe = tiny_flux_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        return pipe(
            "a lighthouse",
            num_inference_steps=2,
            height=32,
            width=32,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    plain = draw()
    everywhere = mindiesd.patch_all()
    assert torch.allclose(draw(), plain, atol=1 / 255 / 2)
    mindiesd.unpatch_all()
    with mindiesd.patch_pipeline(pipe) as scoped:
        assert torch.allclose(draw(), plain, atol=1 / 255 / 2)
    counts = [
        {patch.name: patch.redirected for patch in migration.report().patches}
        for migration in (everywhere, scoped)
    ]
    assert counts[0] == counts[1], "a module of the pipeline was out of scope"
    assert all(counts[0][name] for name in ("sdpa", "torch_rms_norm", "torch_layer_norm"))
    assert torch.equal(draw(), plain)
