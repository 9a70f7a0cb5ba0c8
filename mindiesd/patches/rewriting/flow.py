"""What a function's statements do with its names, and copies of parts of its tree."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mindiesd.patches.rewriting import pattern


def at(node: ast.expr, where: ast.AST) -> Any:
    """``node`` with the line and column of ``where``."""
    return ast.copy_location(node, where)


def suites(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements, outer ones first; not those of nested scopes."""
    for name in ("body", "orelse", "finalbody"):
        suite = getattr(tree, name, None)
        if isinstance(suite, list) and suite and isinstance(suite[0], ast.stmt):
            yield suite
            for statement in suite:
                if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    yield from suites(statement)
    for handler in getattr(tree, "handlers", ()):
        yield from suites(handler)


def assigned(statement: ast.stmt) -> tuple[str | None, ast.expr]:
    """The one name that a statement assigns, and the value."""
    if (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
    ):
        return statement.targets[0].id, statement.value
    return None, ast.Constant(None)


def names(node: ast.AST) -> Iterator[ast.Name]:
    """Every name in ``node``, those of nested scopes as well."""
    return (child for child in ast.walk(node) if isinstance(child, ast.Name))


def may_cross(value: ast.expr, statement: ast.stmt) -> bool:
    """Whether ``value`` may be evaluated after ``statement`` instead of before it.

    Only past an assignment to a name that the value does not read, of plain expressions and
    results of other modules of ``self``, or sums and products of such.
    """
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return False
    (target,) = statement.targets
    # `shift, scale = emb.chunk(2)` as well.
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    if not all(isinstance(part, ast.Name) for part in parts):
        return False
    changed = {node.id for node in names(target)}
    return changed.isdisjoint(node.id for node in names(value)) and _calm(statement.value)


def _calm(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _calm(node.left) and _calm(node.right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "self":
            return all(map(pattern.is_plain, node.args)) and not node.keywords
        if pattern.reads(node):
            return _calm(owner)
    return pattern.is_plain(node)


def dead(tree: ast.FunctionDef, statement: ast.stmt, name: str) -> bool:
    """Whether no path from after ``statement`` reads ``name`` before assigning it."""
    path = _path(tree, statement)
    if path is None or _captured(tree, name):
        return False
    for owner, suite, index in reversed(path):
        for later in suite[index + 1 :]:
            if _needs(later, name):
                return False
            if assigned(later)[0] == name or isinstance(later, (ast.Return, ast.Raise)):
                return True
        if not isinstance(owner, (ast.If, ast.With, ast.FunctionDef)):
            return False  # a loop comes round again, and a handler may be entered from anywhere
    return True


def _needs(statement: ast.stmt, name: str) -> bool:
    """Whether ``name`` is read or deleted anywhere in a statement; ``name += 1`` reads it."""
    return any(
        (isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Store))
        or (
            isinstance(node, ast.AugAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id == name
        )
        for node in ast.walk(statement)
    )


def _captured(tree: ast.FunctionDef, name: str) -> bool:
    """Whether a nested function may read ``name``, whenever it is called."""
    return any(
        node is not tree
        and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef))
        and any(inner.id == name for inner in names(node))
        for node in ast.walk(tree)
    )


def _path(
    tree: ast.AST, statement: ast.stmt
) -> Sequence[tuple[ast.AST, list[ast.stmt], int]] | None:
    """The statements around one, outermost first: owner, suite and position in it."""
    for name in ("body", "orelse", "finalbody", "handlers"):
        suite = getattr(tree, name, None)
        if not isinstance(suite, list):
            continue
        for index, child in enumerate(suite):
            if child is statement:
                return [(tree, suite, index)]
            deeper = _path(child, statement)
            if deeper is not None:
                return [(tree, suite, index), *deeper]
    return None


# The branches of a condition.


def branches(condition: ast.If) -> Iterator[list[ast.stmt]]:
    """The statements of every branch; those of ``elif`` are branches of the condition too."""
    yield condition.body
    if len(condition.orelse) == 1 and isinstance(condition.orelse[0], ast.If):
        yield from branches(condition.orelse[0])
    elif condition.orelse:
        yield condition.orelse


def append(condition: ast.If, statement: ast.stmt) -> None:
    """Let every branch end with a copy of the statement; after a ``return`` it is never reached."""
    condition.body.append(copy.deepcopy(statement))
    if len(condition.orelse) == 1 and isinstance(condition.orelse[0], ast.If):
        append(condition.orelse[0], statement)
    else:
        condition.orelse.append(copy.deepcopy(statement))


# Copies.


def definition(name: str, holes: Sequence[str], where: ast.AST) -> ast.FunctionDef:
    """``def name(…): return None`` with a parameter for each hole, at the line of ``where``."""
    parameters = ", ".join(hole.lower() for hole in holes)
    (made,) = ast.parse(f"def {name}({parameters}): return None").body
    assert isinstance(made, ast.FunctionDef)
    for child in ast.walk(made):
        if "lineno" in child._attributes:
            ast.copy_location(child, where)
    return made


def filled(tree: ast.AST, marked: Mapping[int, str]) -> Any:
    """A copy of a tree with the holes' names, in lower case, in the place of what is in them."""
    return _Filled(marked).visit(tree)


class _Filled(ast.NodeTransformer):
    def __init__(self, marked: Mapping[int, str]) -> None:
        self._marked = marked

    def visit(self, node: ast.AST) -> Any:
        if id(node) in self._marked:
            # What a statement assigns to is in a hole as well.
            context = getattr(node, "ctx", ast.Load())
            return ast.copy_location(ast.Name(self._marked[id(node)].lower(), context), node)
        return copied(node, self)


def copied(node: ast.AST, transformer: ast.NodeTransformer) -> ast.AST:
    """A shallow copy with new children; nodes that a transformer keeps stay themselves below."""
    new = copy.copy(node)
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            setattr(
                new,
                name,
                [transformer.visit(v) if isinstance(v, ast.AST) else v for v in value],
            )
        elif isinstance(value, ast.AST):
            setattr(new, name, transformer.visit(value))
    return new
