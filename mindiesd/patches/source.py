"""What a function's source says, as a short text: how a record knows that its target is unchanged.

Libraries copy small classes from file to file, a norm or a gate a hundred times, and now and then
one copy differs in a sign. Two functions whose digests are equal do the same, whatever file, class
or version they stand in: the digest is taken over the parsed source of the function and of the
methods of its class that it calls, without comments, docstrings and annotations
(:func:`mindiesd.patches.rewriting.pattern.fingerprint`). That the source is that of the code which
is loaded is proved as for functions that are rewritten (:mod:`mindiesd.patches.rewriting.source`).
"""

from __future__ import annotations

import ast
from importlib import import_module
from types import FunctionType
from typing import Any, NamedTuple

from mindiesd.patches import law
from mindiesd.patches.rewriting import source
from mindiesd.patches.rewriting.pattern import fingerprint


class Unrecognised(law.SignatureChanged):
    """The target's source is not one that its replacement was written for."""


class Method(NamedTuple):
    """What the source of a method says.

    Attributes:
        digest: sixteen hexadecimal digits for the method and for each part, the same for methods
            that are written alike, on every version of Python.
        parts: the methods of the same class that it calls on itself, by name. They are part of the
            digest, so a replacement must make sure that no subclass has others.
    """

    digest: str
    parts: tuple[tuple[str, Any], ...]


def read(function: Any, module: str, attribute: str) -> Method:
    """Read the source of ``module.Class.method``.

    Args:
        function: the method, a Python function.
        module: dotted name of the module that defines the class.
        attribute: ``"Class.method"``.

    Raises:
        Unrecognised: there is no source to read, or it is not that of the loaded code.
    """
    owner: Any = import_module(module)
    for name in attribute.split(".")[:-1]:
        owner = getattr(owner, name)
    tree = _parse(function)
    parts = {}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "self"
            and isinstance(vars(owner).get(node.func.attr), FunctionType)
        ):
            parts[node.func.attr] = vars(owner)[node.func.attr]
    trees = [tree, *map(_parse, parts.values())]
    return Method("-".join(map(fingerprint, trees)), tuple(parts.items()))


def _parse(function: Any) -> ast.FunctionDef:
    if not isinstance(function, FunctionType):
        raise Unrecognised("its source cannot be read: not a Python function")
    try:
        return source.read(function).tree
    except source.SourceUnknown as unknown:
        raise Unrecognised(f"its source cannot be read: {unknown}") from unknown
