"""A loaded function's syntax tree, and code compiled as if it stood where the function stands.

Line and column numbers are those of the file, so tracebacks, debuggers and coverage point there.
"""

from __future__ import annotations
import __future__

import ast
import linecache
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_FUTURE = sum(
    getattr(__future__, name).compiler_flag
    for name in ("annotations", "generator_stop")
    if hasattr(__future__, name)
)
_FACTORY = "_mindiesd_factory"


class SourceUnknown(Exception):
    """Why a function cannot be rewritten."""


@dataclass(frozen=True)
class Source:
    """A function's definition as it stands in its file.

    Attributes:
        function: the loaded function.
        tree: its definition, without decorators; the reader's own, to be changed at will.
        classes: names of the classes around it, outermost first; they decide how ``__x`` is
            mangled.
        flags: ``from __future__`` flags of its file.
        imported: the globals that its file imports.
    """

    function: types.FunctionType
    tree: ast.FunctionDef
    classes: tuple[str, ...]
    flags: int
    imported: frozenset[str]

    def compile(
        self, tree: ast.FunctionDef, names: Sequence[str], *, method: bool
    ) -> types.CodeType:
        """The code object of ``tree`` in the place of this function.

        Args:
            tree: a definition with the line numbers of the file.
            names: what is found in the closure instead of among the globals.
            method: whether it stands in the function's class, so that ``super()`` and ``__x``
                mean there what they mean in the function.
        """
        inside = self.classes if method else ()
        # CPython calls what was imported by other instructions than other globals.
        shell = ast.parse(
            "\n".join(
                [
                    *(f"import {name}" for name in sorted(self.imported)),
                    f"def {_FACTORY}({', '.join(names)}): pass",
                    *(f"class {name}: pass" for name in inside),
                ]
            )
        ).body
        for node in shell:
            for child in ast.walk(node):
                if "lineno" in child._attributes:
                    ast.copy_location(child, self.tree)
        around = shell[len(self.imported) :]
        for owner, body in zip(around, [*around[1:], tree], strict=True):
            assert isinstance(owner, (ast.FunctionDef, ast.ClassDef))
            owner.body = [body]
        first = (*inside, tree.name)[0]
        if first not in names:
            # What the factory defines is at the top of its module in truth.
            factory = around[0]
            assert isinstance(factory, ast.FunctionDef)
            factory.body.insert(0, ast.copy_location(ast.Global(names=[first]), self.tree))
        module = ast.Module(body=shell[: len(self.imported) + 1], type_ignores=[])
        code = compile(
            module,
            self.function.__code__.co_filename,
            "exec",
            flags=self.flags,
            dont_inherit=True,
        )
        inner = _find(code, [_FACTORY, *inside, tree.name])
        prefix = ".".join([_FACTORY, "<locals>", *inside, tree.name])
        return _requalified(inner, prefix, self.function.__qualname__)


def read(function: types.FunctionType) -> Source:
    """The source of a loaded function.

    Raises:
        SourceUnknown: there is none, or what it compiles to is not what is loaded.
    """
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise SourceUnknown("source not available")
    text, indent = _block(lines, code.co_firstlineno - 1)
    # Parsed at the lines where it stands: moving it there afterwards takes much longer.
    above = code.co_firstlineno - 1
    text = "\n" * (above - 1) + "if 1:\n" + text if indent else "\n" * above + text
    try:
        parsed: ast.AST = ast.parse(text)
    except SyntaxError as error:
        raise SourceUnknown("source is not the loaded code") from error
    assert isinstance(parsed, (ast.Module, ast.If))
    if indent:
        parsed = parsed.body[0]
        assert isinstance(parsed, ast.If)
    tree = parsed.body[0] if parsed.body else None
    if not isinstance(tree, ast.FunctionDef):
        raise SourceUnknown("not a function defined with def")
    # The code of a decorated function starts at its first decorator.
    first = tree.decorator_list
    tree.decorator_list = []
    classes = tuple(function.__qualname__.split(".")[:-1])
    if "<locals>" in classes:
        classes = classes[len(classes) - classes[::-1].index("<locals>") :]
    imported = _imports(code.co_filename, lines) & set(_global_names(code))
    source = Source(function, tree, classes, code.co_flags & _FUTURE, imported)
    free = [name for name in code.co_freevars if name != "__class__"]
    again = source.compile(tree, free, method=True)
    if first:
        again = again.replace(co_firstlineno=code.co_firstlineno)
    if not _same(again, code):
        raise SourceUnknown("source is not the loaded code")
    return source


