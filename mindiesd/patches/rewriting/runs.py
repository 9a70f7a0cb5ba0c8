"""Consecutive statements that are redirected together."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass

from mindiesd.patches.rewriting import flow, pattern
from mindiesd.patches.rewriting.rules import Statements


@dataclass
class _Run:
    """Where a spelling fits.

    Attributes:
        suite: the list of statements that it is in.
        start: of its first statement.
        statements: of the run.
        match: what stands in the holes.
        between: the names that it assigns, but for the one of its last statement.
        entering: those of them that it reads before it assigns them.
    """

    suite: list[ast.stmt]
    start: int
    statements: list[ast.stmt]
    match: pattern.Match
    between: frozenset[str]
    entering: frozenset[str]


def rewrite(
    tree: ast.FunctionDef,
    kind: Statements,
    outline: Callable[[Statements, ast.FunctionDef], str],
) -> int:
    """Replace every run of the kind in ``tree`` by an assignment; how many there were.

    Args:
        tree: a function's definition, which is changed.
        kind: what is looked for.
        outline: makes a function of a run; returns the name under which its replacement is found.
    """
    found = []
    for suite in flow.suites(tree):
        start = 0
        while start < len(suite):
            run = _found(kind, suite, start)
            if run is not None:
                found.append(run)
            start += 1 if run is None else len(run.statements)
    found = [run for run in found if _closed(tree, run, found)]
    # From the last one on, so that positions stay what they are.
    for run in reversed(found):
        run.suite[run.start : run.start + len(run.statements)] = [_replaced(kind, run, outline)]
    return len(found)


def _found(kind: Statements, suite: list[ast.stmt], start: int) -> _Run | None:
    for spelling in kind.spellings:
        patterns = pattern.parse_statements(spelling)
        statements = suite[start : start + len(patterns)]
        match = pattern.match_all(patterns, statements)
        if match is None or not all(pattern.is_plain(match.holes[hole]) for hole in kind.holes):
            continue
        names = _traced(statements, match)
        if names is not None:
            assigned, entering = names
            between = frozenset(assigned) - {assigned[-1]}
            return _Run(suite, start, statements, match, between, between & entering)
    return None


def _traced(
    statements: list[ast.stmt], match: pattern.Match
) -> tuple[list[str], frozenset[str]] | None:
    """The names that are assigned, in order, and those that are read before they are.

    None if the statements with their holes' names would do something else than they do with their
    own, or if what they read cannot be read before all of them: a name that was assigned must be
    read in the hole that it was assigned in.
    """
    holes: dict[str, str] = {}
    entering = set()
    assigned = []
    for statement in statements:
        target, value = flow.assigned(statement)
        if target is None:
            return None
        for node in ast.walk(value):
            if id(node) not in match.places:
                continue
            for name in flow.names(node):
                if name.id not in holes:
                    entering.add(name.id)
                elif name is not node or holes[name.id] != match.places[id(node)]:
                    return None
        holes[target] = match.places[id(statement.targets[0])]  # type: ignore[attr-defined]
        assigned.append(target)
    return assigned, frozenset(entering)


def _closed(tree: ast.FunctionDef, run: _Run, found: list[_Run]) -> bool:
    """Whether nothing but a run reads what the statements of this one assign on the way."""
    inside = {
        id(node)
        for other in found
        for statement in other.statements
        for node in ast.walk(statement)
    }
    declared = {
        name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Global, ast.Nonlocal))
        for name in node.names
    }
    if run.between & declared:
        return False
    for name in run.between:
        # A run assigns it before it reads it, whichever way led there.
        only = all(id(node) in inside for node in flow.names(tree) if node.id == name) and not any(
            name in other.entering for other in found
        )
        if not only and not flow.dead(tree, run.statements[-1], name):
            return False
    return True


def _replaced(
    kind: Statements, run: _Run, outline: Callable[[Statements, ast.FunctionDef], str]
) -> ast.Assign:
    first, last = run.statements[0], run.statements[-1]
    definition = flow.definition(kind.name, kind.holes, first)
    (returned,) = definition.body
    (target,) = last.targets  # type: ignore[attr-defined] # an assignment to one name
    assert isinstance(returned, ast.Return)
    returned.value = flow.at(ast.Name(run.match.places[id(target)].lower(), ast.Load()), last)
    ast.copy_location(returned, last)
    definition.body = [
        *(flow.filled(statement, run.match.places) for statement in run.statements),
        returned,
    ]
    local = outline(kind, definition)
    # What is read is plain, so that it may be evaluated in any order.
    call = ast.Call(
        func=flow.at(ast.Name(local, ast.Load()), first),
        args=[_loaded(run.match.holes[hole]) for hole in kind.holes],
        keywords=[],
    )
    assert isinstance(target, ast.Name)
    name = flow.at(ast.Name(target.id, ast.Store()), first)
    return ast.copy_location(ast.Assign(targets=[name], value=flow.at(call, first)), first)


def _loaded(node: ast.expr) -> ast.expr:
    """What is in a hole, to be read; the first place of the hole may be one that is assigned to."""
    return flow.at(ast.Name(node.id, ast.Load()), node) if isinstance(node, ast.Name) else node
