"""Writes the pages of docs/ that are generated.

docs/patches.md and its overview docs/guides/what_is_redirected.md come from the patch records,
docs/guides/fallbacks.md from scripts/_reasons.py, docs/specification.md from the tests named after
the statements of the layers API, docs/benchmarks.md with its charts from the runs in
docs/benchmarks/, the pictures of docs/guides/layouts_and_masks.md from scripts/_pictures.py.

python scripts/_docs.py            writes them
python scripts/_docs.py --check    fails when one is not up to date
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import _bench_page
import _history
import _pictures
import _reasons

from mindiesd.patches.registry import FAMILIES, Patch, left, records

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
SPECIFICATION = ("test_specification.py", "test_specification_fused.py")


def patches_page() -> str:
    """What is redirected and why, one section a family, one entry a record."""
    lines = [
        "# What is redirected, and why",
        "",
        "Generated from the patch records by `python scripts/_docs.py`; do not edit.",
        "",
        "`only=` and `skip=` (and `--only`, `--skip`) take the names of patches and of families.",
        "",
    ]
    for family in FAMILIES:
        lines += [f"## Family `{family}`", ""]
        for record in (record for record in records() if record.family == family):
            versions = ", ".join(f"{name} {spec}" for name, spec in record.requires.items())
            lines += [
                f"### `{record.name}`",
                "",
                f"`{record.target}` → `{record.becomes}`",
                "",
                f"- **Why:** {record.why}.",
                f"- **Which calls:** {record.when}. Every other call goes to the original and is "
                "counted with its reason.",
                f"- **Numerics:** {record.numerics}.",
                f"- **Versions:** {versions}.",
                "- **Undo:** the original object is put back at the target and at every module "
                "name, class attribute and default value that held it.",
            ]
            if record.provides:
                packages = ", ".join(f"`{name}`" for name in record.provides)
                lines.append(
                    f"- **Provided:** where {packages} is not installed, to the code that is run, "
                    "never to installed libraries. Undone, it can no longer be imported; names "
                    "that were imported go on working."
                )
            lines.append("")
    return "\n".join(lines)


def overview_page() -> str:
    """What is redirected, a family at a time: the guide to docs/patches.md."""
    everything = left()
    lines = [
        "# What is redirected and why",
        "",
        "<!-- Generated from the patch records by `python scripts/_docs.py`; do not edit. -->",
        "",
        f"{len(records())} functions and methods are redirected, in {len(FAMILIES)} families. A "
        "call is taken only where the result is provably right; the rest goes to the original. "
        "[patches.md](../patches.md) has each patch: target, versions, numerics, undo. "
        "[matrix.md](../matrix.md) says it model by model.",
        "",
        "`only=` and `skip=` (and `--only`, `--skip`) take the names of families and of patches:",
        "",
        "```bash",
        "mindiesd-run --skip rope,activation -c 'print(\"in place of this, your script\")'",
        "```",
        "",
        "| family | patches | in |",
        "|---|---|---|",
    ]
    by_family = {
        family: [record for record in records() if record.family == family] for family in FAMILIES
    }
    for family, patches in by_family.items():
        packages = dict.fromkeys(record.module.partition(".")[0] for record in patches)
        lines.append(f"| [`{family}`](#{family}) | {len(patches)} | {', '.join(packages)} |")
    for family, patches in by_family.items():
        lines += ["", f"## `{family}`", ""]
        lines += [_about(family), ""]
        lines += _reasons_for(patches)
        if any(record.by_name_only for record in patches):
            names = ", ".join(f"`{record.name}`" for record in patches if record.by_name_only)
            lines += ["", f"Only where `only=` names it: {names}."]
        options = dict.fromkeys(record.option for record in patches if record.option)
        for option in options:
            lines += ["", f"Only with `patch_all({option}=…)` or `--{option}`."]
        if family in everything:
            lines += ["", "Looked at and left alone:", ""]
            grouped: dict[str, list[str]] = {}
            for target, reason in everything[family]:
                grouped.setdefault(reason, []).append(target)
            lines += [f"- {reason}: {_some(targets)}." for reason, targets in grouped.items()]
    return "\n".join([*lines, ""])


def _about(family: str) -> str:
    """The first sentence of what the family's module says of itself, as Markdown."""
    patches = ROOT / "mindiesd" / "patches"
    places = (f"{family}.py", f"{family}/__init__.py", f"front_doors/{family}.py")
    home = next(patches / place for place in places if (patches / place).exists())
    text = ast.get_docstring(ast.parse(home.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`")


def _reasons_for(patches: list[Patch]) -> list[str]:
    """What the patches of a family become and why, those alike together."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for record in patches:
        grouped.setdefault((record.becomes, record.why), []).append(record.target)
    return [
        f"- → `{becomes}`: {why}. *{_some(targets)}*" for (becomes, why), targets in grouped.items()
    ]


def _some(targets: list[str]) -> str:
    """Up to three targets, those with a class by that."""
    shown = []
    for target in targets[:3]:
        parts = target.split(".")
        short = parts[-2:] if parts[-2][:1].isupper() else parts[-1:]
        plain = len(short) == 1 and not short[0][:1].isupper()
        shown.append(f"`{target if plain else '.'.join(short)}`")
    more = len(targets) - 3
    return ", ".join(dict.fromkeys(shown)) + (f" and {more} more" if more > 0 else "")


def specification_page() -> str:
    """Every statement of the layers API beside the test that holds it to it."""
    lines = [
        "# The layers API, statement by statement",
        "",
        "Generated from the tests by `python scripts/_docs.py`; do not edit. Run one with "
        "`pytest tests/ops/<file>::<test>`.",
        "",
    ]
    for name in SPECIFICATION:
        tree = ast.parse((ROOT / "tests" / "ops" / name).read_text(encoding="utf-8"))
        for group in tree.body:
            if not isinstance(group, ast.ClassDef):
                continue
            lines += [f"## {ast.get_docstring(group)}", "", "| statement | test |", "|---|---|"]
            for test in group.body:
                if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                    statement = " ".join((ast.get_docstring(test) or "").split())
                    if not statement:
                        raise SystemExit(f"{name}: {test.name} states nothing")
                    shown = statement.replace("|", "\\|")
                    lines.append(f"| {shown} | `{name}::{group.name}::{test.name}` |")
            lines.append("")
    return "\n".join(lines)


PAGES = {
    "patches.md": patches_page,
    "specification.md": specification_page,
    "guides/what_is_redirected.md": overview_page,
    "guides/fallbacks.md": _reasons.page,
    "guides/layouts.svg": _pictures.layouts,
    "guides/masks.svg": _pictures.masks,
}


def main() -> int:
    """Write the pages, or say which are stale."""
    stale = []
    pages = {DOCS / name: build() for name, build in PAGES.items()}
    if _history.history():
        pages |= _bench_page.files()
    for path, text in pages.items():
        if "--check" in sys.argv[1:]:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                stale.append(path.name)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"not up to date: {', '.join(stale)}; run python scripts/_docs.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
