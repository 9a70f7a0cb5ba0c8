"""Making the new function: outline what is to be redirected, and redirect it."""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from mindiesd.patches import faults, verify, wrapper
from mindiesd.patches.rewriting import flow, pattern, runs
from mindiesd.patches.rewriting.rules import Expression, Kind, Nested, Statements, Whole
from mindiesd.patches.rewriting.source import Source, SourceUnknown, read
from mindiesd.patches.scope import Site

# One underscore: two would be mangled inside a class.
_NAME = "_mindiesd_{}"


def rewrite(
    function: types.FunctionType, counts: Mapping[Kind, int], site: Site
) -> types.FunctionType:
    """The function with what the rules describe redirected.

    It has the globals, defaults, closure, name, signature and line numbers of the original.

    Args:
        function: a function defined with ``def``; a decorated one gives its decorators anew.
        counts: how often each kind must be found, in the order in which they are looked for.
        site: the record, as the replacements see it.

    Raises:
        SourceUnknown: the source is not what the rules were written for.
    """
    inner = innermost(function)
    source = read(inner)
    outlined = _Outlined(source, site)
    tree = source.tree
    for kind, expected in counts.items():
        if isinstance(kind, Whole):
            if pattern.fingerprint(tree) not in kind.prints:
                raise SourceUnknown(f"{kind.name}: another source than the known")
            return _decorated(function, inner, _built(kind, inner, site))
        if isinstance(kind, Nested):
            found = _nested(tree, kind, outlined)
        elif isinstance(kind, Statements):
            found = runs.rewrite(tree, kind, outlined.add)
        else:
            found = _Expressions(kind, outlined).rewrite(tree)
        if found != expected:
            raise SourceUnknown(f"{kind.name} found {found} times, {expected} are known")
    values = outlined.replacements
    free = [name for name in inner.__code__.co_freevars if name != "__class__"]
    code = source.compile(tree, [*free, *values], method=True)
    code = code.replace(co_firstlineno=inner.__code__.co_firstlineno)
    own = dict(zip(inner.__code__.co_freevars, inner.__closure__ or (), strict=True))
    closure = tuple(
        own[name] if name in own else types.CellType(values[name]) for name in code.co_freevars
    )
    made = types.FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__, closure)
    made.__kwdefaults__ = inner.__kwdefaults__
    made.__qualname__ = inner.__qualname__
    made.__doc__ = inner.__doc__
    made.__module__ = inner.__module__
    made.__annotations__ = inner.__annotations__
    made.__dict__.update(inner.__dict__)
    return _decorated(function, inner, made)


def innermost(function: types.FunctionType) -> types.FunctionType:
    """The function under its decorators, each of which must keep what it wraps in a cell.

    Raises:
        SourceUnknown: a decorator keeps it elsewhere.
    """
    while hasattr(function, "__wrapped__"):
        wrapped = function.__wrapped__
        if not isinstance(wrapped, types.FunctionType) or not any(
            cell.cell_contents is wrapped for cell in function.__closure__ or ()
        ):
            raise SourceUnknown("a decorator does not show what it wraps")
        function = wrapped
    return function


def _decorated(
    function: types.FunctionType, inner: types.FunctionType, made: types.FunctionType
) -> types.FunctionType:
    """``made`` under copies of the decorators' wrappers around ``inner``."""
    if function is inner:
        return made
    wrapped = function.__wrapped__  # type: ignore[attr-defined]
    under = _decorated(wrapped, inner, made)
    closure = tuple(
        types.CellType(under) if cell.cell_contents is wrapped else cell
        for cell in function.__closure__ or ()
    )
    again = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, closure
    )
    again.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(again, function)
    again.__wrapped__ = under  # type: ignore[attr-defined]
    return again


def _built(kind: Kind, original: types.FunctionType, site: Site) -> Any:
    replacement = _resolved(kind.build)(original, site)
    if not wrapper.alike(replacement, original):
        # After a fault, and while it is verified, the original is called as the replacement was.
        raise SourceUnknown(f"{kind.name} does not take what its replacement takes")
    return faults.guard(replacement, original, site)


