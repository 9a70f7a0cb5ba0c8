"""Wrappers that have the parameters of what they wrap, written out.

Passing them on as ``*args`` and ``**kwargs`` takes several times as long as all the rest of what a
wrapper does at each call. So it is a template, compiled once for each list of parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, NamedTuple


class Template(NamedTuple):
    """The source of a function ``make`` that returns a wrapper.

    Attributes:
        text: the source, in which ``{parameters}`` stands for the parameters of the function that
            is wrapped, ``{arguments}`` for these as arguments of that function, ``{originals}`` for
            them as arguments of the original, and ``{given}`` and ``{named}`` for the latter as the
            inside of a tuple and of a dictionary. Braces of its own are doubled.
        file: where the text stands.
        line: the line it starts at, for tracebacks and debuggers.
    """

    text: str
    file: str
    line: int

    def around(self, wrapped: Callable[..., Any], *names: Any) -> Callable[..., Any]:
        """The wrapper that ``make(*names)`` returns, dressed as the function ``wrapped``."""
        assert isinstance(wrapped, FunctionType)
        space: dict[str, Any] = {}
        exec(_compiled(self, *_parameters(wrapped)), space)
        made = space["make"](*names)
        # In the wrapped function's globals: torch.jit.script looks names up there.
        wrapper = FunctionType(
            made.__code__.replace(),
            wrapped.__globals__,
            wrapped.__name__,
            wrapped.__defaults__,
            made.__closure__,
        )
        wrapper.__kwdefaults__ = wrapped.__kwdefaults__
        functools.update_wrapper(wrapper, wrapped)
        # It has the parameters itself; what is to be followed is the original, see law.dress.
        del vars(wrapper)["__wrapped__"]
        return wrapper


def alike(function: FunctionType, other: FunctionType) -> bool:
    """Whether ``other`` takes what a wrapper of ``function`` passes on to the original.

    That is the ordinary parameters by position, those with a default value by name.
    """
    one, two = _parameters(function), _parameters(other)
    if one.more:
        return True  # whatever it is given, by position
    optional = one.ordinary[max(len(one.ordinary) - one.defaults, one.positional_only) :]
    known = {*two.ordinary[two.positional_only :], *two.keyword_only}
    named = bool(two.others) or known >= {*optional, *one.keyword_only}
    return named and (bool(two.more) or len(one.ordinary) == len(two.ordinary))


class _Parameters(NamedTuple):
    """A function's parameters: their names, how many may be left out, the rest of either kind."""

    ordinary: tuple[str, ...]
    positional_only: int
    defaults: int
    keyword_only: tuple[str, ...]
    more: str
    others: str


def _parameters(function: FunctionType) -> _Parameters:
    code = function.__code__
    names, count = code.co_varnames, code.co_argcount + code.co_kwonlyargcount
    rest = iter(names[count:])
    return _Parameters(
        names[: code.co_argcount],
        code.co_posonlyargcount,
        len(function.__defaults__ or ()),
        names[code.co_argcount : count],
        f"*{next(rest)}" if code.co_flags & inspect.CO_VARARGS else "",
        f"**{next(rest)}" if code.co_flags & inspect.CO_VARKEYWORDS else "",
    )


# Many replacements have the same parameters: compiling is what takes time.
@functools.cache
def _compiled(
    template: Template,
    ordinary: tuple[str, ...],
    positional_only: int,
    defaults: int,
    keyword_only: tuple[str, ...],
    more: str,
    others: str,
) -> CodeType:
    """A template's code for these parameters, with the line numbers it has in its file."""
    parameters = list(ordinary)
    if positional_only:
        parameters.insert(positional_only, "/")
    parameters += [more] if more else ["*"] * bool(keyword_only)
    parameters += [*keyword_only, others]
    arguments = [*ordinary, more, *(f"{name}={name}" for name in keyword_only), others]
    # A builtin may take by keyword only what a Python function takes by position as well.
    optional = ordinary[max(len(ordinary) - defaults, positional_only) :]
    if more:
        optional = ()
    plain = ordinary[: len(ordinary) - len(optional)]
    by_name = [*optional, *keyword_only]
    originals = [*plain, more, *(f"{name}={name}" for name in by_name), others]
    named = [*(f"{name!r}: {name}" for name in by_name), others]
    text = template.text.format(
        parameters=", ".join(filter(None, parameters)),
        arguments=", ".join(filter(None, arguments)),
        originals=", ".join(filter(None, originals)),
        given="".join(f"{part}, " for part in [*plain, more] if part),
        named=", ".join(filter(None, named)),
    )
    return compile("\n" * template.line + text, template.file, "exec", dont_inherit=True)
