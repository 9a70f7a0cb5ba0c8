"""Every reason that the package can give has a line in docs/guides/fallbacks.md, and no other has.

The package is read, not run: what a function of ``mindiesd/patches`` returns, assigns to a name of
a reason or hands to ``Site.takes`` is followed to the text it is.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib import import_module, util
from pathlib import Path

import pytest

from tests.processes import run_python

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
# Texts that come out of the same walk and are no reasons.
NO_REASONS = {"…… on …": "how verify describes a tensor"}


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
        if ROOT in path.parents:
            parts = path.relative_to(ROOT).with_suffix("").parts
            self.module = import_module(".".join(parts).removesuffix(".__init__"))
        else:
            spec = util.spec_from_file_location(path.stem, path)
            self.module = util.module_from_spec(spec)
            spec.loader.exec_module(self.module)
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
    return everything - set(NO_REASONS)


def covers(line: str, text: str) -> bool:
    """Whether a line of the page is about a text; … stands for anything."""
    return re.fullmatch(".+".join(map(re.escape, line.split("…"))), text) is not None


def test_every_reason_has_a_line(package):
    table = reasons()
    known = listed(table.COUNTED, table.SKIPPED, table.UNJUDGED)
    missing = {text for text in package if not any(covers(line, text) for line in known)}
    assert missing == set(), "add these to scripts/_reasons.py"


def test_no_line_is_without_a_reason(package):
    table = reasons()
    known = listed(table.COUNTED, table.SKIPPED, table.UNJUDGED)
    stale = {line for line in known if not any(covers(line, text) for text in package)}
    assert stale == set(), "the package no longer says these"


def test_no_line_is_about_everything():
    """Else a new reason would be covered by a line that says nothing of it."""
    table = reasons()
    for line in listed(table.COUNTED, table.SKIPPED, table.UNJUDGED):
        assert len(line.replace("…", "").split()) >= 2 or "…" not in line
        assert not covers(line, "something that nobody has written")


def test_lines_are_sentences():
    table = reasons()
    everything = [
        reason
        for part in (table.COUNTED, table.SKIPPED, table.UNJUDGED)
        for group in part
        for reason in group.reasons
    ]
    texts = [reason.text for reason in everything]
    assert len(set(texts)) == len(texts)
    for reason in everything:
        assert "|" not in "".join(reason), reason.text
        for sentence in (reason.means, reason.do):
            assert sentence
            assert sentence[0].isupper() or sentence[0] == "`", reason.text
            assert sentence[-1] not in ".;,", reason.text


def test_reasons_are_no_literals_where_they_are_counted():
    """What is counted has a name, so that it can be found; the walk above relies on it."""
    for path in sorted(PATCHES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _name(node.func) in COUNTING:
                for argument in node.args:
                    assert not isinstance(argument, (ast.Constant, ast.JoinedStr)) or (
                        argument.value in (None, True, False)
                    ), f"{path.name}:{node.lineno}"


def test_ops_whose_answers_are_counted_are_all_known():
    """Functions of mindiesd.ops that a patch asks for a refusal."""
    asked = set()
    for path in sorted(PATCHES.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr.endswith("refusal")
                and not node.func.attr.startswith("_")
            ):
                asked.add(node.func.attr)
    assert asked == set(OPS.values())


def test_the_walk_finds_what_is_there(tmp_path):
    """Each way to state a reason, in a file of this test."""
    path = tmp_path / "a_family.py"
    path.write_text(
        "from mindiesd.patches import law\n"
        "OWN = 'a reason of its own'\n"
        "def refusal(x) -> str | None:\n"
        "    reason = 'said at once' if x else None\n"
        "    if x == 2:\n"
        "        raise law.SignatureChanged(f'takes {x} of {x}')\n"
        "    site.takes(law.DROPOUT)\n"
        "    return reason or OWN\n"
    )
    counted, skipped = found_in(path)
    assert counted == {"a reason of its own", "said at once", "dropout"}
    assert skipped == {"takes … of …"}


CALLS = """
import torch
import torch.nn.functional as F
import mindiesd

migration = mindiesd.patch_all()
half = torch.ones(1, 2, 4, 8).half()
single = torch.ones(1, 2, 4, 8)
grown = torch.ones(1, 2, 4, 8, requires_grad=True)
F.scaled_dot_product_attention(single[0], single[0], single[0])
F.scaled_dot_product_attention(single, single, single, dropout_p=0.5)
F.scaled_dot_product_attention(single.double(), single.double(), single.double())
F.scaled_dot_product_attention(grown, single, single)
with torch.no_grad():
    F.rms_norm(single.double(), [8])
    F.rms_norm(single, [4, 8])
    F.gelu(single.double())
    torch.nn.LayerNorm(8).half()(half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.rms_norm(single, [8])
    try:
        F.scaled_dot_product_attention(single, half, half)
    except RuntimeError:
        pass
    torch.nn.Sequential(torch.nn.GroupNorm(1, 2), torch.nn.SiLU())(single)
reasons = {}
for patch in migration.report().to_dict()["patches"]:
    reasons |= patch["fell_back"]
print(*reasons, sep="\\n")
"""


def test_what_is_counted_in_a_run_is_on_the_page():
    shown = run_python(CALLS).stdout.splitlines()
    assert len(shown) >= 7, shown
    page = (ROOT / "docs" / "guides" / "fallbacks.md").read_text(encoding="utf-8")
    for reason in shown:
        assert f"| `{reason}` |" in page