def _block(lines: Sequence[str], start: int) -> tuple[str, int]:
    """The lines of the definition that starts at ``start``, and its indentation."""
    if start >= len(lines):
        raise SourceUnknown("source is not the loaded code")
    indent = len(lines[start]) - len(lines[start].lstrip())
    try:
        end = _end(lines, start)
    except SyntaxError as error:
        raise SourceUnknown("source is not the loaded code") from error
    return "".join(lines[start:end]), indent


def _end(lines: Sequence[str], start: int) -> int:
    """One past the last line of the definition at ``start``.

    The first line after the signature that is indented no deeper ends it. Such a line may also
    stand inside brackets or a string: then what was taken does not parse, and more is.
    """
    indent = len(lines[start]) - len(lines[start].lstrip())
    prefix = "if 1:\n" if indent else ""
    seen = False
    for index in range(start, len(lines)):
        line = lines[index]
        deeper = not line.strip() or len(line) - len(line.lstrip()) > indent
        if index > start and not deeper and seen and not line.lstrip().startswith((")", "]", "}")):
            try:
                ast.parse(prefix + "".join(lines[start:index]))
            except SyntaxError:
                continue
            return index
        stripped = line.lstrip()
        seen = seen or stripped.startswith("def ")
    return len(lines)


# By file, the lines that were read and the names that they import at module level.
_imported_by: dict[str, tuple[list[str], frozenset[str]]] = {}


def _imports(path: str, lines: list[str]) -> frozenset[str]:
    """The names that a file imports at module level."""
    known = _imported_by.get(path)
    # linecache keeps one list of lines for as long as it believes in it.
    if known is not None and known[0] is lines:
        return known[1]
    kept, inside = [], False
    for line in lines:
        if line[0] not in " \t\n\r\f)]}#":
            inside = line.startswith(("def ", "class ", "@", "async "))
        # Definitions are most of the file and have nothing to say here.
        if not inside:
            kept.append(line)
    for text in (kept, lines):
        try:
            tree = ast.parse("".join(text))
        except SyntaxError:
            continue
        found = frozenset(_imported(tree))
        _imported_by[path] = lines, found
        return found
    raise SourceUnknown("source is not the loaded code")


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _global_names(const)


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                yield (alias.asname or alias.name).partition(".")[0]
        elif not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef, ast.expr)):
            yield from _imported(node)


def _find(code: types.CodeType, path: Sequence[str]) -> types.CodeType:
    for name in path:
        found = [
            const
            for const in code.co_consts
            if isinstance(const, types.CodeType) and const.co_name == name
        ]
        if not found:
            raise SourceUnknown("not compiled where it stands")  # type parameters have a scope
        code = found[0]
    return code


def _requalified(code: types.CodeType, prefix: str, qualname: str) -> types.CodeType:
    """The code with the qualified names it would have in its true place (from Python 3.11)."""
    changes: dict[str, object] = {
        "co_consts": tuple(
            _requalified(const, prefix, qualname) if isinstance(const, types.CodeType) else const
            for const in code.co_consts
        )
    }
    own = getattr(code, "co_qualname", None)
    if own is not None and own.startswith(prefix):
        changes["co_qualname"] = qualname + own[len(prefix) :]
    return code.replace(**changes)  # type: ignore[arg-type]


def _same(ours: types.CodeType, theirs: types.CodeType) -> bool:
    """Whether two code objects do the same at the same lines."""
    if (
        ours.co_code != theirs.co_code
        or ours.co_names != theirs.co_names
        or ours.co_varnames != theirs.co_varnames
        or ours.co_freevars != theirs.co_freevars
        or ours.co_cellvars != theirs.co_cellvars
        or ours.co_firstlineno != theirs.co_firstlineno
        or len(ours.co_consts) != len(theirs.co_consts)
    ):
        return False
    for mine, other in zip(ours.co_consts, theirs.co_consts, strict=True):
        if isinstance(mine, types.CodeType):
            if not isinstance(other, types.CodeType) or not _same(mine, other):
                return False
        elif type(mine) is not type(other) or mine != other:
            return False
        elif not isinstance(mine, frozenset) and repr(mine) != repr(other):
            # -0.0 is not 0.0, and (1,) is not (True,); sets have no order to compare.
            return False
    return True
