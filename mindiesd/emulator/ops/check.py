"""Limits of the operators: what the device refuses, it refuses with a RuntimeError."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INT_MAX = 2147483647

# Operator and overload -> the function that computes it.
Table: TypeAlias = dict[str, Callable[..., Any]]


def refuse(operator: str, reason: str) -> RuntimeError:
    """The error of the device for a call of ``operator`` that its documentation rules out."""
    return RuntimeError(f"npu::{operator}: {reason} (limit of the Ascend operator)")


def require(condition: bool, operator: str, reason: str) -> None:
    """Raise unless ``condition`` holds."""
    if not condition:
        raise refuse(operator, reason)


def require_dtype(operator: str, name: str, tensor: Tensor, allowed: Iterable[torch.dtype]) -> None:
    """Raise unless ``tensor`` has one of the dtypes of the operator's table."""
    allowed = tuple(allowed)
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise refuse(operator, f"{name} has dtype {tensor.dtype}; supported: {names}")
    if tensor.dtype == torch.bfloat16:
        from mindiesd.emulator.ops import soc

        require(not soc.is_310p(), operator, f"{name} is bfloat16, which Ascend310P does not have")


def not_emulated(operator: str, feature: str) -> NotImplementedError:
    """The error for what the device can do and the emulator cannot: never a wrong number."""
    return NotImplementedError(f"not emulated: npu::{operator} with {feature}")


def require_absent(operator: str, **features: object) -> None:
    """Raise for every optional argument that is given and that the emulator does not know."""
    for name, value in features.items():
        if value is not None:
            raise not_emulated(operator, name)
