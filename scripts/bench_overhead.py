"""What patching costs the host: added time per call, start-up, and a whole pipeline.

Every figure is a difference or a ratio of two things measured in one run, alternately. On a machine
that does other work the smallest of many repetitions is what the code costs, so that is what is
compared for single calls; the median is used for whole programs.

    python scripts/bench_overhead.py [--json FILE] [--write PAGE] [--quick]

scripts/bench runs this and the other measurements, and keeps the figures.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import _layer_calls
from _history import Figure, figures_to_json, goals

ROOT = Path(__file__).resolve().parent.parent

# How much worse a figure may be than in another run of the same machine: part of it, and on top.
TOLERANCES = {"µs": (0.1, 0.3), "ms": (0.2, 10.0), "×": (0.0, 0.03)}


def figure(what: str, value: float, goal: float, unit: str) -> Figure:
    tolerance, slack = TOLERANCES[unit]
    return Figure(name=what, value=value, unit=unit, goal=goal, tolerance=tolerance, slack=slack)


Case = tuple[str, Callable[[], object], Callable[[], object], float]


def added(cases: list[Case], quick: bool = False) -> list[Figure]:
    """Microseconds that each case takes more than its bare counterpart.

    Minima over repetitions that go round all cases several times: what else the machine does comes
    in bursts, and must not fall on one case alone.
    """
    calls, rounds, repeats = (100, 1, 2) if quick else (2000, 8, 8)
    best = [[float("inf"), float("inf")] for _ in cases]
    for _ in range(rounds):
        for minima, (_, *pair, _) in zip(best, cases, strict=True):
            for _ in range(repeats):
                for which, function in enumerate(pair):
                    minima[which] = min(minima[which], timeit.timeit(function, number=calls))
    return [
        figure(what, (ours - bare) / calls * 1e6, goal, "µs")
        for (what, _, _, goal), (ours, bare) in zip(cases, best, strict=True)
    ]


def call_rows(quick: bool = False) -> list[Figure]:
    import torch
    import torch.nn.functional as F
    from diffusers.models import embeddings, normalization

    import mindiesd
    from mindiesd.ops.backends import native
    from mindiesd.patches.faults import guard
    from mindiesd.patches.rms_norm import build_functional as build_rms
    from mindiesd.patches.scope import Site
    from mindiesd.patches.sdpa import build as build_sdpa

    torch.set_num_threads(1)
    q = torch.randn(1, 2, 4, 8)
    three = torch.randn(2, 4, 8)
    mask = torch.zeros(1, 1, 4, 4)
    kept = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    cos, sin = torch.randn(2, 4, 8)
    shape = [8]
    layer = torch.nn.LayerNorm(8)
    fp32 = normalization.FP32LayerNorm(8)
    rms = normalization.RMSNorm(8, 1e-6)
    wide = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    falling_back: list[Case] = []
    with torch.no_grad():
        mindiesd.patch_all()
        sdpa, functional = F.scaled_dot_product_attention, F.rms_norm

        def nothing(*args: object, **kwargs: object) -> None:
            return None

        # Falling back: the same replacements, built over an original that does nothing.
        for what, build, falling, args, goal in (
            ("SDPA falling back (3-D input)", build_sdpa, "sdpa", (three, three, three), 1.5),
            ("F.rms_norm falling back (float64)", build_rms, "torch_rms_norm", (wide, shape), 2),
        ):
            site = Site(falling)
            site.everywhere = True
            site.arm()
            shim = guard(build(nothing, site), nothing, site)
            falling_back.append((what, partial(shim, *args), partial(nothing, *args), goal))

        # From here on the kernels do nothing, on our side and on the bare one.
        kernels = ("attention", "rms_norm", "layer_norm", "rotate")
        real = {name: getattr(native, name) for name in kernels}
        for name in kernels:
            setattr(native, name, nothing)
        layer_forward = torch.nn.LayerNorm.forward
        fp32_forward = normalization.FP32LayerNorm.forward
        rms_forward = normalization.RMSNorm.forward
        rope = embeddings.apply_rotary_emb
        redirected: list[Case] = [
            ("SDPA redirected, no mask", lambda: sdpa(q, q, q), lambda: nothing(q, q, q), 3),
            (
                "SDPA redirected, is_causal",
                lambda: sdpa(q, q, q, is_causal=True),
                lambda: nothing(q, q, q, is_causal=True),
                3,
            ),
            (
                "SDPA redirected, additive mask",
                lambda: sdpa(q, q, q, mask),
                lambda: nothing(q, q, q, mask),
                3,
            ),
            (
                "SDPA redirected, bool mask (1,1,1,S)",
                lambda: sdpa(q, q, q, kept),
                lambda: nothing(q, q, q, kept),
                3,
            ),
            (
                "F.rms_norm redirected",
                lambda: functional(q, shape),
                lambda: nothing(q, shape),
                2,
            ),
            (
                "LayerNorm.forward redirected",
                lambda: layer_forward(layer, q),
                lambda: nothing(layer, q, layer.weight, layer.bias),
                2,
            ),
            (
                "FP32LayerNorm.forward redirected",
                lambda: fp32_forward(fp32, q),
                lambda: nothing(fp32, q, fp32.weight, fp32.bias),
                2,
            ),
            (
                "diffusers RMSNorm.forward redirected",
                lambda: rms_forward(rms, q),
                lambda: nothing(rms, q, rms.weight, rms.bias),
                2,
            ),
            (
                "apply_rotary_emb redirected",
                lambda: rope(q, (cos, sin)),
                lambda: nothing(q, (cos, sin)),
                2,
            ),
        ]
        rows = added(
            [*falling_back, *((f"{what}, kernel a no-op", *rest) for what, *rest in redirected)],
            quick,
        )
        for name, kernel in real.items():
            setattr(native, name, kernel)
        mindiesd.unpatch_all()
    return rows


def layer_rows(quick: bool = False) -> list[Figure]:
    """The layer functions called directly, in every mode."""
    import torch

    from mindiesd.ops.backends import native

    torch.set_num_threads(1)

    def nothing(*args: object, **kwargs: object) -> None:
        return None

    real = {name: getattr(native, name) for name in _layer_calls.KERNELS}
    with torch.no_grad():
        for name in real:
            setattr(native, name, nothing)
        try:
            return added(_layer_calls.cases(nothing), quick)
        finally:
            for name, kernel in real.items():
                setattr(native, name, kernel)


def milliseconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=tempfile.gettempdir())
    return (time.perf_counter() - begin) * 1e3


def start_rows(rounds: int) -> list[Figure]:
    # An installed package is compiled already.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    launcher = Path(sys.executable).with_name("mindiesd-run")
    run = [str(launcher)] if launcher.exists() else [shutil.which("mindiesd-run") or "mindiesd-run"]
    bare = [sys.executable, "-c", "pass"]
    launched = [*run, sys.executable, "-c", "pass"]
    imported = [sys.executable, "-c", "import mindiesd"]
    importing = "`import mindiesd`, added to `python -c pass`"
    times: dict[str, list[float]] = {"bare": [], "launched": [], "imported": []}
    for _ in range(rounds):
        times["bare"].append(milliseconds(bare))
        times["launched"].append(milliseconds(launched))
        times["imported"].append(milliseconds(imported))
    middle = {name: statistics.median(values) for name, values in times.items()}
    code = """
