"""Trains the model of ``scripts/demo`` from nothing, and writes it with its training log.

    scripts/train_demo [--output examples/digits] [--seed N] [--threads N]

First the VAE learns to repeat the digits; then the transformer and both text encoders learn, from
the VAE's latents, to turn noise into the digit that a prompt names: flow matching (arXiv
2210.02747), as Flux and Stable Diffusion 3 were trained. What is kept is a moving average of the
weights, rounded to bfloat16.

The same command gives the same bytes on the same kind of processor with the same versions. With
other threads, or on another processor, sums are taken in another order, so the weights differ, the
more the longer it learns; what the pictures show does not.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts import _digits, _digits_model, _scores  # noqa: E402

BATCH, VAE_BATCH = 64, 32
VAE_STEPS, VAE_RATE = 400, 4e-3
STEPS, RATE = 2000, 1.5e-3
WARM_UP = 100
AVERAGED = 0.995  # how much of the moving average a step keeps, at the end
KL_WEIGHT = 1e-4
DRAWING_STEPS = 16
PACKAGES = ("torch", "diffusers", "transformers", "scikit-learn", "numpy", "safetensors")


class Log:
    """What happens, on the screen and for the file beside the weights."""

    def __init__(self, steps: dict[str, int], seed: int) -> None:
        self._start = time.perf_counter()
        self.entries: dict[str, Any] = {
            "command": " ".join(["scripts/train_demo", *sys.argv[1:]]),
            "seed": seed,
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version()}
            | {name: metadata.version(name) for name in PACKAGES},
            "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            "batch": {"vae": VAE_BATCH, "transformer": BATCH},
            "steps": steps,
        }

    def row(self, part: str, step: int, **values: float) -> None:
        """One line of a part's course: a step's loss, and the like."""
        row = {"step": step, **{name: round(value, 5) for name, value in values.items()}}
        row["seconds"] = round(time.perf_counter() - self._start, 1)
        self.entries.setdefault(part, []).append(row)
        print(
            f"{part:12}" + "".join(f"{name} {value:<10}" for name, value in row.items()), flush=True
        )

    def close(self) -> None:
        """Note the time that it took."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        self.entries["time"] = {
            "wall_seconds": round(time.perf_counter() - self._start),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        }


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    vae_steps = min(VAE_STEPS, options.steps)
    log = Log({"vae": vae_steps, "transformer": options.steps}, options.seed)

    train, test = _digits.load()
    vae = train_vae(train, vae_steps, log)
    fit_latents(vae, train)
    log.entries["vae_error"] = vae_error(vae, test)
    print(f"the VAE's root-mean-square error, held-out digits: {log.entries['vae_error']} of 255")
    pipe = _digits_model.make_pipeline(vae)
    train_pipeline(pipe, train, options.steps, log)

    folder = Path(options.output)
    save(pipe, folder)
    log.entries["examination"] = examine(folder, train, test, options.examined)
    log.entries["weights"] = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.safetensors"))
    }
    log.close()
    (folder / "training.json").write_text(laid_out(log.entries), encoding="utf-8")
    print(json.dumps(log.entries["examination"] | log.entries["time"], indent=2))
    print(f"saved {folder}: {size(folder) / 1e6:.2f} MB of weights")


def train_vae(train: _digits.Digits, steps: int, log: Log) -> Any:
    vae = _digits_model.make_vae()
    pictures = as_input(train.pixels)
    average = Average(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.99))
    for step, chosen in enumerate(batches(len(pictures), VAE_BATCH, steps)):
        set_rate(optimizer, VAE_RATE, step, steps)
        wanted = pictures[chosen]
        found = vae.encode(wanted).latent_dist
        drawn = vae.decode(found.sample()).sample
        error = F.mse_loss(drawn, wanted)
        loss = error + KL_WEIGHT * found.kl().mean() / found.mean[0].numel()
        advance(optimizer, loss, vae, average, step)
        if step % 100 == 0 or step == steps - 1:
            log.row("vae", step, loss=loss.item(), error=error.item())
    average.give(vae)
    return vae.eval()


@torch.no_grad()
def fit_latents(vae: Any, train: _digits.Digits) -> None:
    """Let the latents, as the transformer sees them, have mean 0 and variance 1."""
    latents = vae.encode(as_input(train.pixels)).latent_dist.mean
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 6),
        scaling_factor=round(1 / latents.std().item(), 6),
    )


@torch.no_grad()
def vae_error(vae: Any, test: _digits.Digits) -> float:
    pictures = as_input(test.pixels)
    drawn = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    return round(255 / 2 * F.mse_loss(drawn, pictures).sqrt().item(), 2)


def train_pipeline(pipe: Any, train: _digits.Digits, steps: int, log: Log) -> None:
    """Train the transformer and the text encoders together."""
    parts = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]).train()
    texts, asked = _digits_model.prompts()
    clip, t5 = tokens(pipe, texts)
    prompts_of = torch.tensor([[n for n, x in enumerate(asked) if x == d] for d in range(10)])
    with torch.no_grad():
        found = pipe.vae.encode(as_input(train.pixels)).latent_dist
    config = pipe.vae.config
    labels = torch.from_numpy(train.labels)
    height, width = found.mean.shape[-2:]
    picture_ids = pipe._prepare_latent_image_ids(0, height // 2, width // 2, "cpu", torch.float32)
    text_ids = torch.zeros(_digits_model.TEXT_LENGTH, 3)

    average = Average(parts)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01)
    course = []
    for step, chosen in enumerate(batches(len(labels), BATCH, steps)):
        set_rate(optimizer, RATE, step, steps)
        latents = (found.mean[chosen] - config.shift_factor) * config.scaling_factor
        clean = pipe._pack_latents(latents, len(chosen), latents.shape[1], height, width)
        noise = torch.randn_like(clean)
        # Logit-normal, as in Stable Diffusion 3 (arXiv 2403.03206): the middle matters most.
        t = torch.randn(len(chosen)).sigmoid()
        pick = prompts_of[labels[chosen], torch.randint(prompts_of.shape[1], (len(chosen),))]
        velocity = pipe.transformer(
            hidden_states=torch.lerp(clean, noise, t[:, None, None]),
            timestep=t,
            pooled_projections=pipe.text_encoder(clip).pooler_output[pick],
            encoder_hidden_states=pipe.text_encoder_2(t5)[0][pick],
            txt_ids=text_ids,
            img_ids=picture_ids,
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - clean)
        advance(optimizer, loss, parts, average, step)
        course.append(loss.item())
        if step % 100 == 0 or step == steps - 1:
            recent = course[-100:]
            log.row("transformer", step, loss=sum(recent) / len(recent))
    average.give(parts)
    parts.eval()


