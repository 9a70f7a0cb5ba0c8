"""Runs every tiny model on the emulated NPU, unpatched and patched, and writes docs/coverage.md.

    .venv-npu/bin/python scripts/_coverage.py [--only NAME …] [--write docs/coverage.md] [--json F]
    .venv-npu/bin/python scripts/_coverage.py --check [PAGE] [--only NAME …]

Each figure is a count of the dispatcher's launches during one forward, so it is exact and the same
everywhere; the error is the largest difference from the same float32 model on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import pkgutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import _matrix
from _fit import misfits
from _history import Figure, figures_to_json
from _runs import Row, rows
from packaging.version import Version

MATRIX = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"


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


def versions() -> dict[str, str]:
    """The packages that the figures depend on; whether torch was built for CUDA is no matter."""
    names = ("torch", "torch_npu", "diffusers", "transformers")
    return {name: Version(metadata.version(name)).public for name in names}


def page(found: list[Row]) -> str:
    """The table, with the sums above it."""
    from tests.emulator.tiny_models import UNCONFIGURED

    absent = [row for row in found if row.absent]
    found = [row for row in found if not row.absent]
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
        f"{', '.join(f'{name} {version}' for name, version in versions().items())}.",
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
    lines += [f"| {row.name} | {row.absent} |" for row in absent]
    return "\n".join(lines) + "\n"


def figures(found: list[Row]) -> list[Figure]:
    """The sums and each model's counts, for scripts/bench. Counts: any increase is a regression."""
    both = [row for row in found if not (row.absent or row.before.failed or row.after.failed)]

    def sums(what: str) -> tuple[int, int]:
        return (
            sum(getattr(row.before, what) for row in both),
            sum(getattr(row.after, what) for row in both),
        )

    ran = sum(not (row.absent or row.after.failed) for row in found)
    ran_before = sum(not (row.absent or row.before.failed) for row in found)
    sized = [
        Figure(name="models that run", value=ran, better="more", details={"unpatched": ran_before})
    ]
    for what, name, unit in (
        ("launches", "launches, of unpatched", "%"),
        ("read", "bytes read and written, of unpatched", "%"),
        ("softmax", "softmax kernels of attention", "launches"),
        ("views", "hidden copies that another layout would have saved", "copies"),
        ("needed", "hidden copies needed in any layout", "copies"),
        ("slices", "hidden copies of slices", "copies"),
        ("casts", "dtype casts", "launches"),
    ):
        before, after = sums(what)
        if unit == "%" and not before:
            continue
        value = 100 * after / before if unit == "%" else after
        details = {"unpatched": before, "patched": after}
        # A percentage that is the same is the same number; bytes may differ in the last digit.
        sized.append(Figure(name=name, value=value, unit=unit, slack=1e-9, details=details))
    for row in both:
        counted: dict[str, Any] = {
            "unpatched": row.before.launches,
            "bytes": [row.before.read, row.after.read],
            "copies": [run.views + run.needed + run.slices for run in (row.before, row.after)],
            "error": [row.before.error, row.after.error],
        }
        sized.append(
            Figure(
                name=f"launches of {row.name}",
                value=row.after.launches,
                unit="launches",
                details=counted,
            )
        )
    return sized


def command(page: Path) -> str:
    """What makes a page of the matrix."""
    if page.name == MATRIX.name:
        return (
            ".venv-npu/bin/python scripts/_coverage.py --write docs/coverage.md "
            "--matrix docs/matrix.md"
        )
    return f"scripts/_coverage.py --matrix docs/{page.name}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    parser.add_argument("--write", type=Path, help="also write the page to this file")
    parser.add_argument(
        "--json", type=Path, help="write the figures for scripts/bench to this file"
    )
    parser.add_argument("--matrix", type=Path, help="write the matrix of operations to this file")
    parser.add_argument(
        "--check",
        type=Path,
        nargs="?",
        const=MATRIX,
        help="fail where this page, docs/matrix.md if none is named, says something else",
    )
    options = parser.parse_args()
    found = rows(options.only)
    if options.check:
        told = options.check.read_text(encoding="utf-8")
        stale = _matrix.drift(told, found, versions())
        if not stale and not options.only:
            now = _matrix.page(found, misfits(), versions(), command(options.check))
            stale = [*difflib.unified_diff(*map(_matrix.comparable, (told, now)), lineterm="", n=0)]
        print("\n".join(stale) or f"{options.check} is up to date")
        return 1 if stale else 0
    text = page(found)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    if options.json:
        options.json.write_text(figures_to_json(figures(found)), encoding="utf-8")
    if options.matrix:
        told = _matrix.page(found, misfits(), versions(), command(options.matrix))
        options.matrix.write_text(told, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
