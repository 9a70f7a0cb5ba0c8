"""Runs every tiny model on the emulated NPU, unpatched and patched, and writes docs/coverage.md.

    .venv-npu/bin/python scripts/_coverage.py [--only NAME …] [--write docs/coverage.md]

Each figure is a count of the dispatcher's launches during one forward, so it is exact and the same
everywhere; the error is the largest difference from the same float32 model on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import pkgutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import _matrix
import _seen

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass
class Run:
    """One forward on the device: its counts, or what went wrong."""

    launches: int = 0
    softmax: int = 0
    other_softmax: int = 0
    views: int = 0
    needed: int = 0
    slices: int = 0
    casts: int = 0
    read: int = 0
    error: float = 0.0
    failed: str = ""


def measure(model: Any, tiny: Any, expected: Any) -> Run:
    """Forward ``model`` once under a trace and compare with ``expected``, the CPU's result."""
    import torch
    from _counts import counting

    from tests.emulator.tiny_models import first_tensor, move

    inputs = move(tiny.make_inputs(), lambda tensor: tensor.to("npu"))
    try:
        with torch.no_grad(), counting() as counted:
            got = first_tensor(model(**inputs))
    except (RuntimeError, ValueError, TypeError) as error:
        return Run(failed=f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
    difference = (got.cpu().double() - expected.double()).abs().max().item()
    return Run(
        launches=counted.total,
        softmax=counted.softmaxes["attention"],
        other_softmax=counted.softmaxes["other"],
        views=counted.copies["view"],
        needed=counted.copies["needed"],
        slices=counted.copies["slice"] + counted.copies["repeat"],
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
    cells: dict[str, _matrix.Cell]


def rows(only: list[str]) -> list[Row]:
    """Every model of the tests, or those named."""
    import torch

    import mindiesd
    from mindiesd.emulator import start

    start()
    from tests.emulator.tiny_models import MODELS, first_tensor, without_torch_npu

    found = []
    for name, tiny in MODELS.items():
        if only and name not in only:
            continue
        model = tiny.build()
        with torch.no_grad(), without_torch_npu(), _seen.watching() as seen:
            expected = first_tensor(model(**tiny.make_inputs()))
        model = model.to("npu")
        before = measure(model, tiny, expected)
        migration = mindiesd.patch_all()
        measure(model, tiny, expected)  # what is kept with parameters and positions is made once
        migration.forget_counts()
        after = measure(model, tiny, expected)
        report = migration.report()
        cells = _matrix.cells(seen, *_matrix.outcomes(migration))
        mindiesd.unpatch_all()
        fell_back: dict[str, int] = {}
        for patch in report.patches:
            for reason, count in patch.fell_back.items():
                key = f"{patch.name}: {reason}"
                fell_back[key] = fell_back.get(key, 0) + count
        found.append(Row(name, before, after, report.redirected, fell_back, cells))
        print(f"{name}: {before.launches} -> {after.launches}", file=sys.stderr, flush=True)
    return found


def unknown() -> list[str]:
    """The model classes of the installed diffusers that no tiny model stands for."""
    import diffusers
    from diffusers import models

    from tests.emulator.tiny_models import MODELS

    for info in pkgutil.walk_packages(models.__path__, models.__name__ + "."):
        # Those for another framework, or for a package that is not installed.
        with contextlib.suppress(ImportError, RuntimeError):
            importlib.import_module(info.name)
    found: set[str] = set()
    kinds = [diffusers.ModelMixin]
    while kinds:
        for kind in kinds.pop().__subclasses__():
            kinds.append(kind)
            # LegacyModelMixin and its like have no forward of their own; nor a name outside.
            if kind.__module__.startswith(models.__name__) and hasattr(diffusers, kind.__name__):
                found.add(kind.__name__)
    return sorted(found - {tiny.cls for tiny in MODELS.values()})


def versions() -> str:
    """The packages that the figures depend on."""
    return ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("torch", "torch_npu", "diffusers", "transformers")
    )


def page(found: list[Row]) -> str:
    """The table, with the sums above it."""
    from tests.emulator.tiny_models import UNCONFIGURED

    both = [row for row in found if not row.before.failed and not row.after.failed]
    ran = sum(not row.after.failed for row in found)
    ran_before = sum(not row.before.failed for row in found)

    def total(what: str) -> str:
        first, second = (
            sum(getattr(run, what) for run in runs) for runs in zip(*pairs, strict=True)
        )
        return f"{first} → {second}"

    pairs = [(row.before, row.after) for row in both]
    before, after = (sum(run.launches for run in runs) for runs in zip(*pairs, strict=True))
    read, written = (sum(run.read for run in runs) for runs in zip(*pairs, strict=True))
    worse = [row.name for row in both if row.after.launches > row.before.launches]
    missing = unknown()
    lines = [
        "# Coverage on the emulated NPU",
        "",
        "One forward of a tiny float32 configuration of each model, batch as in its test, on the",
        "emulated device: what the dispatcher launches unpatched → with `patch_all()`. Counts, not",
        "times. `error`: the largest difference from the same model on the CPU (the device",
        "computes erf GELU by its tanh form, up to 4.7e-4 away). The forward counted is the second",
        "with patches: what is made from parameters once is not in it.",
        "",
        "`softmax`: kernels whose result is multiplied with values, which is attention in pieces;",
        "others, such as routers of a mixture of experts, are not in this column. The next three",
        "are arguments of fused kernels that are not contiguous: the vendor's library copies them",
        "first. `views`: dense memory in an order in which the call could have been made.",
        "`needed`: dense too, but innermost in another dimension, or query, key and value in",
        "different orders, of which one has to be copied in any layout. `slices`: parts of a",
        "larger tensor (one projection's q, k and v), whose row strides no layout can say.",
        "",
        f"Made by `.venv-npu/bin/python scripts/_coverage.py --write docs/coverage.md` with "
        f"{versions()}.",
        "",
        f"- models that run: {ran_before} → {ran} of {len(found)}",
        f"- launches: {before} → {after}, {after / before:.1%} of unpatched",
        f"- models with more launches than unpatched: {', '.join(worse) or 'none'}",
        f"- softmax kernels of attention: {total('softmax')}; others: {total('other_softmax')}",
        f"- hidden copies that another layout would have saved: {total('views')}",
        f"- hidden copies needed in any layout: {total('needed')}; of slices: {total('slices')}",
        f"- dtype casts: {total('casts')}",
        f"- bytes read and written: {written / read:.1%} of unpatched",
        f"- model classes of diffusers without a configuration: {len(missing)}",
        "",
        "| model | launches | % | softmax | views | needed | slices | error unpatched | error | "
        "redirected | fell back |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in row.fell_back.items())
        if row.before.failed or row.after.failed:
            outcome = f"{row.before.failed or 'runs'} → {row.after.failed or 'runs'}"
            lines.append(
                f"| {row.name} | {outcome} | | | | | | | {row.after.error:.0e} | "
                f"{row.redirected} | {reasons} |"
            )
            continue
        b, a = row.before, row.after
        lines.append(
            f"| {row.name} | {b.launches} → {a.launches} | {a.launches / b.launches:.0%} | "
            f"{b.softmax} → {a.softmax} | {b.views} → {a.views} | {b.needed} → {a.needed} | "
            f"{b.slices} → {a.slices} | "
            f"{b.error:.0e} | {a.error:.0e} | {row.redirected} | {reasons} |"
        )
    lines += ["", "Not measured:", "", "| class | why |", "|---|---|"]
    lines += [f"| {name} | {UNCONFIGURED.get(name, '**unknown**')} |" for name in missing]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    parser.add_argument("--write", type=Path, help="also write the page to this file")
    parser.add_argument("--matrix", type=Path, help="write the matrix of operations to this file")
    options = parser.parse_args()
    found = rows(options.only)
    text = page(found)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    if options.matrix:
        command = (
            ".venv-npu/bin/python scripts/_coverage.py --write docs/coverage.md "
            "--matrix docs/matrix.md"
        )
        models = [
            (
                row.name,
                f"{row.before.launches} → {row.after.launches}",
                row.cells,
                f"{row.after.error:.0e}",
            )
            for row in found
        ]
        options.matrix.write_text(_matrix.page(models, versions(), command), encoding="utf-8")


if __name__ == "__main__":
    main()
