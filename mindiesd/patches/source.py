"""What a function's source says, as a short text: how a record knows that its target is unchanged.

Libraries copy small classes from file to file, a norm or a gate a hundred times, and now and then
one copy differs in a sign. Two functions whose digests are equal do the same, whatever file, class
or version they stand in: the digest is taken over the parsed source of the function and of the
methods of its class that it calls, without comments, docstrings and annotations
(:func:`mindiesd.patches.rewriting.pattern.fingerprint`).
"""

from __future__ import annotations

import ast
import inspect
import linecache
import textwrap
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from mindiesd.patches import law
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
        Unrecognised: there is no source to read.
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


def _parse(function: Any) -> ast.AST:
    # Not inspect.getsource: it looks through every loaded module first, and behind decorators, for
    # a function that is not the one that would be replaced.
    try:
        code = function.__code__
        lines = linecache.getlines(code.co_filename, function.__globals__)[
            code.co_firstlineno - 1 :
        ]
        try:
            tree = _tree(_indented(lines))
        except SyntaxError:
            tree = _tree(inspect.getblock(lines))
    except (AttributeError, IndexError, SyntaxError) as error:
        raise Unrecognised("its source cannot be read") from error
    if not isinstance(tree, ast.FunctionDef) or not _loaded(tree, code):
        raise Unrecognised("its source is not the code that is loaded")
    tree.decorator_list = []
    return tree


def _tree(lines: list[str]) -> ast.stmt:
    return ast.parse(textwrap.dedent("".join(lines))).body[0]


def _loaded(tree: ast.stmt, code: CodeType) -> bool:
    """Whether a definition is what the loaded code was made of: a file may have changed since.

    The instructions are not compared: CPython calls what a module imports by other ones.
    """
    made = compile(ast.Module([tree], []), code.co_filename, "exec", dont_inherit=True)
    for own in made.co_consts:
        if isinstance(own, CodeType) and own.co_name == code.co_name:
            return (own.co_names, own.co_varnames, _plain(own)) == (
                code.co_names,
                code.co_varnames,
                _plain(code),
            )
    return False


def _plain(code: CodeType) -> list[str]:
    return [repr(value) for value in code.co_consts if not isinstance(value, CodeType)]


def _indented(lines: list[str]) -> list[str]:
    """The lines up to the next statement that stands no deeper than the first.

    Many times faster than the tokenizer of ``inspect``. Where the layout is an unusual one, what is
    cut off makes the rest unreadable or gives a digest that nobody knows.
    """
    depth = len(lines[0]) - len(lines[0].lstrip())
    started = False
    for number, line in enumerate(lines):
        text = line.strip()
        if not text or len(line) - len(line.lstrip()) > depth:
            continue
        if started and text[0] not in ")#":
            return lines[:number]
        started = started or text.startswith("def ")
    return lines