import time, torch, diffusers, transformers
from diffusers import FluxPipeline
from transformers import CLIPTextModel
import mindiesd
begin = time.perf_counter()
mindiesd.patch_all()
print((time.perf_counter() - begin) * 1e3)
"""
    patching = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            ).stdout.split()[-1]
        )
        for _ in range(min(5, rounds))
    ]
    return [
        figure(
            importing,
            middle["imported"] - middle["bare"],
            30,
            "ms",
        ),
        figure(
            "`mindiesd-run python -c pass`, added to `python -c pass`",
            middle["launched"] - middle["bare"],
            150,
            "ms",
        ),
        figure(
            "`patch_all()` after importing diffusers and transformers",
            statistics.median(patching),
            300,
            "ms",
        ),
    ]


def pipeline_rows(rounds: int) -> list[Figure]:
    import torch
    from diffusers import DiffusionPipeline

    import mindiesd
    from examples.make_tiny_flux import build

    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        build(folder)
        pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def draw(steps: int = 4) -> float:
        generator = torch.Generator().manual_seed(0)
        begin = time.perf_counter()
        pipe("a red boat", num_inference_steps=steps, generator=generator, height=256, width=256)
        return time.perf_counter() - begin

    ratios, plain, patched = [], [], []
    for number in range(rounds):
        # Each order in turn: a machine that warms up or slows down favours neither.
        for patch in (number % 2 == 0, number % 2 == 1):
            if patch:
                mindiesd.patch_all()
            draw(1)  # patching and unpatching look at the whole heap and leave cold caches behind
            (patched if patch else plain).append(draw())
            mindiesd.unpatch_all()
        ratios.append(patched[-1] / plain[-1])
    what = "a tiny Flux pipeline, patched / unpatched"
    rows = [figure(what, statistics.median(ratios), 1.02, "×")]
    # What verify=N costs once its N calls are through: too little to be seen in the time of a
    # picture, so it is counted.
    migration = mindiesd.patch_all()
    draw()
    counted = migration.report().patches
    mindiesd.unpatch_all()
    calls = sum(patch.redirected + sum(patch.fell_back.values()) for patch in counted)
    each = verified_call(rounds)
    share = calls * each / (min(plain) * 1e6)
    what = "a call under `verify=1` whose line was verified before, added to one without"
    whole = "the same for all calls of that pipeline, with the time of a picture as 1"
    return [*rows, figure(what, each, 3.0, "µs"), figure(whole, 1 + share, 1.02, "×")]


def verified_call(rounds: int) -> float:
    """Microseconds that a verified line goes on costing; the worse of two kinds of call."""
    import torch

    import mindiesd

    x, norm = torch.randn(1, 2, 4, 8), torch.nn.LayerNorm(8)
    kinds: list[Callable[[], object]] = [
        lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        lambda: norm(x),
    ]
    best = {verify: [float("inf")] * len(kinds) for verify in (0, 1)}
    with torch.no_grad():
        for number in range(2 * rounds):
            mindiesd.patch_all(verify=number % 2)
            for place, kind in enumerate(kinds):
                kind()
                took = min(timeit.repeat(kind, number=2000, repeat=5)) / 2000 * 1e6
                best[number % 2][place] = min(best[number % 2][place], took)
            mindiesd.unpatch_all()
    return max(after - before for before, after in zip(best[0], best[1], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", type=Path, help="also write a page to this file")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved whole-program runs")
    parser.add_argument(
        "--quick", action="store_true", help="to see that it runs: the figures mean nothing"
    )
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    figures = [
        *call_rows(options.quick),
        *layer_rows(options.quick),
        *start_rows(rounds),
        *pipeline_rows(rounds),
    ]
    if options.json:
        options.json.write_text(figures_to_json(figures), encoding="utf-8")
    import torch

    page = f"""# Host overhead

What patching costs on a machine without an NPU: added host time per call, start-up, and a whole
pipeline. Made by `python scripts/bench_overhead.py` on {datetime.date.today().isoformat()}
({platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {
        torch.__version__
    }). Single calls compare minima of
alternating repetitions, whole programs medians of alternating runs.

{goals(figures)}
"""
    print(page)
    if options.write:
        options.write.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