def tokens(pipe: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """What the pipeline's two tokenizers make of prompts, padded as the pipeline pads them."""
    length = _digits_model.TEXT_LENGTH
    found = [
        tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)
    ]
    assert all(ids.shape[1] == length for ids in found), "a prompt is longer than TEXT_LENGTH"
    return found[0], found[1]


def as_input(pixels: np.ndarray) -> Tensor:
    """[N, 8, 8] in [0, 1] as the VAE takes it: [N, 3, 32, 32] in [-1, 1]."""
    grown = torch.from_numpy(_digits.enlarge(pixels))
    return (2 * grown - 1)[:, None].expand(-1, 3, -1, -1).contiguous()


def batches(count: int, size: int, steps: int) -> Iterator[Tensor]:
    """Indices, ``size`` at a time: every picture once before any comes again."""
    left = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(left) < size:
            left = torch.cat([left, torch.randperm(count)])
        yield left[:size]
        left = left[size:]


def set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, steps: int) -> None:
    """A linear rise, then half a cosine down to nothing."""
    warm = min(WARM_UP, max(1, steps // 4))
    if step < warm:
        factor = (step + 1) / warm
    else:
        factor = (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
    for group in optimizer.param_groups:
        group["lr"] = rate * factor


class Average:
    """A moving average of a module's weights."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._weights = [parameter.detach().clone() for parameter in module.parameters()]

    def add(self, module: torch.nn.Module, step: int) -> None:
        # The first steps would weigh too much otherwise.
        kept = min(AVERAGED, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self._weights, list(module.parameters()), 1 - kept)

    def give(self, module: torch.nn.Module) -> None:
        with torch.no_grad():
            for parameter, weight in zip(module.parameters(), self._weights, strict=True):
                parameter.copy_(weight)


def advance(
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    module: torch.nn.Module,
    average: Average,
    step: int,
) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    average.add(module, step)


def save(pipe: Any, folder: Path) -> None:
    """Write the pipeline; what else lies in the folder, such as its card, stays.

    All weights are rounded to bfloat16. Those of the text encoders are stored as float32: given no
    dtype, transformers loads what is stored and diffusers loads float32, and these two must agree.
    """
    parts = ("transformer", "text_encoder", "text_encoder_2", "vae", "tokenizer", "tokenizer_2")
    for part in parts:
        shutil.rmtree(folder / part, ignore_errors=True)
    rounded = copy.deepcopy(pipe).to(torch.bfloat16)
    rounded.text_encoder.float()
    rounded.text_encoder_2.float()
    rounded.save_pretrained(folder)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def examine(folder: Path, train: _digits.Digits, test: _digits.Digits, each: int) -> dict[str, Any]:
    """Have the judge read what the saved pipeline draws, and look for copies."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for digit, name in enumerate(_digits.NAMES):
        seeds = range(digit * each, (digit + 1) * each)
        drawn.append(
            pipe(
                _digits_model.PROMPTS[0].format(name),
                height=_digits.SIZE,
                width=_digits.SIZE,
                num_inference_steps=DRAWING_STEPS,
                max_sequence_length=_digits_model.TEXT_LENGTH,
                num_images_per_prompt=each,
                # Other seeds than the demo's.
                generator=[torch.Generator("cpu").manual_seed(100_000 + seed) for seed in seeds],
                output_type="np",
            ).images.mean(axis=-1)
        )
    pictures, truth = np.concatenate(drawn), np.repeat(np.arange(10), each)
    judge = _digits.Judge()
    right = int((judge.read(pictures) == truth).sum())
    return {
        "drawing_steps": DRAWING_STEPS,
        "read_rightly": right,
        "of": len(truth),
        "interval": [round(end, 4) for end in _scores.wilson(right, len(truth))],
        "judge_on_held_out_digits": list(judge.held_out),
        # The median distance to the nearest of the training digits. Copies would be near 0.
        "nearest_to_drawn": nearest(pictures, train),
        "nearest_to_held_out": nearest(_digits.enlarge(test.pixels), train),
    }


def nearest(pictures: np.ndarray, train: _digits.Digits) -> float:
    known = _digits.enlarge(train.pixels)
    flat = (torch.from_numpy(_digits.reduce(x)).float().flatten(1) for x in (pictures, known))
    return round(torch.cdist(*flat).amin(1).median().item(), 4)


def laid_out(entries: dict[str, Any]) -> str:
    """JSON with one line for each row of a course."""
    lines = []
    for name, value in entries.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n    ".join(json.dumps(row) for row in value)
            lines.append(f'  "{name}": [\n    {rows}\n  ]')
        else:
            lines.append(f'  "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo's model.")
    parser.add_argument("--output", default="examples/digits", help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the transformer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--examined", type=int, default=20, help="pictures of each digit to examine"
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
