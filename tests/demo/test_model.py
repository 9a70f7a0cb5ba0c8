"""The trained model that is kept in the repository, and the training that made it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from scripts import _digits

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "digits"
WEIGHTS = sorted(FOLDER.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def pipe():
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def judge() -> _digits.Judge:
    return _digits.Judge()


def draw(pipe, prompt: str, seeds: range) -> np.ndarray:
    return pipe(
        prompt,
        height=32,
        width=32,
        num_inference_steps=16,
        max_sequence_length=8,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images.mean(axis=-1)


def test_weights_are_small():
    assert len(WEIGHTS) == 4
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 4_000_000


def test_weights_are_finite_and_rounded_to_bfloat16():
    for path in WEIGHTS:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no dictionary
                tensor = file.get_tensor(name)
                assert tensor.isfinite().all(), name
                assert (tensor.bfloat16() == tensor).all(), name


def test_pipeline_loads_in_one_dtype_without_being_told(pipe):
    parts = [pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
    assert {part.dtype for part in parts} == {torch.float32}


def test_pipeline_is_flux_with_sizes_that_npu_kernels_take(pipe):
    assert type(pipe).__name__ == "FluxPipeline"
    assert pipe.transformer.config.attention_head_dim % 16 == 0


@pytest.mark.parametrize("prompt", ["the digit {}", "a picture of the digit {}", "{}"])
def test_digits_are_recognised(pipe, judge, prompt):
    right = 0
    for digit, name in enumerate(_digits.NAMES):
        seeds = range(7_000 + 3 * digit, 7_000 + 3 * digit + 3)
        right += int((judge.read(draw(pipe, prompt.format(name), seeds)) == digit).sum())
    assert right >= 25  # of 30; one in ten by chance


def test_figures_mean_the_same_as_names(pipe, judge):
    read = [int(judge.read(draw(pipe, f"the digit {d}", range(1)))[0]) for d in range(10)]
    assert sum(a == b for a, b in enumerate(read)) >= 8


def test_pictures_of_one_prompt_differ(pipe):
    pictures = draw(pipe, "the digit four", range(4))
    apart = np.abs(pictures[:, None] - pictures[None]).mean(axis=(-2, -1))
    assert apart[~np.eye(4, dtype=bool)].min() > 0.02


def test_training_log_belongs_to_the_weights():
    log = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert log["weights"] == digests(FOLDER)
    assert log["time"]["cpu_seconds"] < 15 * 60
    for part in ("vae", "transformer"):
        assert log[part][-1]["step"] == log["steps"][part] - 1
        assert log[part][-1]["loss"] < log[part][0]["loss"]


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }


def train(folder: Path) -> dict:
    command = [sys.executable, "scripts/_train_demo.py", "--steps", "3", "--examined", "1"]
    done = subprocess.run(
        [*command, "--output", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_training_runs_from_nothing_and_again_the_same(tmp_path):
    log = train(tmp_path / "first")
    assert log["steps"] == {"vae": 3, "transformer": 3}
    assert log["weights"] == digests(tmp_path / "first")
    assert log["examination"]["of"] == 10
    assert train(tmp_path / "again")["weights"] == log["weights"]
    committed = {path.relative_to(FOLDER).as_posix() for path in WEIGHTS}
    assert log["weights"].keys() == committed
