"""The trained model of ``examples/digits`` draws the same digits on the emulated NPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import mindiesd

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def draw(device, dtype: torch.dtype, patched: bool) -> np.ndarray:
    """One picture of each digit, [10, 32, 32, 3] in [0, 1]."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 16, "max_sequence_length": 8}

    def run() -> np.ndarray:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in range(10)]
        prompts = [f"the digit {name}" for name in NAMES]
        return pipe(prompts, generator=generators, output_type="np", **options).images

    if not patched:
        return run()
    with mindiesd.patch_pipeline(pipe) as migration:
        pictures = run()
    taken = {patch.family for patch in migration.report().patches if patch.redirected}
    assert {"sdpa", "rms_norm", "layer_norm", "ada_norm", "rope"} <= taken
    return pictures


@pytest.fixture(scope="module")
def exact() -> np.ndarray:
    return draw("cpu", torch.float32, patched=False)


def test_float32_gives_the_same_pictures(exact, npu):
    found = draw(npu, torch.float32, patched=True)
    assert np.abs(found - exact).max() <= 1.01 / 255


def test_bfloat16_is_no_farther_off_than_on_the_cpu(exact, npu):
    on_cpu = draw("cpu", torch.bfloat16, patched=False)
    found = draw(npu, torch.bfloat16, patched=True)
    allowed = 1.2 * np.abs(on_cpu - exact).mean()
    assert np.abs(found - exact).mean() <= allowed
    assert allowed < 4 / 255
