"""Comparing syntax trees: patterns with named holes, fingerprints, and what is evaluated when.

A pattern is an expression, or several statements, in which every name in capitals is a hole:
``X + GATE * Y``. It matches by structure; only positions, contexts and type comments are left out
of the comparison.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

# Methods of a tensor that do nothing but look at it, or make a new tensor of it.
_READING = frozenset(
    {"unsqueeze", "squeeze", "float", "to", "type_as", "tanh"}
    | {"view", "reshape", "flatten", "expand", "index_select", "chunk", "unbind"}
)


@dataclass
class Match:
    """Where a pattern fits.

    Attributes:
        holes: what stands in each hole, at its first place.
        places: the holes by the identity of every node that stands in one.
        inner: identities of the nodes that are the pattern's own, not a hole's.
    """

    holes: dict[str, ast.expr]
    places: dict[int, str]
    inner: set[int]


@cache
def parse(text: str) -> ast.expr:
    """The tree of a pattern; every use shares it, so it must not be changed."""
    return ast.parse(text, mode="eval").body


@cache
def parse_statements(text: str) -> tuple[ast.stmt, ...]:
    """The trees of a pattern of several statements, shared likewise."""
    return tuple(ast.parse(text).body)


def is_hole(node: ast.AST) -> bool:
    """Whether a node of a pattern is a hole."""
    return isinstance(node, ast.Name) and node.id.isupper()


def match(pattern: ast.AST, node: ast.AST) -> Match | None:
    """Fit a pattern to a node; None if it does not."""
    found = Match({}, {}, set())
    return found if _fits(pattern, node, found) else None


def match_all(patterns: Sequence[ast.AST], nodes: Sequence[ast.AST]) -> Match | None:
    """Fit as many patterns to as many nodes; a hole is the same in all of them."""
    found = Match({}, {}, set())
    return found if _fits([*patterns], [*nodes], found) else None


def _fits(pattern: object, node: object, found: Match) -> bool:
    if isinstance(pattern, ast.Name) and is_hole(pattern):
        if not isinstance(node, ast.expr):
            return False
        before = found.holes.setdefault(pattern.id, node)
        found.places[id(node)] = pattern.id
        return before is node or fingerprint(before) == fingerprint(node)
    if isinstance(pattern, ast.AST):
        if type(pattern) is not type(node):
            return False
        found.inner.add(id(node))
        return all(
            _fits(getattr(pattern, name, None), getattr(node, name, None), found)
            for name in pattern._fields
            if name not in ("ctx", "type_comment", "kind")
        )
    if isinstance(pattern, list):
        return (
            isinstance(node, list)
            and len(pattern) == len(node)
            and all(_fits(one, other, found) for one, other in zip(pattern, node, strict=True))
        )
    return type(pattern) is type(node) and pattern == node


def fingerprint(node: ast.AST) -> str:
    """Sixteen hexadecimal digits of what a tree does; the same on every version of Python.

    Left out: positions, type comments, annotations, docstrings, and fields that are empty.
    """
    return hashlib.sha256(_written(node).encode()).hexdigest()[:16]


def _written(value: object) -> str:
    if isinstance(value, ast.AST):
        parts = []
        for name in value._fields:
            if name in ("ctx", "type_comment", "kind", "annotation", "returns"):
                continue
            field = getattr(value, name, None)
            if name == "body" and isinstance(field, list):
                field = [entry for entry in field if not _is_docstring(entry)]
            constant = isinstance(value, ast.Constant) and name == "value"
            if (field is None or field == []) and not constant:
                continue
            parts.append(f"{name}={_written(field)}")
        return f"{type(value).__name__}({','.join(parts)})"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return f"{type(value).__name__}:{value!r}"


def _is_docstring(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def is_plain(node: ast.AST | None) -> bool:
    """Whether evaluating this changes nothing, so that it may as well be evaluated a bit earlier.

    Names, attributes, constants, subscripts of those, and methods that only read a tensor.
    """
    if node is None or isinstance(node, (ast.Constant, ast.Name)):
        return True
    if isinstance(node, (ast.Attribute, ast.Starred)):
        return is_plain(node.value)
    if isinstance(node, ast.Subscript):
        return is_plain(node.value) and is_plain(node.slice)
    if isinstance(node, ast.Slice):
        return is_plain(node.lower) and is_plain(node.upper) and is_plain(node.step)
    if isinstance(node, ast.Tuple):
        return all(map(is_plain, node.elts))
    if isinstance(node, ast.UnaryOp):
        return is_plain(node.operand)
    if isinstance(node, ast.BinOp):
        return is_plain(node.left) and is_plain(node.right)
    if isinstance(node, ast.Call):
        return reads(node) and is_plain(node.func.value)  # type: ignore[attr-defined]
    return False


def reads(node: ast.Call) -> bool:
    """Whether a call is of a method that only reads a tensor, with plain arguments."""
    return (
        isinstance(node.func, ast.Attribute)
        and node.func.attr in _READING
        and all(map(is_plain, node.args))
        and all(is_plain(keyword.value) for keyword in node.keywords)
    )


def evaluated(node: ast.AST, among: dict[int, str]) -> Iterator[str]:
    """The names of the marked nodes in the order in which Python evaluates them.

    Args:
        node: an expression of names, attributes, calls, subscripts and arithmetic.
        among: the name of each marked node, by its identity. What is inside one is not looked at.
    """
    if id(node) in among:
        yield among[id(node)]
        return
    # Fields of these kinds of expression are in the order of evaluation.
    for child in ast.iter_child_nodes(node):
        yield from evaluated(child, among)
