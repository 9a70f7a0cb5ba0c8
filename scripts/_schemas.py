#!/usr/bin/env python
"""Writes down which operators several releases of torch_npu have, and with which arguments.

    python scripts/_schemas.py 2.5.1 2.9.0 2.13.0      download the wheels and read them
    python scripts/_schemas.py some/torch_npu-….whl    read a wheel that is here

One file per release, ``tests/emulator/schemas/torch_npu-VERSION.json``, with the schemas of every
``npu::`` operator that the emulator knows or mindiesd calls (``null``: that release has none). A
release needs its own torch and cannot be imported beside another one; but the schemas are texts in
the wheel's libtorch_npu.so, and are read there. ``tests/emulator/test_inventory.py`` checks for the
installed release that this reading is what the dispatcher knows, and compares every call of
mindiesd with every file. Wheels are downloaded into a temporary directory and not kept.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "emulator" / "schemas"
LIBRARY = "torch_npu/lib/libtorch_npu.so"


class Call(NamedTuple):
    """One call of an operator in the source.

    Attributes:
        where: ``file:line``.
        operators: its name; several where the source chooses among them.
        positional: how many arguments are given by position; a starred one counts for three, which
            is what the attention calls unpack.
        keywords: the names of the others.
    """

    where: str
    operators: tuple[str, ...]
    positional: int
    keywords: frozenset[str]


def calls(package: Path = ROOT / "mindiesd") -> list[Call]:
    """Every call of an ``npu::`` operator in the package, the emulator's own aside.

    Raises:
        ValueError: an operator is used otherwise than called, so its arguments are not known.
    """
    found: list[Call] = []
    for path in sorted(package.rglob("*.py")):
        if package / "emulator" in path.parents:
            continue
        tree = ast.parse(path.read_text("utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        seen: set[ast.AST] = set()
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            operators = _operators(node.func, tree)
            if operators:
                seen.update(ast.walk(node.func))
                home = next((f for f in functions if node in set(ast.walk(f))), tree)
                found.append(_call(path, node, operators, home))
        for node in ast.walk(tree):
            if _is_namespace(node) and node not in seen and not _is_question(node, tree):
                raise ValueError(f"{path}:{node.lineno}: an npu operator that is not called here")
    return found


def _is_namespace(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops.npu"


def _is_question(node: ast.AST, tree: ast.AST) -> bool:
    """Whether this is ``hasattr(torch.ops.npu, …)``."""
    return any(
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "hasattr"
        and node in call.args
        for call in ast.walk(tree)
    )


def _operators(function: ast.AST, tree: ast.AST) -> tuple[str, ...]:
    if isinstance(function, ast.Attribute):
        if _is_namespace(function.value):
            return (function.attr,)
        # torch.ops.npu.name.overload
        inner = function.value
        if isinstance(inner, ast.Attribute) and _is_namespace(inner.value):
            return (inner.attr,)
    if (
        isinstance(function, ast.Call)
        and isinstance(function.func, ast.Name)
        and function.func.id == "getattr"
        and _is_namespace(function.args[0])
    ):
        # Chosen at run time: any that the module names.
        return tuple(sorted({text for text in _texts(tree) if re.fullmatch(r"npu_\w+", text)}))
    return ()


def _texts(tree: ast.AST) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _call(path: Path, node: ast.Call, operators: tuple[str, ...], home: ast.AST) -> Call:
    positional = sum(3 if isinstance(arg, ast.Starred) else 1 for arg in node.args)
    keywords: set[str] = set()
    for keyword in node.keywords:
        if keyword.arg is not None:
            keywords.add(keyword.arg)
        else:
            keywords |= _keys(ast.unparse(keyword.value), home)
    return Call(f"{path.name}:{node.lineno}", operators, positional, frozenset(keywords))


def _keys(name: str, home: ast.AST) -> set[str]:
    """The keys that a function ever puts into its dictionary ``name``."""
    keys: set[str] = set()
    for node in ast.walk(home):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == name:
            keys.update(_texts(node.slice))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == f"{name}.update":
            keys.update(keyword.arg for keyword in node.keywords if keyword.arg)
            for argument in node.args:
                # update(zip(names, …)) or update({…}): the texts in it and in what it names.
                keys.update(_texts(argument))
                named = {n.id for n in ast.walk(argument) if isinstance(n, ast.Name)}
                for other in ast.walk(home):
                    if isinstance(other, ast.Assign) and named & {
                        target.id for target in other.targets if isinstance(target, ast.Name)
                    }:
                        keys.update(text for text in _texts(other.value) if text.isidentifier())
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if node.value is not None and name in map(ast.unparse, targets):
                if isinstance(node.value, ast.Dict):
                    keys.update(t for key in node.value.keys if key for t in _texts(key))
                elif isinstance(node.value, ast.Call):
                    keys.update(k.arg for k in node.value.keywords if k.arg)
    return keys


def operators() -> list[str]:
    """The operators in question: those the emulator computes, and those that are called."""
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    from mindiesd.emulator import ops

    names = {name.partition(".")[0] for name in ops.TABLE}
    return sorted(names | {name for call in calls() for name in call.operators})


def read(library: bytes, names: Iterable[str]) -> dict[str, str | None]:
    """The schemas of ``names`` (without overload) as the library's code holds them, as text."""
    texts: dict[str, set[str]] = {name: set() for name in names}
    for match in re.finditer(rb"\) -> ", library):
        start = library.rfind(b"\0", 0, match.start()) + 1
        text = library[start : library.find(b"\0", start)].decode("ascii", "replace")
        name = text.partition("(")[0]
        if name in texts:
            texts[name].add(text)
    for name, several in texts.items():
        if len(several) > 1:
            raise ValueError(f"{name} has several schemas: {sorted(several)}")
    return {name: next(iter(several), None) for name, several in texts.items()}


def write(wheel: Path) -> Path:
    """Read a wheel and write its file."""
    version = wheel.name.split("-")[1]
    with zipfile.ZipFile(wheel) as archive:
        schemas = read(archive.read(LIBRARY), operators())
    data: dict[str, Any] = {
        "torch_npu": version,
        "made_by": f"python scripts/_schemas.py {version}",
        "wheel": wheel.name,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "schemas": schemas,
    }
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"torch_npu-{version}.json"
    path.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    return path


def _download(version: str, folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", folder, f"torch_npu=={version}"]
    subprocess.run(command, check=True)
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


def main() -> None:
    """Write the file of each release or wheel named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("releases", nargs="+", metavar="VERSION|WHEEL")
    for given in parser.parse_args().releases:
        if given.endswith(".whl"):
            print(write(Path(given)))
            continue
        with tempfile.TemporaryDirectory() as folder:
            print(write(_download(given, folder)))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