def _resolved(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


class _Outlined:
    """The functions that were made of parts of one function, and their replacements by name."""

    def __init__(self, source: Source, site: Site) -> None:
        self.source = source
        self.replacements: dict[str, Callable[..., Any]] = {}
        self._site = site

    def add(self, kind: Kind, definition: ast.FunctionDef) -> str:
        """Make a function of the definition; the name under which its replacement is found."""
        code = self.source.compile(definition, (), method=False)
        around = self.source.function.__code__
        outer = {*around.co_varnames, *around.co_cellvars, *around.co_freevars}
        outer -= {*code.co_varnames, *code.co_cellvars}
        if any(name.id in outer for name in flow.names(definition)):
            # It would find globals of those names.
            raise SourceUnknown(f"{kind.name} uses variables of the function around it")
        original = types.FunctionType(code, self.source.function.__globals__)
        original.__module__ = self.source.function.__module__
        original.__qualname__ = f"{self.source.function.__qualname__}.{definition.name}"
        arguments = definition.args
        if arguments.defaults or arguments.kw_defaults:
            raise SourceUnknown(f"{kind.name} has default values")
        local = _NAME.format(len(self.replacements))
        replacement = _built(kind, original, self._site)
        if self._site.watching:
            reference = getattr(kind, "reference", "")
            replacement = verify.watch(
                replacement,
                original,
                self._site.verification_now,
                self._site.name,
                _resolved(reference) if reference else None,
            )
        self.replacements[local] = replacement
        return local


def _nested(tree: ast.FunctionDef, kind: Nested, outlined: _Outlined) -> int:
    found = 0
    for suite in flow.suites(tree):
        for index, statement in enumerate(suite):
            if not isinstance(statement, ast.FunctionDef) or statement.name != kind.name:
                continue
            if pattern.fingerprint(statement) not in kind.prints:
                continue
            local = outlined.add(kind, statement)
            suite[index] = ast.copy_location(
                ast.Assign(
                    targets=[flow.at(ast.Name(kind.name, ast.Store()), statement)],
                    value=flow.at(ast.Name(local, ast.Load()), statement),
                ),
                statement,
            )
            found += 1
    return found


class _Expressions:
    """Finds and replaces one kind of expression in a function."""

    def __init__(self, kind: Expression, outlined: _Outlined) -> None:
        self._kind = kind
        self._outlined = outlined
        self._named = dict(kind.named)
        self._spellings = [pattern.parse(text) for text in kind.spellings]
        self._joins = [pattern.parse(text) for text in kind.joins]

    def rewrite(self, tree: ast.FunctionDef) -> int:
        """Replace every match in ``tree``; how many there were."""
        if self._joins:
            for suite in flow.suites(tree):
                self._sink(suite)
        for suite in list(flow.suites(tree)):
            self._join(tree, suite)
        replacer = _Replacer(self._match, self._call)
        for suite in flow.suites(tree):
            for statement in suite:
                replacer.statement(statement)
        return replacer.count

    def _match(self, node: ast.AST) -> pattern.Match | None:
        for spelling in self._spellings:
            found = pattern.match(spelling, node)
            if found is not None and self._fits(found):
                return found
        return None

    def _fits(self, found: pattern.Match) -> bool:
        for hole, node in found.holes.items():
            if isinstance(node, (ast.Constant, ast.Tuple, ast.List)):
                return False  # arithmetic of numbers or lists
            if hole in self._kind.members:
                if not (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "self"
                    and node.attr in self._named.get(hole, (node.attr,))
                ):
                    return False
            elif not pattern.is_plain(node) and (
                hole not in self._kind.calls or list(found.places.values()).count(hole) > 1
            ):
                return False
        return True

    def _call(self, node: ast.expr, found: pattern.Match) -> ast.expr:
        marked = found.places
        # What stands in several places is plain, so that evaluating it once is enough.
        order = list(dict.fromkeys(pattern.evaluated(node, marked)))
        # The original: the expression as it stands, of parameters.
        definition = flow.definition(self._kind.name, self._kind.holes, node)
        returned = definition.body[0]
        assert isinstance(returned, ast.Return)
        returned.value = flow.filled(node, marked)
        local = self._outlined.add(self._kind, definition)
        # Operands are evaluated in the order of the source: by keyword where that is another one.
        positional = order == list(self._kind.holes)
        call = ast.Call(
            func=flow.at(ast.Name(local, ast.Load()), node),
            args=[found.holes[hole] for hole in order] if positional else [],
            keywords=[]
            if positional
            else [
                ast.copy_location(
                    ast.keyword(arg=hole.lower(), value=found.holes[hole]), found.holes[hole]
                )
                for hole in order
            ],
        )
        return ast.copy_location(call, node)

    # Joining statements.

    def _sink(self, suite: list[ast.stmt]) -> None:
        """Move what follows an ``if`` to the ends of its branches, where it can be joined there.

        if flag: y = norm(x)                    if flag: y = norm(x); y = act(y)
        else: y = norm(x, temb)         ->      else: y = norm(x, temb); y = act(y)
        y = act(y)
        """
        index = 0
        while index < len(suite) - 1:
            condition, statement = suite[index], suite[index + 1]
            if isinstance(condition, ast.If) and any(
                self._together(branch[-1], statement) for branch in flow.branches(condition)
            ):
                del suite[index + 1]
                flow.append(condition, statement)
            index += 1

    def _together(self, before: ast.stmt, statement: ast.stmt) -> bool:
        """Whether the value named by one statement can be joined to the next."""
        name, value = flow.assigned(before)
        if name is None or flow.assigned(statement)[0] != name:
            return False
        if not any(pattern.match(join, value) for join in self._joins):
            return False
        loads = [
            node
            for node in flow.names(statement)
            if node.id == name and isinstance(node.ctx, ast.Load)
        ]
        return len(loads) == 1 and self._fused(statement, loads[0], value) is not None

    def _fused(self, statement: ast.stmt, load: ast.Name, value: ast.expr) -> ast.stmt | None:
        """``statement`` with ``value`` in the place of a name; None if they do not match so."""
        trial = _Substituted(load, value).visit(copy.copy(statement))
        if any(
            (match := self._match(node)) is not None and id(value) in match.inner
            for node in ast.walk(trial)
        ):
            fused: ast.stmt = trial
            return fused
        return None

    def _join(self, tree: ast.FunctionDef, suite: list[ast.stmt]) -> None:
        index = 0
        while self._joins and index < len(suite):
            if not self._joined(tree, suite, index):
                index += 1

    def _joined(self, tree: ast.FunctionDef, suite: list[ast.stmt], index: int) -> bool:
        """Move the value named by ``suite[index]`` to its only use, if the two match together."""
        name, value = flow.assigned(suite[index])
        if name is None or not any(pattern.match(join, value) for join in self._joins):
            return False
        for user in range(index + 1, len(suite)):
            statement = suite[user]
            uses = [node for node in flow.names(statement) if node.id == name]
            loads = [node for node in uses if isinstance(node.ctx, ast.Load)]
            if loads:
                break
            if uses or not flow.may_cross(value, statement):
                return False
        else:
            return False
        own = flow.assigned(statement)[0]
        if len(loads) != 1 or own is None:
            return False
        if own != name and not flow.dead(tree, statement, name):
            return False
        fused = self._fused(statement, loads[0], value)
        if fused is None:
            return False
        suite[user] = fused
        del suite[index]
        return True


class _Replacer(ast.NodeTransformer):
    """Replaces matches in expressions, outermost first, then what is inside their operands."""

    def __init__(
        self,
        match: Callable[[ast.AST], pattern.Match | None],
        call: Callable[[ast.expr, pattern.Match], ast.expr],
    ) -> None:
        self._match = match
        self._call = call
        self.count = 0

    def statement(self, node: ast.stmt) -> None:
        """Replace in the expressions of a statement; statements in it have their own turn."""
        for name, value in ast.iter_fields(node):
            if isinstance(value, ast.expr):
                setattr(node, name, self.visit(value))
            elif isinstance(value, list):
                value[:] = [
                    self.visit(entry) if isinstance(entry, (ast.expr, ast.withitem)) else entry
                    for entry in value
                ]

    def visit(self, node: ast.AST) -> Any:
        if isinstance(
            node, (ast.Lambda, ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)
        ):
            return node
        found = self._match(node) if isinstance(node, ast.expr) else None
        if found is not None:
            self.count += 1
            node = self._call(node, found)  # type: ignore[arg-type]
            assert isinstance(node, ast.Call)
            node.args = [self.visit(argument) for argument in node.args]
            for keyword in node.keywords:
                keyword.value = self.visit(keyword.value)
            return node
        return super().visit(node)


class _Substituted(ast.NodeTransformer):
    """A copy of a statement with one name replaced by what it stands for."""

    def __init__(self, name: ast.Name, value: ast.expr) -> None:
        self._name = name
        self._value = value

    def visit(self, node: ast.AST) -> Any:
        if node is self._name:
            return self._value
        return flow.copied(node, self)
