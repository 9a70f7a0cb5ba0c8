"""Wrappers that have the parameters of what they wrap, written out.

Passing them on as ``*args`` and ``**kwargs`` takes several times as long as all the rest of what a
wrapper does at each call. So it is a template, compiled once for each list of parameters.
"""

from __future__ import annotations

import functools
import inspect
import sys
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
        line: the line it starts in, for tracebacks and debuggers.
    """

    text: str
    file: str
    line: int

    @classmethod
    def here(cls, text: str) -> Template:
        """A template that stands in the calling file.

        Its quotes are opened in the line after the one that this call begins in, and its text
        begins in the line after that.
        """
        frame = sys._getframe(1)
        return cls(text, frame.f_code.co_filename, frame.f_lineno + 2)

    def around(self, wrapped: Callable[..., Any], *names: Any) -> Callable[..., Any]:
        """The wrapper that ``make(*names)`` returns, dressed as the function ``wrapped``."""
        assert isinstance(wrapped, FunctionType)
        space: dict[str, Any] = {}
        exec(_compiled(self, parameters(wrapped)), space)
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
    one, two = parameters(function), parameters(other)
    known = {*two.ordinary[two.positional_only :], *two.keyword_only}
    named = bool(two.others) or known >= {*one.optional, *one.keyword_only}
    return named and (bool(one.more or two.more) or len(one.ordinary) == len(two.ordinary))


class Parameters(NamedTuple):
    """A function's parameters.

    Attributes:
        ordinary: those that can be given by position.
        positional_only: how many of them cannot be given by name.
        defaults: how many of them may be left out.
        keyword_only: those that can be given by name only.
        more: ``*`` and the name of the tuple of all others by position; empty if there is none.
        others: ``**`` and the name of the dictionary of all others by name, likewise.
    """

    ordinary: tuple[str, ...]
    positional_only: int
    defaults: int
    keyword_only: tuple[str, ...]
    more: str
    others: str

    @property
    def optional(self) -> tuple[str, ...]:
        """The ordinary ones that may be left out and can be given by name, whatever precedes."""
        if self.more:
            return ()
        return self.ordinary[max(len(self.ordinary) - self.defaults, self.positional_only) :]


def parameters(function: FunctionType) -> Parameters:
    """Read from the code: a signature takes much longer to make."""
    code = function.__code__
    names, count = code.co_varnames, code.co_argcount + code.co_kwonlyargcount
    rest = iter(names[count:])
    return Parameters(
        names[: code.co_argcount],
        code.co_posonlyargcount,
        len(function.__defaults__ or ()),
        names[code.co_argcount : count],
        f"*{next(rest)}" if code.co_flags & inspect.CO_VARARGS else "",
        f"**{next(rest)}" if code.co_flags & inspect.CO_VARKEYWORDS else "",
    )


# Many replacements have the same parameters: compiling is what takes time.
@functools.cache
def _compiled(template: Template, taken: Parameters) -> CodeType:
    """A template's code for these parameters, with the line numbers it has in its file."""
    ordinary, keyword_only, more, others = (
        taken.ordinary,
        taken.keyword_only,
        taken.more,
        taken.others,
    )
    listed = list(ordinary)
    if taken.positional_only:
        listed.insert(taken.positional_only, "/")
    listed += [more] if more else ["*"] * bool(keyword_only)
    listed += [*keyword_only, others]
    arguments = [*ordinary, more, *(f"{name}={name}" for name in keyword_only), others]
    # A builtin may take by keyword only what a Python function takes by position as well.
    plain = ordinary[: len(ordinary) - len(taken.optional)]
    by_name = [*taken.optional, *keyword_only]
    originals = [*plain, more, *(f"{name}={name}" for name in by_name), others]
    named = [*(f"{name!r}: {name}" for name in by_name), others]
    text = template.text.format(
        parameters=", ".join(filter(None, listed)),
        arguments=", ".join(filter(None, arguments)),
        originals=", ".join(filter(None, originals)),
        given="".join(f"{part}, " for part in [*plain, more] if part),
        named=", ".join(filter(None, named)),
    )
    return compile("\n" * (template.line - 1) + text, template.file, "exec", dont_inherit=True)
