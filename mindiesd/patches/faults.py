"""When a redirect raises: the original is called, so that the caller gets its result or its error.

Every replacement is installed inside of :func:`guard`. What it raises may be the caller's own
mistake, which the original raises as well; the caller's own code, run by a module that the
replacement calls; a lack of memory; or a fault of a kernel or of ours. Only the last is put right:
the original is called with the original arguments, the reason is counted, and the same kind of call
goes to the original from then on. Everything else is raised unchanged.

Two faults cannot be put right here. A kernel inside of a compiled graph is called by the graph, and
a device that works asynchronously may tell of an error only when it is waited for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from types import CodeType, FunctionType
from typing import Any

from mindiesd.errors import ParametersInvalid
from mindiesd.patches.scope import Site
from mindiesd.patches.wrapper import Template

_log = logging.getLogger("mindiesd")

RAISED = "the kernel raised"
"""Start of the reason that is counted for a fault; the error's type and first line follow."""

BOTH_RAISED = "raised, as the original does"
"""The reason of a call that the original cannot take either."""

MOST_KINDS = 256
"""How many kinds of call one patch remembers as faulty; others are tried again each time."""

_LONGEST = 120


def guard(
    replacement: Callable[..., Any], original: Callable[..., Any], site: Site
) -> Callable[..., Any]:
    """``replacement``, with ``original`` behind it should it raise.

    Args:
        replacement: the function that redirects or calls ``original``.
        original: what it replaces.
        site: the record, as the replacement sees it.
    """
    import torch

    assert isinstance(replacement, FunctionType)
    # Code of its own, see law.dress.
    replacement.__code__ = replacement.__code__.replace()
    faults = Faults(replacement, original, site)
    tracing = torch.compiler.is_dynamo_compiling
    return _GUARDED.around(replacement, replacement, original, faults.known, faults, tracing)


# Nothing can be caught in a graph, and Dynamo tells of its own errors. The original is not called
# in the handler: what it raises has nothing to do with what ours raised.
_GUARDED = Template.here(
    """\
def make(_replacement, _original, _known, _faults, _tracing):
    def guarded({parameters}):
        if _tracing():
            return _replacement({arguments})
        if _known and _faults.skips(({given}), {{{named}}}):
            return _original({originals})
        try:
            return _replacement({arguments})
        except Exception as error:
            fault = _faults.examine(error, ({given}), {{{named}}})
            if fault is None:
                raise
        return _faults.call_original(fault, ({given}), {{{named}}})
    return guarded
"""
)


class Faults:
    """The kinds of call for which one replacement raised.

    Attributes:
        known: what is counted for each of them; empty as long as nothing was wrong.
    """

    def __init__(
        self, replacement: Callable[..., Any], original: Callable[..., Any], site: Site
    ) -> None:
        """Know of none yet."""
        self.known: dict[Hashable, str] = {}
        self._replacement = replacement
        self._original = original
        self._codes = _codes(original)
        self._site = site

    def skips(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this kind of call failed before; then it is counted."""
        site = self._site
        if not (site.everywhere or site.in_force()):
            return False
        reason = self.known.get(_kind(args, kwargs))
        if reason is None:
            return False
        site.takes(reason)
        return True

    def examine(
        self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Fault | None:
        """What is to be done about an error; None: it is the caller's, or wanted.

        Nothing of the error is kept: its traceback holds the tensors of the call.
        """
        site = self._site
        if (
            not (site.everywhere or site.in_force())
            or site.strict_now()
            or _is_lack_of_memory(error)
            or _is_a_setting(error)
            or not self._is_ours(error)
        ):
            return None
        taken = site.would_take(self._replacement, args, kwargs)
        if taken is False:
            return None  # the original raised it
        refusal = error if isinstance(error, ParametersInvalid) else None
        return Fault(f"{RAISED} {_first_line(error)}", bool(taken), refusal)

    def call_original(self, fault: Fault, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original's result; what it raises is raised, unless ours had said what is wrong."""
        import torch

        site = self._site
        try:
            result = self._original(*args, **kwargs)
        except Exception:
            site.gave_up(BOTH_RAISED, fault.taken)
            if fault.refusal is not None:
                raise fault.refusal from None
            raise
        kind = None if torch.compiler.is_compiling() else _kind(args, kwargs)
        if kind is not None and len(self.known) < MOST_KINDS:
            if fault.reason not in self.known.values():
                _log.warning("%s: %s; the original is called", site.name, fault.reason)
            self.known[kind] = fault.reason
        site.gave_up(fault.reason, fault.taken)
        return result

    def _is_ours(self, error: Exception) -> bool:
        """Whether an error came from a kernel or from us, not from code that is the caller's.

        Read from the frames that it came through. What :mod:`mindiesd.ops` was called with are
        tensors, so all below it is a kernel's; above it, a module that the redirect calls, or a
        function of any other package, is the caller's.
        """
        # The first frame is the guard's own.
        traceback = error.__traceback__ and error.__traceback__.tb_next
        while traceback is not None:
            frame = traceback.tb_frame
            name = str(frame.f_globals.get("__name__", ""))
            if frame.f_code in self._codes or name.startswith("torch.nn.modules."):
                return False
            if name.startswith("mindiesd.ops."):
                return True
            if name.partition(".")[0] not in ("mindiesd", "torch", "torch_npu"):
                return False
            traceback = traceback.tb_next
        return True


class Fault:
    """One error that is put right.

    Attributes:
        reason: what is counted.
        taken: whether the call was counted as redirected before it failed.
        refusal: the error, if it names an argument that cannot be computed.
    """

    __slots__ = ("reason", "refusal", "taken")

    def __init__(self, reason: str, taken: bool, refusal: ParametersInvalid | None) -> None:
        """Describe it."""
        self.reason = reason
        self.taken = taken
        self.refusal = refusal


def _codes(function: Any) -> frozenset[CodeType]:
    """The code of a function and of what its decorators wrap; a builtin has none."""
    found = set()
    while isinstance(function, FunctionType):
        found.add(function.__code__)
        function = getattr(function, "__wrapped__", None)
    return frozenset(found)


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether a host or a device had no memory left; torch_npu says so by a RuntimeError."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return any(
        words in text for words in ("out of memory", "not enough memory", "can't allocate memory")
    )


def _is_a_setting(error: Exception) -> bool:
    """Whether an environment variable of ours has a value that is not allowed."""
    return isinstance(error, ParametersInvalid) and error.argument.startswith("environment")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _kind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What calls have in common that a kernel treats alike; None if that cannot be said."""
    try:
        words = tuple(map(_word, args)), tuple((key, _word(kwargs[key])) for key in sorted(kwargs))
        hash(words)
    except TypeError:
        return None
    return words


def _word(value: Any) -> Hashable:
    from torch import Tensor

    if isinstance(value, Tensor):
        # Not the strides: a shape that fails in one layout is not tried in others.
        shape = tuple(value.shape)
        if any(type(size) is not int for size in shape):
            raise TypeError("a size that is known to a trace only")
        return shape, value.dtype, value.device
    if value is None or type(value) in (bool, int, float, str):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return tuple(map(_word, value))
    return id(type(value))
