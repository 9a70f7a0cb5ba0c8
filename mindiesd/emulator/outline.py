"""Runs a model of any size for what it launches: large tensors get a shape, a dtype and no values.

    with outline():
        weights = torch.empty(14_000_000_000, device="npu")   # memory is reserved, never touched
        withhold(weights)
        with trace() as t:
            model(...)

The device, torch_npu, the dispatcher and the counts are those of the emulator; only the arithmetic
is left out. A tensor whose values are withheld, and everything computed from one, is *unknown*. A
kernel with an unknown argument computes shape, strides and dtype alone, on torch's meta device; so
does one with more than :data:`LIMIT` elements. Every other kernel computes as always, so masks,
positions and rotary tables are real, and decisions taken on their values come out as they would.

Who wants a value that is not there, gets an error, never a made-up number: reading one on the host
raises NotImplementedError, and so does an operator whose result has a shape that depends on values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator import runtime

LIMIT = 1 << 24
"""Kernels of more elements than this are not computed."""

_broadcast: Any = torch.broadcast_shapes
_CPU = torch.device("cpu")
_META = torch.device("meta")
# The kernel that runs now shall not compute (read by mindiesd.emulator.alias).
now = False
_active = False
_MARK = "_mindiesd_unknown"


@contextmanager
def outline() -> Iterator[None]:
    """Leave out the arithmetic of kernels with unknown arguments, in this block.

    Raises:
        EmulatorUnavailable: the emulated NPU has not been started.
    """
    global _active
    runtime.reserve_only(True)
    before, _active = _active, True
    try:
        yield
    finally:
        _active = before
        runtime.reserve_only(before)


def withhold(tensor: Tensor) -> Tensor:
    """Make the values of an NPU tensor, and of all that shares its memory, unknown."""
    setattr(tensor.untyped_storage(), _MARK, True)
    return tensor


def is_unknown(tensor: Tensor) -> bool:
    """Whether the values of an NPU tensor are unknown."""
    return hasattr(tensor.untyped_storage(), _MARK)


def device() -> torch.device:
    """Where the kernel that runs now computes: the CPU, or, if nothing is computed, nowhere."""
    return _META if now else _CPU


def refuse_reading(name: str) -> None:
    """Raise if the kernel that runs now, which gives values to the host, has none to give."""
    if now:
        raise NotImplementedError(
            f"not outlined: {name} reads values that were never computed: "
            f"they are unknown, or more than {LIMIT}"
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.device.type == "npu":
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_large(tensors: list[Tensor], size: Any) -> bool:
    if size is not None and torch.Size(size).numel() > LIMIT:
        return True
    try:
        elements = torch.Size(_broadcast(*(tensor.shape for tensor in tensors))).numel()
    except RuntimeError:  # no elementwise operator
        elements = 0
    return max([elements, *(tensor.numel() for tensor in tensors)]) > LIMIT


def outlined(kernel: Callable[..., Any], schema: Any) -> Callable[..., Any]:
    """``kernel``, which computes only what is known wherever there is an outline.

    Args:
        kernel: one of the device's.
        schema: its operator's.
    """
    written = [
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]

    names = [argument.name for argument in schema.arguments]
    made = names.index("size") if "size" in names else None

    def either(*args: Any, **kwargs: Any) -> Any:
        global now
        if not _active:
            return kernel(*args, **kwargs)
        tensors = [*_tensors(args), *_tensors(kwargs)]
        size = None if made is None else args[made] if made < len(args) else kwargs.get("size")
        before, now = now, any(map(is_unknown, tensors)) or _is_large(tensors, size)
        try:
            result = kernel(*args, **kwargs)
            if now:
                changed = [
                    args[index] if index < len(args) else kwargs.get(name)
                    for index, name in written
                ]
                for tensor in _tensors([result, changed]):
                    withhold(tensor)
        except NotImplementedError as error:
            if now and not str(error).startswith(("not outlined", "not emulated")):
                message = f"not outlined: {schema.name} gives what depends on values"
                raise NotImplementedError(message) from error
            raise
        finally:
            now = before
        return result

    either.__name__ = either.__qualname__ = kernel.__name__
    return either
