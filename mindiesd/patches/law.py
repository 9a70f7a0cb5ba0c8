"""What every replacement checks before it may take a call, and how it is dressed as the original.

A replacement takes a call only when the result is provably right; otherwise the original is called
with the original arguments and the reason is counted. The reasons are short fixed texts: they are
keys of counters, and formatting a text costs more than some of the calls.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from mindiesd.patches.wrapper import parameters

GRADIENTS = "needs gradients"
DROPOUT = "dropout"
NOT_A_TENSOR = "not a tensor"
UNUSUAL_ARGUMENT = "argument of an unusual type"
NOT_LAST_DIM = "normalises over more than the last dimension"
DTYPE = "dtype other than float32, bfloat16, float16"
WEIGHT_SHAPE = "weight or bias does not match the last dimension"
MIXED_DTYPES = "weight dtype that the original rejects or promotes"
AUTOCAST = "autocast decides the dtype"
OVERRIDDEN = "a subclass overrides part of it"
JIT_TRACE = "inside torch.jit.trace"


def context() -> tuple[Callable[[], bool], Callable[[], object], Callable[[], bool]]:
    """Three questions about where a call is made, as functions a replacement keeps and calls.

    Public counterparts of the last two exist, but cost several times as much per call, or cannot be
    traced by Dynamo.

    Returns:
        Whether autograd records; the state of ``torch.jit.trace``, ``None`` outside (sizes are
        tensors inside, and comparing them would fix them in the trace); whether autocast is on for
        any device.
    """
    import torch

    return (
        torch.is_grad_enabled,
        torch._C._get_tracing_state,
        torch._C._is_any_autocast_enabled,
    )


def unfit_for_kernels() -> Callable[[Any, Any, Any], str | None]:
    """Why no kernel may be given three tensors, whatever their shapes and dtypes.

    Returns:
        A function of the three (twice the same one where there are two); None if a kernel may.
    """
    from torch import Tensor
    from torch.overrides import has_torch_function_variadic

    grad_enabled, jit_tracing, autocast = context()

    def unfit(x: Any, y: Any, z: Any) -> str | None:
        if jit_tracing() is not None:
            return JIT_TRACE
        if not (isinstance(x, Tensor) and isinstance(y, Tensor) and isinstance(z, Tensor)):
            return NOT_A_TENSOR
        if has_torch_function_variadic(x, y, z):
            return UNUSUAL_ARGUMENT
        if autocast():
            return AUTOCAST
        if grad_enabled() and (x.requires_grad or y.requires_grad or z.requires_grad):
            return GRADIENTS
        return None

    return unfit


class SignatureChanged(Exception):
    """The target takes other parameters than its replacement was written for."""


def dress(
    replacement: Callable[..., Any], original: Callable[..., Any], module: str, qualname: str
) -> None:
    """Give ``replacement`` the original's name, home, documentation and signature.

    ``__module__`` and ``__qualname__`` name the place that was patched, so the replacement pickles
    by that place and an unpatched process unpickles the original.

    Raises:
        SignatureChanged: the original's parameters, kinds or defaults differ from the
            replacement's. A builtin has no signature; it keeps the replacement's own.
    """
    if isinstance(original, FunctionType):
        if _plain_parameters(original) != _plain_parameters(replacement):
            theirs, ours = inspect.signature(original), inspect.signature(replacement)
            if _parameters(theirs) != _parameters(ours):
                raise SignatureChanged(f"takes {theirs}, known is {ours}")
        functools.update_wrapper(replacement, original)
        _share_names(replacement, original)
    else:
        # A builtin has nothing for inspect.signature to follow, so no __wrapped__ either.
        replacement.__doc__ = original.__doc__
        replacement.__name__ = qualname.rpartition(".")[2]
    replacement.__module__ = module
    replacement.__qualname__ = qualname
    # A code object of its own. Dynamo limits how often one is compiled, and all replacements that
    # one builder made share theirs: a ninth class would no longer be compiled.
    assert isinstance(replacement, FunctionType)
    replacement.__code__ = replacement.__code__.replace()


def _parameters(signature: inspect.Signature) -> list[tuple[Any, ...]]:
    """What two signatures must have in common; annotations may differ."""
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def _plain_parameters(function: Any) -> tuple[Any, ...]:
    """The same, read from the function itself.

    Two that are equal here have equal signatures unless a decorator states another one, and then
    they are made unequal.
    """
    if "__wrapped__" in vars(function) or "__signature__" in vars(function):
        return (id(function),)
    return parameters(function), function.__defaults__ or (), function.__kwdefaults__ or {}


def _share_names(replacement: Callable[..., Any], original: FunctionType) -> None:
    """Let ``torch.jit.script`` compile the original's source in the replacement's place.

    It follows ``__wrapped__`` to the source but resolves the names in it through the globals of the
    function it was given.
    """
    ours: dict[str, Any] = getattr(replacement, "__globals__")  # noqa: B009 - a Callable to mypy
    for name in original.__code__.co_names:
        if name in original.__globals__ and name not in ours:
            ours[name] = original.__globals__[name]
