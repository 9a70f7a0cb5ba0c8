"""Real models at real sizes, on paper: what they launch, and how long that takes at least.

    .venv-npu/bin/python scripts/_paper.py [--only NAME …] [--write docs/estimates.md]

The models run on the emulated device without weights or activations (mindiesd/emulator/outline.py),
unpatched and with ``patch_all()``. Launches, bytes and FLOPs are counted; the times are a roofline
of a device's public figures, and no measurement.
"""

from __future__ import annotations

import argparse
import platform
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from packaging.version import Version

OVERHEADS = (0, 5, 10)
"""Microseconds that a launch may cost beyond the work of its kernel."""


@dataclass
class Result:
    """One model, before and after.

    Attributes:
        subject: a ``_paper_models.Subject``.
        parameters: how many it has.
        before: its costs (``_costs.Costs``) unpatched.
        after: with ``patch_all()``.
        peaks: bytes of memory in use at once, before and after, weights included.
        redirected: calls that took the new path.
        fell_back: calls that did not, by patch and reason.
    """

    subject: Any
    parameters: int = 0
    before: Any = None
    after: Any = None
    peaks: list[int] = field(default_factory=list)
    redirected: int = 0
    fell_back: Counter[str] = field(default_factory=Counter)


def device() -> Any:
    """An Ascend 910B, by its public figures."""
    from _costs import Device

    return Device("Ascend 910B", flops=313e12, bandwidth=1.6e12, memory=64e9, single=4.0)


def forward(result: Result, migration: Any = None) -> Any:
    """The costs of the second call of a model.

    The first makes what is kept with parameters and positions.
    """
    import torch
    from _costs import costing
    from _paper_models import placed

    begin, subject = time.perf_counter(), result.subject
    npu: Any = torch.get_device_module("npu")
    model, result.parameters = placed(subject)
    inputs = subject.inputs()
    with torch.no_grad():
        subject.call(model, **inputs)
        if migration is not None:
            migration.forget_counts()
        npu.reset_peak_memory_stats()
        with costing() as counted:
            subject.call(model, **inputs)
    result.peaks.append(npu.max_memory_allocated())
    taken = time.perf_counter() - begin
    print(f"{subject.name}: {counted.total} launches, {taken:.0f} s", file=sys.stderr, flush=True)
    return counted


def results(only: list[str]) -> list[Result]:
    """Every model, or those whose names begin as asked."""
    from mindiesd import emulator

    emulator.start()
    from _paper_models import SUBJECTS

    import mindiesd
    from mindiesd.emulator.outline import outline

    chosen = [
        Result(subject)
        for subject in SUBJECTS
        if not only or any(subject.name.lower().startswith(name.lower()) for name in only)
    ]
    with outline():
        for result in chosen:
            result.before = forward(result)
        migration = mindiesd.patch_all()
        try:
            for result in chosen:
                result.after = forward(result, migration)
                report = migration.report()
                result.redirected = report.redirected
                for patch in report.patches:
                    for reason, count in patch.fell_back.items():
                        result.fell_back[f"`{patch.name}`: {reason}"] += count
        finally:
            mindiesd.unpatch_all()
    return chosen


