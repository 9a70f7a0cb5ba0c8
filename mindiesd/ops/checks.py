"""Checks of plain arguments, shared by every public function.

Each returns the value it was given, in the one type the rest of the package works with, or raises
:class:`~mindiesd.errors.ParametersInvalid` naming the argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

from mindiesd.errors import ParametersInvalid

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def describe(value: object) -> str:
    """What an error message says was received: a tensor by its shape and dtype, never its data."""
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else f"shape {tuple(value.shape)}"
        return f"a tensor of {shape}, {value.dtype} on {value.device}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def tensor(name: str, value: object, rank: int | tuple[int, ...]) -> Tensor:
    """A dense floating-point tensor of the given rank (or one of the given ranks)."""
    ranks = (rank,) if isinstance(rank, int) else rank
    allowed = f"a dense floating-point tensor of {' or '.join(map(str, ranks))} dimensions"
    if not isinstance(value, Tensor) or value.is_nested or value.layout is not torch.strided:
        raise ParametersInvalid(name, describe(value), allowed)
    if value.dim() not in ranks or value.dtype not in FLOATING:
        raise ParametersInvalid(name, describe(value), allowed)
    return value


def same_kind(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors have one dtype and one device."""
    if value.dtype is not other.dtype:
        raise ParametersInvalid(name, describe(value), f"the dtype of {other_name}, {other.dtype}")
    same_device(name, value, other_name, other)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors are on one device."""
    if value.device != other.device:
        raise ParametersInvalid(
            name, describe(value), f"the device of {other_name}, {other.device}"
        )


def boolean(name: str, value: object) -> bool:
    """Really a bool: 0 and 1 are more often a misplaced positional argument than a flag."""
    if not isinstance(value, bool):
        raise ParametersInvalid(name, describe(value), "True or False")
    return value


def integer(name: str, value: Any, minimum: int, why: str = "") -> int:
    """An integer (no bool) of at least ``minimum``."""
    # torch.SymInt is what an int becomes while torch.compile traces dynamic shapes.
    whole = isinstance(value, int | Integral | torch.SymInt) and not isinstance(value, bool)
    if not whole or value < minimum:
        raise ParametersInvalid(name, describe(value), f"an int of at least {minimum}{why}")
    return cast(int, value if isinstance(value, int | torch.SymInt) else int(value))


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite real number (no bool) in [low, high]."""
    number = isinstance(value, int | float | Real) and not isinstance(value, bool)
    # A chain of comparisons is False for NaN, and torch.compile can trace it.
    if not number or not -math.inf < value < math.inf or not low <= value <= high:
        bounds = "" if low == -math.inf and high == math.inf else f" in [{low:g}, {high:g}]"
        raise ParametersInvalid(name, describe(value), f"a finite real number{bounds}")
    result: float = value if isinstance(value, int | float) else float(value)
    return result


def optional_real(name: str, value: object) -> float | None:
    """None, or a finite real number."""
    return None if value is None else real(name, value)


def choice(name: str, value: object, allowed: Sequence[Any]) -> Any:
    """One of the listed values, and of the same type (True is not 1)."""
    for option in allowed:
        if type(value) is type(option) and value == option:
            return option
    raise ParametersInvalid(name, describe(value), ", ".join(map(repr, allowed)))


def window(name: str, value: object) -> tuple[int, int]:
    """A flash-attention window (left, right); -1 is unlimited."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ParametersInvalid(name, describe(value), "None or a pair of ints (left, right)")
    left, right = (integer(name, side, -1, " in each place (-1: unlimited)") for side in value)
    return left, right


def forward_only(**tensors: object) -> None:
    """No gradient is asked for: the fused kernels of some backends have no backward."""
    if torch.is_grad_enabled():
        for name, value in tensors.items():
            if isinstance(value, Tensor) and value.requires_grad:
                raise ParametersInvalid(
                    name,
                    "a tensor that requires a gradient",
                    "tensors without one, or a call under torch.no_grad(): this is forward-only",
                )
