"""Sparse attention on the CPU: time and memory against dense SDPA, and quality against chance.

Dense and sparse calls alternate in one process on the same tensors, with two threads. Two ratios
are given: of the smallest wall times, and of the smallest processor times. Other work on the
machine makes dense SDPA's threads wait for each other and flatters the first; a goal counts as met
when both meet it. Estimating the blocks and rearranging the tokens are part of every call.

    python scripts/bench_sparse.py [--quick] [--json FILE] [--write docs/sparse_benchmark.md]

scripts/bench runs this and the other measurements, and keeps the figures.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _history import Figure, figures_to_json

ROOT = Path(__file__).resolve().parent.parent

THREADS = 2
DIM = 128
LATENTS = {4096: (4, 32, 32), 8192: (8, 32, 32), 16384: (16, 32, 32)}
SHARES = (0.5, 0.75, 0.9)
TYPES = ("rf_v2", "ada_bsa")


def tensors(length: int, heads: int, dtype: str):
    import torch

    generator = torch.Generator().manual_seed(0)
    # Drawn in their dtype: a float32 draft would leave memory behind that hides what a call takes.
    empty = [torch.empty(1, heads, length, DIM, dtype=getattr(torch, dtype)) for _ in range(3)]
    return [x.normal_(generator=generator) for x in empty]


def calls(length: int, heads: int, dtype: str) -> dict[str, Callable[[], object]]:
    import torch

    import mindiesd

    q, k, v = tensors(length, heads, dtype)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    found: dict[str, Callable[[], object]] = {"dense": lambda: sdpa(q, k, v)}
    for kind in TYPES:
        for share in SHARES:
            found[f"{kind} {share}"] = lambda kind=kind, share=share: mindiesd.sparse_attention(
                q, k, v, sparse_type=kind, sparsity=share, latent_shape_q=LATENTS[length]
            )
    return found


def case(length: int, heads: int, dtype: str, kind: str, share: float) -> str:
    return f"{kind} {share:g}, S={length}, {heads} heads, {dtype}"


def speed(length: int, heads: int, dtype: str, rounds: int) -> list[Figure]:
    import torch

    torch.set_num_threads(THREADS)
    best: dict[str, list[float]] = {}
    with torch.inference_mode():
        every = calls(length, heads, dtype)
        for name, call in every.items():
            call()
            best[name] = [float("inf"), float("inf")]
        for _ in range(rounds):
            for name, call in every.items():
                wall, spent = time.perf_counter(), time.process_time()
                call()
                wall, spent = time.perf_counter() - wall, time.process_time() - spent
                best[name] = [min(best[name][0], wall), min(best[name][1], spent)]
    rows = []
    for kind in TYPES:
        for share in SHARES:
            goal = 0.8 / (1 - share)
            by_wall, by_cpu = (
                best["dense"][which] / best[f"{kind} {share}"][which] for which in (0, 1)
            )
            rows.append(
                Figure(
                    name=f"faster than dense: {case(length, heads, dtype, kind, share)}",
                    value=min(by_wall, by_cpu),
                    unit="×",
                    better="more",
                    goal=goal,
                    tolerance=0.15,
                    details={
                        "table": "time",
                        "shape": [length, heads, dtype],
                        "strategy": [kind, share],
                        "dense_ms": best["dense"][0] * 1e3,
                        "sparse_ms": best[f"{kind} {share}"][0] * 1e3,
                        "wall": by_wall,
                        "processor": by_cpu,
                    },
                )
            )
    return rows


_CHILD = """
import sys, torch
sys.path[:0] = [{root!r}, {root!r} + "/scripts"]
import bench_sparse as bench
torch.set_num_threads(bench.THREADS)

def memory(kind):
    for line in open("/proc/self/status"):
        if line.startswith(kind):
            return int(line.split()[1])

with torch.inference_mode():
    # Libraries, threads, and the buffers that MKL keeps for products of some width, once a
    # process, are not what is asked for.
    warm = bench.calls(4096, 1, {dtype!r})
    for name in ({name!r}, {name!r}.split()[0] + " 0.5", {name!r}):
        warm.get(name, warm[{name!r}])()
    del warm
    before = memory("VmRSS")
    # The peak so far, of importing, is forgotten; getrusage's would even be the parent's.
    open("/proc/self/clear_refs", "w").write("5")
    every = bench.calls({length}, {heads}, {dtype!r})
    every[{name!r}]()
