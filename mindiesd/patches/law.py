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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

GRADIENTS = "needs gradients"
DROPOUT = "dropout"
NOT_A_TENSOR = "not a tensor"
UNUSUAL_ARGUMENT = "argument of an unusual type"
NOT_LAST_DIM = "normalises over more than the last dimension"
DTYPE = "dtype other than float32, bfloat16, float16"
WEIGHT_SHAPE = "weight or bias does not match the last dimension"
MIXED_DTYPES = "weight dtype that the original rejects or promotes"
AUTOCAST = "autocast decides the dtype"
JIT_TRACE = "inside torch.jit.trace"


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these: training is never touched."""
    import torch

    return torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in tensors
    )


def autocast_on(tensor: Tensor) -> bool:
    """Whether autocast may choose other dtypes than the arguments' for ``tensor``'s device."""
    import torch

    return torch.is_autocast_enabled(tensor.device.type)


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
        theirs = inspect.signature(original).parameters.values()
        ours = inspect.signature(replacement).parameters.values()
        if [(p.name, p.kind, p.default) for p in ours] != [
            (p.name, p.kind, p.default) for p in theirs
        ]:
            raise SignatureChanged(
                f"takes {inspect.signature(original)}, known is {inspect.signature(replacement)}"
            )
        functools.update_wrapper(replacement, original)
    else:
        # A builtin has nothing for inspect.signature to follow, so no __wrapped__ either.
        replacement.__doc__ = original.__doc__
        replacement.__name__ = qualname.rpartition(".")[2]
    replacement.__module__ = module
    replacement.__qualname__ = qualname
