"""Runs every tiny model on the emulated NPU, unpatched and patched, and writes docs/coverage.md.

    .venv-npu/bin/python scripts/_coverage.py [--only NAME …] [--write docs/coverage.md]

Each figure is a count of the dispatcher's launches during one forward, so it is exact and the same
everywhere; the error is the largest difference from the same float32 model on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SOFTMAX = ("aten::_softmax", "aten::softmax.int", "aten::_safe_softmax")


@dataclass
class Run:
    """One forward on the device: its counts, or what went wrong."""

    launches: int = 0
    softmax: int = 0
    copies: int = 0
    casts: int = 0
    read: int = 0
    error: float = 0.0
    failed: str = ""


def measure(model: Any, inputs: Any, expected: Any) -> Run:
    """Forward ``model`` once under a trace and compare with ``expected``, the CPU's result."""
    import torch

    from mindiesd.emulator import trace
    from tests.emulator.tiny_models import first_tensor

    try:
        with torch.no_grad(), trace() as counted:
            got = first_tensor(model(**inputs))
    except (RuntimeError, ValueError, TypeError) as error:
        return Run(failed=f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
    difference = (got.cpu().double() - expected.double()).abs().max().item()
    return Run(
        launches=counted.total,
        softmax=sum(counted.launches[name] for name in SOFTMAX),
        copies=counted.layout_copies.total(),
        casts=counted.casts.total(),
        read=counted.bytes_read + counted.bytes_written,
        error=difference,
    )


@dataclass
class Row:
    """One model, before and after, and what the patches did."""

    name: str
    before: Run
    after: Run
    redirected: int
    fell_back: dict[str, int]


def rows(only: list[str]) -> list[Row]:
    """Every model of the tests, or those named."""
    import torch

    import mindiesd
    from mindiesd.emulator import start

    start()
    from tests.emulator.tiny_models import MODELS, first_tensor, move, without_torch_npu

    found = []
    for name, tiny in MODELS.items():
        if only and name not in only:
            continue
        model, inputs = tiny.build(), tiny.make_inputs()
        with torch.no_grad(), without_torch_npu():
            expected = first_tensor(model(**inputs))
        model = model.to("npu")
        there = move(inputs, lambda tensor: tensor.to("npu"))
        before = measure(model, there, expected)
        migration = mindiesd.patch_all()
        measure(model, there, expected)  # masks and parameters are prepared once
        migration.forget_counts()
        after = measure(model, there, expected)
        report = migration.report()
        mindiesd.unpatch_all()
        fell_back: dict[str, int] = {}
        for patch in report.patches:
            for reason, count in patch.fell_back.items():
                key = f"{patch.name}: {reason}"
                fell_back[key] = fell_back.get(key, 0) + count
        found.append(Row(name, before, after, report.redirected, fell_back))
        print(f"{name}: {before.launches} -> {after.launches}", file=sys.stderr, flush=True)
    return found


def page(found: list[Row]) -> str:
    """The table, with the sums above it."""
    versions = ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("torch", "torch_npu", "diffusers", "transformers")
    )
    both = [row for row in found if not row.before.failed and not row.after.failed]
    before = sum(row.before.launches for row in both)
    after = sum(row.after.launches for row in both)
    moved = sum(row.after.read for row in both) / sum(row.before.read for row in both)
    ran = sum(not row.after.failed for row in found)
    lines = [
        "# Coverage on the emulated NPU",
        "",
        "One forward of a tiny float32 configuration of each model, batch as in its test, on the",
        "emulated device: what the dispatcher launches unpatched → with `patch_all()`. Counts, not",
        "times. `error`: the largest difference from the same model on the CPU (the device",
        "computes erf GELU by its tanh form, up to 4.7e-4 away).",
        "",
        f"Made by `.venv-npu/bin/python scripts/_coverage.py --write docs/coverage.md` with "
        f"{versions}.",
        "",
        f"- models that run: {ran} of {len(found)}",
        f"- launches: {before} → {after}, {after / before:.1%} of unpatched",
        f"- softmax kernels: {sum(r.before.softmax for r in both)} → "
        f"{sum(r.after.softmax for r in both)}",
        f"- hidden layout copies: {sum(r.before.copies for r in both)} → "
        f"{sum(r.after.copies for r in both)}",
        f"- dtype casts: {sum(r.before.casts for r in both)} → {sum(r.after.casts for r in both)}",
        f"- bytes read and written: {moved:.1%} of unpatched",
        "",
        "| model | launches | % | softmax | copies | error unpatched | error | redirected | "
        "fell back |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in row.fell_back.items())
        if row.before.failed or row.after.failed:
            outcome = f"{row.before.failed or 'runs'} → {row.after.failed or 'runs'}"
            lines.append(
                f"| {row.name} | {outcome} | | | | | {row.after.error:.0e} | {row.redirected} | "
                f"{reasons} |"
            )
            continue
        b, a = row.before, row.after
        lines.append(
            f"| {row.name} | {b.launches} → {a.launches} | {a.launches / b.launches:.0%} | "
            f"{b.softmax} → {a.softmax} | {b.copies} → {a.copies} | {b.error:.0e} | "
            f"{a.error:.0e} | {row.redirected} | {reasons} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    parser.add_argument("--write", type=Path, help="also write the page to this file")
    options = parser.parse_args()
    text = page(rows(options.only))
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
