"""Every hook of diffusers that skips, remembers or blurs a part of a model: as it is without us."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import mindiesd
from tests.emulator.tiny_models import MODELS

hooks = pytest.importorskip("diffusers.hooks")

STEPS = 6


@pytest.fixture(autouse=True)
def unpatched_afterwards() -> Any:
    yield
    mindiesd.unpatch_all()


@dataclasses.dataclass(frozen=True)
class Case:
    """One hook on one model.

    Attributes:
        model: a name of the tiny models.
        apply: puts the hook on a model.
        context: what the pipeline tells the model of a step.
        lossless: whether the result is what it is without the hook.
    """

    model: str
    apply: Callable[[Any], None]
    context: Callable[[int], dict[str, Any]] = lambda step: {}
    lossless: bool = False


def timesteps() -> Callable[[], int]:
    """Asked at every attention, it goes down slowly; in the first step it is above 997."""
    count = itertools.count()
    return lambda: 1000 - next(count)


def pyramid(model: Any) -> None:
    model.enable_cache(
        hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(50, 998),
            current_timestep_callback=timesteps(),
        )
    )


def faster(distilled: bool) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        model.enable_cache(
            hooks.FasterCacheConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(-1, 998),
                unconditional_batch_skip_range=3,
                unconditional_batch_timestep_skip_range=(-1, 998),
                tensor_format="BFCHW",
                is_guidance_distilled=distilled,
                current_timestep_callback=timesteps(),
            )
        )

    return apply


def layer_skip(**given: Any) -> Callable[[Any], None]:
    return lambda model: hooks.apply_layer_skip(model, hooks.LayerSkipConfig([1], **given))


def smoothed(model: Any) -> None:
    from diffusers.hooks import smoothed_energy_guidance_utils as utils

    config = utils.SmoothedEnergyGuidanceConfig([0])
    utils._apply_smoothed_energy_guidance_hook(model, config, blur_sigma=2.0)


def cache(name: str, **given: Any) -> Callable[[Any], None]:
    return lambda model: model.enable_cache(getattr(hooks, name)(**given))


def of_steps(step: int) -> dict[str, Any]:
    return {"step_index": step, "sigma": 0.9 - step / 10, "num_inference_steps": STEPS}


CASES = {
    "first block": Case("flux", cache("FirstBlockCacheConfig", threshold=0.1)),
    "taylor": Case(
        "flux", cache("TaylorSeerCacheConfig", cache_interval=2, disable_cache_before_step=1)
    ),
    "magnitudes": Case(
        "flux",
        cache(
            "MagCacheConfig",
            threshold=0.5,
            retention_ratio=0.2,
            num_inference_steps=STEPS,
            mag_ratios=[1.0] * STEPS,
        ),
    ),
    "pyramid": Case("cogvideox", pyramid),
    "faster": Case("cogvideox", faster(distilled=False)),
    "faster, distilled": Case("cogvideox", faster(distilled=True)),
    "spectral": Case("wan", cache("SeaCacheConfig", threshold=5.0), of_steps),
    "text": Case("nucleus", cache("TextKVCacheConfig"), lossless=True),
    "skipped blocks": Case("cogvideox", layer_skip()),
    "skipped attention": Case("cogview4", layer_skip(skip_ff=False)),
    "skipped feed-forward": Case("cogvideox", layer_skip(skip_attention=False)),
    # By a function mode that looks for scaled_dot_product_attention.
    "skipped scores": Case(
        "cogview4", layer_skip(skip_attention=False, skip_attention_scores=True, skip_ff=False)
    ),
    "blurred queries": Case("cogvideox", smoothed),
}


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        if name not in made:
            tiny = MODELS[name]
            layers = {key: 2 for key in ("num_layers", "num_single_layers") if key in tiny.config}
            made[name] = dataclasses.replace(tiny, config={**tiny.config, **layers}).build()
        return copy.deepcopy(made[name])

    return model


@torch.no_grad()
def run(model: Any, case: Case) -> list[torch.Tensor]:
    """Several steps, of which some are taken from the cache."""
    given = MODELS[case.model].make_inputs()
    results = []
    for step in range(STEPS):
        told: Any = contextlib.nullcontext()
        if hasattr(model, "cache_context"):
            told = model.cache_context("cond", **case.context(step))
        with told:
            hidden = given["hidden_states"] * (1 + 0.02 * step)
            result = model(**{**given, "hidden_states": hidden}, return_dict=False)[0]
        results.append(result)
    return results


def hooked(model: Any, case: Case) -> Any:
    case.apply(model)
    return model


def redirected(migration: mindiesd.Migration) -> int:
    return sum(patch.redirected for patch in migration.report().patches)


def check(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_as_without_us(models: Callable[[str], Any], name: str) -> None:
    case = CASES[name]
    plain = run(models(case.model), case)
    expected = run(hooked(models(case.model), case), case)
    changed = any(
        not torch.allclose(one, other, atol=1e-4)
        for one, other in zip(expected, plain, strict=True)
    )
    assert changed is not case.lossless, "or this test would not test anything"
    before, inside = hooked(models(case.model), case), models(case.model)
    with mindiesd.patch_pipeline(SimpleNamespace(parts=[before, inside])) as migration:
        check(run(before, case), expected)
        count = redirected(migration)
        assert count
        check(run(hooked(inside, case), case), expected)
        assert redirected(migration) > count
    model = models(case.model)
    everywhere = mindiesd.patch_all()
    check(run(hooked(model, case), case), expected)
    assert redirected(everywhere)
    check(run(models(case.model), case), plain)
