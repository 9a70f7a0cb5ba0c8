"""What a script written for CUDA calls its device, in the NPU's words.

torch_npu's ``transfer_to_npu`` replaces the text "cuda" inside of *any* text that is given by
position (``torch.load("/data/cuda/x.pt")`` then looks for ``/data/npu/x.pt``), and its wrappers
break the graph under Dynamo. The functions here take their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

# The arguments that name devices, as in transfer_to_npu.
ARGUMENTS = frozenset({"device", "device_type", "map_location", "device_id", "device_ids"})


def of_npu(value: Any) -> Any:
    """``value`` with a CUDA device, or those in a mapping or sequence, named as an NPU."""
    if type(value) is str:
        return "npu" + value[4:] if value[:4] == "cuda" and value[4:5] in ("", ":") else value
    if type(value) is torch.device:
        if value.type != "cuda":
            return value
        return torch.device("npu") if value.index is None else torch.device("npu", value.index)
    if type(value) is dict:
        return {of_npu(key): of_npu(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)([of_npu(each) for each in value])
    return value


def translated(original: Callable[..., Any], numbers: bool) -> Callable[..., Any]:
    """``original`` with every device that is CUDA's taken for the NPU's.

    Args:
        original: a function of torch.
        numbers: whether a whole number given by position is a device (``Module.to(0)``).

    Returns:
        A function that ``torch.compile`` can trace where it can trace the original.
    """

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in args:
            kind = type(value)
            if kind is str or kind is torch.device or kind is dict or (numbers and kind is int):
                args = tuple([_given(each, numbers) for each in args])
                break
        for name in kwargs:
            if name in ARGUMENTS:
                value = kwargs[name]
                kwargs[name] = f"npu:{value}" if type(value) is int else of_npu(value)
        return original(*args, **kwargs)

    return call


def _given(value: Any, numbers: bool) -> Any:
    if numbers and type(value) is int:
        return f"npu:{value}"
    # A list given by position is a shape or data.
    return value if type(value) in (list, tuple) else of_npu(value)
