"""Whether a picture stays the same: the tiny Flux pipeline on the CPU, patched and unpatched.

    python scripts/_parity.py [--json FILE]

Errors are against the same pipeline in float64: the largest difference of any value of the picture,
which lies in 0 … 1. Each figure is the patched error over the unpatched one, so 1 means that
patching costs no accuracy. Repeating a run gives the same numbers on the same machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _history import Figure, figures_to_json, goals

PROMPTS = ("a red boat", "the light house at dusk, oil on the sea")


def figures() -> list[Figure]:
    """The ratio of errors in each dtype, and how far the two pictures are apart."""
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    import mindiesd
    from examples.make_tiny_flux import build

    torch.set_num_threads(1)
    logging.set_verbosity_error()  # it warns of .to(dtype), of which each picture needs one
    found = []
    with tempfile.TemporaryDirectory() as folder:
        build(folder)
        pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def draw(dtype: torch.dtype) -> torch.Tensor:
        pipe.to(dtype)
        drawn = []
        for seed, prompt in enumerate(PROMPTS):
            noise = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(seed))
            picture: Any = pipe(
                prompt,
                num_inference_steps=4,
                latents=noise.to(dtype),
                height=128,
                width=128,
                output_type="pt",
            )
            drawn.append(picture.images.double())
        return torch.cat(drawn)

    # A pipeline that was in bfloat16 has lost what that rounds off: each begins from these weights.
    weights = {
        name: {key: value.clone() for key, value in part.state_dict().items()}
        for name, part in parts(pipe).items()
    }

    def fresh(dtype: torch.dtype) -> torch.Tensor:
        pipe.to(torch.float32)
        for name, part in parts(pipe).items():
            part.load_state_dict(weights[name])
        return draw(dtype)

    exact = fresh(torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        unpatched = fresh(dtype)
        mindiesd.patch_all()
        try:
            patched = fresh(dtype)
        finally:
            mindiesd.unpatch_all()
        errors = [(picture - exact).abs().max().item() for picture in (unpatched, patched)]
        found.append(
            Figure(
                name=f"error patched / unpatched, {short}",
                value=errors[1] / errors[0],
                unit="×",
                goal=1.05,
                slack=0.05,
                details={"unpatched": errors[0], "patched": errors[1]},
            )
        )
        apart = (patched - unpatched).abs().max().item()
        found.append(
            Figure(
                name=f"patched and unpatched apart by, {short}",
                value=apart,
                tolerance=0.5,
                slack=1e-6,
            )
        )
    return found


def parts(pipe: Any) -> dict[str, Any]:
    """The modules of a pipeline."""
    import torch

    return {
        name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    found = figures()
    print(goals(found))
    if options.json:
        options.json.write_text(figures_to_json(found), encoding="utf-8")


if __name__ == "__main__":
    main()
