"""Making the new function: outline what is to be redirected, and redirect it."""

from __future__ import annotations

import ast
import copy
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from mindiesd.patches import faults, verify
from mindiesd.patches.rewriting import pattern
from mindiesd.patches.rewriting.rules import Expression, Nested, Whole
from mindiesd.patches.rewriting.source import Source, SourceUnknown, read
from mindiesd.patches.scope import Site

# One underscore: two would be mangled inside a class.
_NAME = "_mindiesd_{}"
Kind = Expression | Nested | Whole


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
        found = (
            _nested(tree, kind, outlined)
            if isinstance(kind, Nested)
            else _Expressions(kind, outlined).rewrite(tree)
        )
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
    module, _, name = kind.build.partition(":")
    made = getattr(import_module(module), name)(original, site)
    return faults.guard(made, original, site)


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
        if any(name.id in outer for name in _names(definition)):
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
            replacement = verify.watch(
                replacement, original, self._site.verification_now, self._site.name
            )
        self.replacements[local] = replacement
        return local


def _nested(tree: ast.FunctionDef, kind: Nested, outlined: _Outlined) -> int:
    found = 0
    for suite in _suites(tree):
        for index, statement in enumerate(suite):
            if not isinstance(statement, ast.FunctionDef) or statement.name != kind.name:
                continue
            if pattern.fingerprint(statement) not in kind.prints:
                continue
            local = outlined.add(kind, statement)
            suite[index] = ast.copy_location(
                ast.Assign(
                    targets=[_at(ast.Name(kind.name, ast.Store()), statement)],
                    value=_at(ast.Name(local, ast.Load()), statement),
                ),
                statement,
            )
            found += 1
    return found


def _at(node: ast.expr, where: ast.AST) -> Any:
    return ast.copy_location(node, where)


def _suites(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements, outer ones first; not those of nested scopes."""
    for name in ("body", "orelse", "finalbody"):
        suite = getattr(tree, name, None)
        if isinstance(suite, list) and suite and isinstance(suite[0], ast.stmt):
            yield suite
            for statement in suite:
                if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    yield from _suites(statement)
    for handler in getattr(tree, "handlers", ()):
        yield from _suites(handler)


class _Expressions:
    """Finds and replaces one kind of expression in a function."""

    def __init__(self, kind: Expression, outlined: _Outlined) -> None:
        self._kind = kind
        self._outlined = outlined
        self._spellings = [pattern.parse(text) for text in kind.spellings]
        self._joins = [pattern.parse(text) for text in kind.joins]

    def rewrite(self, tree: ast.FunctionDef) -> int:
        """Replace every match in ``tree``; how many there were."""
        for suite in list(_suites(tree)):
            self._join(tree, suite)
        replacer = _Replacer(self._match, self._call)
        for suite in _suites(tree):
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
        parameters = ", ".join(hole.lower() for hole in self._kind.holes)
        definition = ast.parse(f"def {self._kind.name}({parameters}): return None").body[0]
        assert isinstance(definition, ast.FunctionDef)
        for child in ast.walk(definition):
            if "lineno" in child._attributes:
                ast.copy_location(child, node)
        returned = definition.body[0]
        assert isinstance(returned, ast.Return)
        returned.value = _Filled(marked).visit(node)
        local = self._outlined.add(self._kind, definition)
        # Operands are evaluated in the order of the source: by keyword where that is another one.
        positional = order == list(self._kind.holes)
        call = ast.Call(
            func=_at(ast.Name(local, ast.Load()), node),
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

    def _join(self, tree: ast.FunctionDef, suite: list[ast.stmt]) -> None:
        index = 0
        while self._joins and index < len(suite):
            if not self._joined(tree, suite, index):
                index += 1

    def _joined(self, tree: ast.FunctionDef, suite: list[ast.stmt], index: int) -> bool:
        """Move the value named by ``suite[index]`` to its only use, if the two match together."""
        name, value = _assigned(suite[index])
        if name is None or not any(pattern.match(join, value) for join in self._joins):
            return False
        for user in range(index + 1, len(suite)):
            statement = suite[user]
            uses = [node for node in _names(statement) if node.id == name]
            loads = [node for node in uses if isinstance(node.ctx, ast.Load)]
            if loads:
                break
            if uses or not _may_cross(value, statement):
                return False
        else:
            return False
        own = _assigned(statement)[0]
        if len(loads) != 1 or own is None:
            return False
        if own != name and not _dead(tree, statement, name):
            return False
        replaced = _Substituted(loads[0], value)
        trial = replaced.visit(copy.copy(statement))
        if not any(
            (match := self._match(node)) is not None and id(value) in match.inner
            for node in ast.walk(trial)
        ):
            return False
        suite[user] = trial
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


class _Filled(ast.NodeTransformer):
    """A copy of an expression with parameters in the place of what stands in the holes."""

    def __init__(self, marked: Mapping[int, str]) -> None:
        self._marked = marked

    def visit(self, node: ast.AST) -> Any:
        if id(node) in self._marked:
            return ast.copy_location(ast.Name(self._marked[id(node)].lower(), ast.Load()), node)
        return _copied(node, self)


class _Substituted(ast.NodeTransformer):
    """A copy of a statement with one name replaced by what it stands for."""

    def __init__(self, name: ast.Name, value: ast.expr) -> None:
        self._name = name
        self._value = value

    def visit(self, node: ast.AST) -> Any:
        if node is self._name:
            return self._value
        return _copied(node, self)


def _copied(node: ast.AST, transformer: ast.NodeTransformer) -> ast.AST:
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


# What a joined value may be moved across.


def _assigned(statement: ast.stmt) -> tuple[str | None, ast.expr]:
    """The one name that a statement assigns, and the value."""
    if (
        isinstance(statement, ast.Assign)
        and len(statement.targets) == 1
        and isinstance(statement.targets[0], ast.Name)
    ):
        return statement.targets[0].id, statement.value
    return None, ast.Constant(None)


def _names(node: ast.AST) -> Iterator[ast.Name]:
    return (child for child in ast.walk(node) if isinstance(child, ast.Name))


def _may_cross(value: ast.expr, statement: ast.stmt) -> bool:
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
    changed = {node.id for node in _names(target)}
    return changed.isdisjoint(node.id for node in _names(value)) and _calm(statement.value)


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


def _dead(tree: ast.FunctionDef, statement: ast.stmt, name: str) -> bool:
    """Whether no path from after ``statement`` reads ``name`` before assigning it."""
    path = _path(tree, statement)
    if path is None:
        return False
    for owner, suite, index in reversed(path):
        for later in suite[index + 1 :]:
            read = any(node.id == name and isinstance(node.ctx, ast.Load) for node in _names(later))
            if read:
                return False
            if _assigned(later)[0] == name or isinstance(later, (ast.Return, ast.Raise)):
                return True
        if not isinstance(owner, (ast.If, ast.With, ast.FunctionDef)):
            return False  # a loop comes round again, and a handler may be entered from anywhere
    return True


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
