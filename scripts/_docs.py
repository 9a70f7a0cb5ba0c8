"""Writes the pages of docs/ that are generated.

docs/patches.md comes from the patch records, docs/specification.md from the tests named after the
statements of the layers API, docs/benchmarks.md with its charts from the runs in docs/benchmarks/.

python scripts/_docs.py            writes them
python scripts/_docs.py --check    fails when one is not up to date
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import _bench_page
import _history

from mindiesd.patches.registry import FAMILIES, records

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


PAGES = {"patches.md": patches_page, "specification.md": specification_page}


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
