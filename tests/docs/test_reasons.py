"""Every reason that the package can give has a line in docs/guides/fallbacks.md, and no other has.

The package is read, not run: what a function of ``mindiesd/patches`` returns, assigns to a name of
a reason or hands to ``Site.takes`` is followed to the text it is.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "mindiesd" / "patches"

# Files that give no reasons for calls or records: what they return are words of other kinds.
OTHER = {
    "report.py": "words of the report",
    "device.py": "notes on the device, which docs/device.md explains",
    "rewriting/pattern.py": "fingerprints",
    "attention_backend/contract.py": "what a backend's name promises",
    "registry.py": "ways to verify a record",
}
# Functions of mindiesd.ops whose answers are counted.
OPS = {
    "mindiesd/ops/attention.py": "refusal",
    "mindiesd/ops/norm.py": "group_norm_silu_refusal",
    "mindiesd/ops/backends/npu/norms.py": "group_norm_silu_refusal",
}
SKIPPING = ("_Skip", "SignatureChanged", "Unrecognised", "SourceUnknown")
COUNTING = ("takes", "fell_back", "gave_up")
# Texts that are passed on inside another, or are no reasons.
NO_REASONS = {
    "undecided": "stands for no decision yet, inside verify",
    "could not be built: …": "",
}


def reasons():
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return import_module("_reasons")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def listed(*tables) -> list[str]:
    return [reason.text for table in tables for group in table for reason in group.reasons]


class Texts:
    """The texts of one module that may become reasons."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            del parts[-1]
        self.module = import_module(".".join(parts))
        self.local = {
            alias.asname or alias.name: f"{node.module}.{alias.name}"
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }

    def constant(self, node: ast.expr) -> str | None:
        """The text of a constant in capitals, of this module or of one that it imports."""
        if isinstance(node, ast.Name) and re.fullmatch("_?[A-Z][A-Z0-9_]+", node.id):
            found = getattr(self.module, node.id, None)
            if found is None and node.id in self.local:
                home, _, name = self.local[node.id].rpartition(".")
                found = getattr(import_module(home), name, None)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            home = self.local.get(node.value.id, "")
            if not home.startswith("mindiesd.") or not node.attr.isupper():
                return None
            found = getattr(import_module(home), node.attr, None)
        else:
            return None
        return found if isinstance(found, str) else None

    def texts(self, node: ast.expr | None) -> Iterator[str]:
        """What an expression may be, as far as it is text; … for what is not known."""
        if isinstance(node, ast.IfExp):
            yield from self.texts(node.body)
            yield from self.texts(node.orelse)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                yield from self.texts(value)
        elif isinstance(node, ast.Tuple):
            for value in node.elts:
                yield from self.texts(value)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            shown = "".join(
                str(part.value)
                if isinstance(part, ast.Constant)
                else self.constant(part.value) or "…"
                for part in node.values
            )
            yield re.sub("…([: ]+…)+", "…", shown)
        elif node is not None:
            constant = self.constant(node)
            if constant is not None:
                yield constant

    def functions(self) -> Iterator[ast.FunctionDef]:
        yield from (node for node in ast.walk(self.tree) if isinstance(node, ast.FunctionDef))


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def found_in(path: Path, only: str = "") -> tuple[set[str], set[str]]:
    """Texts that may be counted, and texts by which a record is skipped."""
    module = Texts(path)
    counted: set[str] = set()
    skipped: set[str] = set()
    for function in module.functions():
        if only and function.name != only:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and "str" in ast.unparse(
                function.returns or ast.Constant("str")
            ):
                counted.update(module.texts(node.value))
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(_name(target) in ("reason", "found") for target in targets):
                    counted.update(module.texts(node.value))
            elif isinstance(node, ast.Call) and _name(node.func) in COUNTING:
                for argument in node.args:
                    counted.update(module.texts(argument))
            elif isinstance(node, ast.Call) and _name(node.func) == "Fault":
                counted.update(module.texts(node.args[0]))
            elif isinstance(node, ast.Call) and _name(node.func) in SKIPPING:
                skipped.update(module.texts(node.args[0]))
    return counted, skipped


@pytest.fixture(scope="module")
def package() -> set[str]:
    everything: set[str] = set()
    for path in sorted(PATCHES.rglob("*.py")):
        if path.relative_to(PATCHES).as_posix() not in OTHER:
            counted, skipped = found_in(path)
            # Names, paths and formats have no space in them; of the reasons, two have none.
            everything |= skipped
            everything |= {text for text in counted if " " in text or text in ("dropout", "causal")}
    for name, function in OPS.items():
        everything |= found_in(ROOT / name, function)[0]
    return everything


def test_print(package):
    r = reasons()
    known = set(listed(r.COUNTED, r.SKIPPED, r.UNJUDGED))
    print("MISSING", *sorted(package - known), sep="\n  ")
    print("STALE", *sorted(known - package), sep="\n  ")