def table(header: list[str], rows: list[list[str]], figures: bool = True) -> list[str]:
    """A Markdown table; with ``figures`` all columns but the first are numbers."""
    return [
        "| " + " | ".join(header) + " |",
        "|---|" + ("---:|" if figures else "---|") * (len(header) - 1),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def said(text: str) -> str:
    """A paragraph, as wide as the others in docs/."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


INTRODUCTION = """**Launches, bytes and FLOPs are counted. Times are estimates, and nothing here was
measured: mindiesd has not run on Ascend hardware.**"""

HOW = """Each model runs, at the size at which people use it, on the emulated device: through the
real torch_npu and its dispatcher, unpatched and with `patch_all()`. Weights and activations have a
shape and no values (`mindiesd/emulator/outline.py`). The second call is counted. Made by
`.venv-npu/bin/python scripts/_paper.py --write docs/estimates.md` with {versions}."""

SOURCES = """"From memory", and the published parameters: written down without looking them up. That
the counted and the published number of parameters agree is the check of the configuration."""

COUNTED = """GB moved: arguments and results of every launch, as docs/coverage.md counts them, with
the hidden copies of arguments that are not contiguous. GB at once: the most that torch_npu's
allocator had given out, weights included; **(!)**: more than the {memory:.0f} GB of one NPU, so the
model does not run there that way, and its times are of no use. TFLOP: matrix products,
convolutions and attention (2 B N Sq Skv (D + Dv), whatever is masked)."""

TOO_MUCH = """{name}, unpatched: its largest launch is `{launch}`, which writes {size:.0f} GB at
once. (torch_npu's `scaled_dot_product_attention` makes of every bool mask a full one of
B × N × Sq × Skv, however small it is.)"""

FIGURES = """For an {name} with {flops:.0f} TFLOP/s in half precision, a {single:g}th of that in
float32, and {bandwidth:g} TB/s. These figures are from memory and were not looked up for this page:
the first is Huawei's for the Atlas 800T A2 (2.5 PFLOPS of FP16 with 8 NPUs), the last that of one
die of an Ascend 910C (arXiv 2506.12708); the factor for float32 is a guess. Other variants of the
910B have others."""

RULE = """A launch takes max(FLOPs / peak, bytes / bandwidth), launches follow each other without
overlap, and each costs 0, 5 or 10 µs more. What it really costs is not known to us, so the columns
are a range to choose from."""

LIMITS = """What this leaves out: no kernel reaches the peak, small ones least of all; vector
arithmetic is taken to be free; the second-level cache is taken to keep nothing from one launch for
the next, which flatters fusing; host time that hides behind the device is in the columns with 5 and
10 µs. So the times are too short, and the gain is that of a device on which matrix products cost
nothing but their FLOPs: slower ones shrink it."""

SCALE = """For scale, one published measurement: Flux.1-dev at 1024 × 1024 on a 910B, 0.69 s a step
(cache-dit, pull request 1004; attention fused, the rest as unpatched). The estimate for the same is
{estimate:.2f} s."""

KIND = """By the operator's name: a norm that is launched in pieces is `elementwise` until it is
fused. What belongs to
which kind stands in `scripts/_costs.py`."""


def page(found: list[Result]) -> str:
    """The tables."""
    from _costs import KINDS

    ascend = device()
    names = ("torch", "torch_npu", "diffusers", "transformers")
    versions = ", ".join(f"{name} {Version(metadata.version(name)).public}" for name in names)
    counts, times, shares, reasons = [], [], [], []
    for result in found:
        subject, before, after = result.subject, result.before, result.after
        counts.append(
            [
                subject.name,
                f"{before.total} → {after.total}",
                f"{after.total / before.total:.0%}",
                f"{before.bytes / 1e9:.0f} → {after.bytes / 1e9:.0f}",
                f"{after.bytes / before.bytes:.0%}",
                " → ".join(
                    f"{peak / 1e9:.0f}{' **(!)**' if peak > ascend.memory else ''}"
                    for peak in result.peaks
                ),
                f"{before.flops / 1e12:.1f} → {after.flops / 1e12:.1f}",
                f"{result.redirected}",
                f"{result.fell_back.total()}",
            ]
        )
        row = [f"{subject.name}, one {subject.per}"]
        for overhead in OVERHEADS:
            first, second = (
                subject.forwards * one.seconds(ascend, overhead * 1e-6) for one in (before, after)
            )
            if result.peaks[0] > ascend.memory:
                row += [f"no memory → {second * 1e3:.0f}", "–"]
            else:
                row += [f"{first * 1e3:.0f} → {second * 1e3:.0f}", f"{first / second:.2f} ×"]
        times.append(row)
        first, second = before.by_kind(ascend), after.by_kind(ascend)
        shares.append(
            [
                subject.name,
                *(f"{first[kind] * 1e3:.1f} → {second[kind] * 1e3:.1f}" for kind in KINDS),
            ]
        )
        for reason, count in sorted(result.fell_back.items()):
            reasons.append([subject.name, str(count), reason])
    sizes = [
        [
            result.subject.name,
            result.subject.size,
            str(result.subject.dtype).removeprefix("torch."),
            f"{result.parameters / 1e9:.3g} × 10⁹",
            f"{result.subject.published:g} × 10⁹",
            str(result.subject.forwards),
            result.subject.source,
        ]
        for result in found
    ]
    figures = {
        "name": ascend.name,
        "flops": ascend.flops / 1e12,
        "single": ascend.single,
        "memory": ascend.memory / 1e9,
        "bandwidth": ascend.bandwidth / 1e12,
    }
    crowded = [
        said(TOO_MUCH.format(name=one.subject.name, launch=most.name, size=most.written / 1e9))
        for one in found
        if one.peaks[0] > ascend.memory
        for most in [max(one.before.each, key=lambda launch: launch.written)]
    ]
    flux = next((one for one in found if one.subject.name == "Flux.1-dev"), None)
    scale = [said(SCALE.format(estimate=flux.before.seconds(ascend))), ""] if flux else []
    wide = ["model", "size", "dtype", "parameters", "published", "calls a step", "configuration"]
    moved = ["model", "launches", "", "GB moved", "", "GB at once", "TFLOP"]
    moved += ["redirected", "fell back"]
    gains = ["", *(part for o in OVERHEADS for part in (f"+ {o} µs a launch", "gain"))]
    lines = [
        "# Real models, on paper",
        "",
        said(INTRODUCTION),
        "",
        said(HOW.format(versions=versions)),
        "",
        "## Sizes",
        "",
        *table(wide, sizes, figures=False),
        "",
        said(SOURCES),
        "",
        "## Counted, for one call",
        "",
        *table(moved, counts),
        "",
        said(COUNTED.format(**figures)),
        "",
        *(line for text in crowded for line in (text, "")),
        "## Estimated: the least time of a step, in ms",
        "",
        said(FIGURES.format(**figures)),
        "",
        said(RULE),
        "",
        *table(gains, times),
        "",
        said(LIMITS),
        "",
        *scale,
        "## Where the time goes, for one call, in ms (+ 0 µs)",
        "",
        *table(["model", *KINDS], shares),
        "",
        said(KIND),
        "",
        "## What fell back",
        "",
        *table(["model", "calls", "why"], reasons or [["none", "", ""]], figures=False),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names of models")
    parser.add_argument("--write", type=Path, help="also write the page to this file")
    options = parser.parse_args()
    if platform.system() != "Linux":
        parser.error("torch_npu has wheels for Linux only")
    text = page(results(options.only))
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