print(memory("VmHWM") - before)
"""


def peak(length: int, heads: int, dtype: str, name: str) -> float:
    """MiB that a process grows by when it makes the tensors and calls once."""
    code = _CHILD.format(root=str(ROOT), length=length, heads=heads, dtype=dtype, name=name)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) / 1024


def memory(length: int, heads: int, dtype: str) -> list[Figure]:
    dense = peak(length, heads, dtype, "dense")
    rows = []
    for kind in TYPES:
        for share in (SHARES[0], SHARES[-1]):
            sparse = peak(length, heads, dtype, f"{kind} {share}")
            rows.append(
                Figure(
                    name=f"memory of dense: {case(length, heads, dtype, kind, share)}",
                    value=sparse / dense,
                    unit="×",
                    goal=1.1,
                    slack=0.08,
                    details={
                        "table": "memory",
                        "shape": [length, heads, dtype],
                        "strategy": [kind, share],
                        "dense_mib": dense,
                        "sparse_mib": sparse,
                    },
                )
            )
    return rows


def quality() -> list[Figure]:
    """Relative error of the output on attention that is local, with sinks: docs/sparse.md."""
    import torch

    import mindiesd
    from mindiesd.ops.sparse import kernel
    from mindiesd.ops.sparse.rearrange import sequence_order
    from mindiesd.ops.sparse.selection import Selection, blocks_of, kept, largest
    from tests.video import local_video

    torch.set_num_threads(THREADS)
    latent = (6, 32, 32)
    q, k, v = local_video(latent, 2, 64)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    order = sequence_order(latent, 0, False, q.device)
    rows = []
    for share in (0.25, 0.5, 0.75, 0.8, 0.9, 0.95):
        blocks = blocks_of(q.shape[2])
        dice = torch.rand(1, 2, blocks, blocks, generator=torch.Generator().manual_seed(0))
        chance = Selection(largest(dice, kept(blocks, share)), order, order)
        results = [
            mindiesd.sparse_attention(
                q, k, v, sparse_type=kind, sparsity=share, latent_shape_q=latent
            )
            for kind in TYPES
        ]
        results.append(kernel.over_blocks(q, k, v, chance, q.shape[-1] ** -0.5))
        errors = [((out - dense).norm() / dense.norm()).item() for out in results]
        rows += [
            Figure(
                name=f"relative error: {kind} {share:g}",
                value=error,
                tolerance=0.02,
                slack=0.002,
                details={"table": "quality", "strategy": [kind, share]},
            )
            for kind, error in zip((*TYPES, "random"), errors, strict=True)
        ]
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def of(figures: list[Figure], name: str) -> list[Figure]:
    return [figure for figure in figures if figure.details["table"] == name]


def cells(figure: Figure) -> list[str]:
    length, heads, dtype = figure.details["shape"]
    kind, share = figure.details["strategy"]
    return [str(length), str(heads), dtype, kind, f"{share:g}"]


def met(figure: Figure) -> str:
    return "yes" if figure.met else "**no**"


def times_table(figures: list[Figure]) -> str:
    header = ["S", "heads", "dtype", "strategy", "sparsity"]
    header += ["dense", "sparse", "wall", "processor", "goal", "met"]
    rows = []
    for figure in of(figures, "time"):
        known = figure.details
        rows.append(
            [
                *cells(figure),
                f"{known['dense_ms']:.0f} ms",
                f"{known['sparse_ms']:.0f} ms",
                f"{known['wall']:.2f} ×",
                f"{known['processor']:.2f} ×",
                f"{figure.goal:.1f} ×",
                met(figure),
            ]
        )
    return table(header, rows)


def memory_table(figures: list[Figure]) -> str:
    header = ["S", "heads", "dtype", "strategy", "sparsity", "dense", "sparse", "ratio", "≤ 1.1"]
    rows = [
        [
            *cells(figure),
            f"{figure.details['dense_mib']:.1f} MiB",
            f"{figure.details['sparse_mib']:.1f} MiB",
            f"{figure.value:.3f} ×",
            met(figure),
        ]
        for figure in of(figures, "memory")
    ]
    return table(header, rows)


def quality_table(figures: list[Figure]) -> str:
    kinds = [*TYPES, "random"]
    errors: dict[float, dict[str, str]] = {}
    for figure in of(figures, "quality"):
        kind, share = figure.details["strategy"]
        errors.setdefault(share, {})[kind] = f"{figure.value:.3f}"
    rows = [[f"{share:g}", *(found[kind] for kind in kinds)] for share, found in errors.items()]
    return table(["sparsity", *kinds], rows)


def page(figures: list[Figure], rounds: int, date: str, load: float) -> str:
    import torch

    machine = f"{platform.machine()}, {os.cpu_count()} cores, {THREADS} threads"
    machine += f", torch {torch.__version__}, load {load:.1f} when it ended"
    return f"""# Sparse attention, measured

Made by `python scripts/bench_sparse.py --write docs/sparse_benchmark.md` on {date}
({machine}).
Head dimension {DIM}, batch 1. Time ratios are of minima over {rounds} interleaved rounds.

## Time

{times_table(figures)}

## Memory

What a process grows by for the tensors, the result and everything in between.

{memory_table(figures)}

## Quality

Relative error of the output against dense attention, on queries and keys whose attention is local
in t, h and w, with a few sinks (`tests/video.py`); the values are independent noise, so nothing is
gained from neighbours being alike. "Random" keeps as many blocks of the same tokens.

{quality_table(figures)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", type=Path, help="also write the page to this file")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved repetitions")
    parser.add_argument("--quick", action="store_true", help="one small shape, one round")
    options = parser.parse_args()
    shapes = [
        (length, heads, dtype)
        for dtype in ("float32", "bfloat16")
        for length, heads in ((8192, 2), (8192, 8), (16384, 2))
    ]
    rounds = options.rounds
    if options.quick:
        shapes, rounds = [(4096, 1, "float32")], 1
    figures: list[Figure] = []
    for number, shape in enumerate(shapes, 1):
        figures += speed(*shape, rounds)
        figures += memory(*shape)
        length, heads, dtype = shape
        done = f"S={length}, {heads} heads, {dtype} measured ({number} of {len(shapes)})"
        print(done, file=sys.stderr, flush=True)
    figures += quality()
    if options.json:
        options.json.write_text(figures_to_json(figures), encoding="utf-8")
    today = datetime.date.today().isoformat()
    text = page(figures, rounds, today, os.getloadavg()[0])
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
