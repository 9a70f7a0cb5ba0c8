"""The example a newcomer meets first: an ordinary script, and a model made without downloading."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from examples.make_tiny_flux import build, make_clip_tokenizer, make_t5_tokenizer
from tests.tiny import TINY, tiny_flux_pipeline

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "text_to_image.py"


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("model"), **TINY)


@pytest.mark.parametrize("name", ["text_to_image.py", "make_tiny_flux.py"])
def test_examples_do_not_know_mindiesd(name):
    source = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert "mindiesd" not in source
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported <= {"argparse", "pathlib", "torch", "diffusers", "transformers"}


def test_builder_writes_the_same_bytes_for_the_same_seed(model, tmp_path):
    again = build(tmp_path / "again", **TINY)
    assert digests(again) == digests(model)


def test_builder_writes_other_weights_for_another_seed(model, tmp_path):
    first, other = digests(model), digests(build(tmp_path / "other", seed=1, **TINY))
    assert first.keys() == other.keys()
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")}


def test_builder_leaves_the_global_random_state_alone(tmp_path):
    import torch

    before = torch.random.get_rng_state()
    build(tmp_path, **TINY)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_clip_tokenizer_knows_words_and_ends():
    tokenizer = make_clip_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("The red kite").input_ids)
    assert tokens == [
        *("<|startoftext|>", "the</w>", "red</w>", "k", "i", "t", "e</w>", "<|endoftext|>")
    ]


def test_t5_tokenizer_knows_words_and_ends():
    tokenizer = make_t5_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("the red kite").input_ids)
    assert tokens == ["▁the", "▁red", "▁", "k", "i", "t", "e", "</s>"]


@pytest.mark.parametrize("maker", [make_clip_tokenizer, make_t5_tokenizer])
def test_tokenizers_are_the_same_after_saving_and_loading(maker, tmp_path):
    tokenizer = maker()
    tokenizer.save_pretrained(tmp_path)
    text = "a lighthouse at dusk, oil on canvas"
    assert type(tokenizer).from_pretrained(tmp_path)(text) == tokenizer(text)


def test_pipeline_draws_something(model):
    pipe = tiny_flux_pipeline(model)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}

    def draw(prompt: str, seed: int):
        import torch

        generator = torch.Generator("cpu").manual_seed(seed)
        return pipe(prompt, generator=generator, max_sequence_length=32, **options).images[0]

    picture = draw("a red boat", 0)
    assert picture.shape == (64, 64, 3)
    assert ((picture >= 0) & (picture <= 1)).all()  # false for NaN
    assert picture.std() > 0.05
    assert (picture == draw("a red boat", 0)).all()
    assert (picture != draw("a red boat", 1)).any()
    assert (picture != draw("the sea at dusk", 0)).any()


def test_tiny_flux_pipeline_builds_what_is_missing(tmp_path):
    tiny_flux_pipeline(tmp_path / "new")
    assert (tmp_path / "new" / "model_index.json").is_file()


@pytest.mark.slow
def test_script_saves_a_picture(model, tmp_path):
    from PIL import Image

    output = tmp_path / "picture.png"
    options = ["--model", model, "--steps", "2", "--size", "64", "--output", output]
    subprocess.run([sys.executable, SCRIPT, *options], check=True, timeout=300)
    with Image.open(output) as picture:
        assert picture.size == (64, 64)
        assert max(high - low for low, high in picture.getextrema()) > 30
