"""What the emulated device was asked to do: launches, bytes, casts, copies. Never a time.

    with trace() as t:
        pipe(...)
    print(t)

What counts:

- **launch**: one operator for which the dispatcher called a kernel of the device. Views and
  operators that only describe or allocate memory are none; neither are operators that torch_npu
  sends back to the host (they show as transfers) or whose result is empty.
- **transfer**: memory that moved between host and device, a number read by ``item()`` included.
- **cast**: a launch that only changes a dtype.
- **layout copy**: a tensor argument of a fused (``npu::``) operator that is not contiguous in the
  layout the call names. It is not a launch that the dispatcher sees: CANN's aclnn functions make
  such an argument contiguous themselves before their kernel runs (``l0op::Contiguous``), and the
  documentation of the inference attention kernels rules it out altogether. So BNSD tensors that are
  transposed views of [B, S, N, D] memory count as copied, the same memory passed as BSND does not,
  and slices of one fused qkv tensor do count. Which strides the real kernels take natively was not
  measured; this counts every doubt as a copy.
- **square**: a score or mask tensor of Sq x Skv elements written to memory: every launch of a
  softmax over a tensor of three or more dimensions, with the launches of the same shape just before
  it and, until the next matrix product, after it; and every bool tensor of two or more dimensions
  that a launch wrote.

Bytes are those of the arguments and results of the launches, each tensor once per launch, as if it
were dense; what a kernel keeps for itself is not known.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator import record
from mindiesd.emulator.counts import Counts, shown, stack

_SOFTMAX = frozenset({"aten::_softmax", "aten::softmax.int", "aten::_safe_softmax"})
_PRODUCTS = frozenset({"aten::matmul", "aten::bmm", "aten::mm", "aten::baddbmm"})
_CASTS = frozenset({"npu::npu_dtype_cast", "npu::_npu_dtype_cast"})
# The whole package: a redirected call belongs to the line that made it.
_HERE = str(Path(__file__).parent.parent) + "/"
_TORCH = str(Path(torch.__file__).parent)
_INSIDE = (_HERE, _TORCH + "/", _TORCH + "_npu/", "<frozen ", "<eval_with_key>")
# Enough to look past a patched function that calls another one.
_DEPTH = 4
_NOBODY = "<autograd>"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _frames() -> tuple[tuple[str, int], ...]:
    """File and line of the innermost frames that are neither torch's nor ours."""
    found: list[tuple[str, int]] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < _DEPTH:
        name = frame.f_code.co_filename
        if not name.startswith(_INSIDE):
            found.append((name, frame.f_lineno))
        if frame.f_back is None:
            break
        frame = frame.f_back
    return tuple(found)


@cache
def _lines(frames: tuple[tuple[str, int], ...]) -> tuple[str, str]:
    """The calling line, and the key of the stack above it."""
    lines = [f"{shown(name)}:{number}" for name, number in frames] or [_NOBODY]
    return lines[0], stack(lines)


class Trace(Counts):
    """The counts of one ``with trace()`` block, over all threads of the process."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        super().__init__()
        self._lock = threading.Lock()
        # Launches that may turn out to lead to a softmax: (operator, shape, bytes).
        self._chain: list[tuple[str, tuple[int, ...], int]] = []
        # The shape of the scores that the last softmax wrote.
        self._scores: tuple[int, ...] | None = None

    def forget(self) -> None:
        """Count from zero: a forked child has launched nothing of what its parent did."""
        self.__init__()  # type: ignore[misc]

    def on_launch(self, name: str, inputs: Any, outputs: Any) -> None:
        """Count one kernel (called by the kernels)."""
        written = [tensor for tensor in _tensors(outputs) if tensor.numel()]
        if not written:
            return
        read = [tensor for tensor in _tensors(inputs) if tensor.device.type == "npu"]
        site, key = _lines(_frames())
        with self._lock:
            self.launches[name] += 1
            self.sites.setdefault(site, Counter())[name] += 1
            self.stacks[key] += 1
            self.bytes_read += sum(map(_bytes, read))
            self.bytes_written += sum(map(_bytes, written))
            if name in _CASTS:
                self.casts[f"{_short(read[0].dtype)} -> {_short(written[0].dtype)}"] += 1
            if name.startswith("npu::"):
                self._count_layout_copies(name, inputs)
            self._count_squares(name, written)

    def on_copy(self, name: str, source: Tensor, target: Tensor | None) -> None:
        """Count one copy (called by the kernels)."""
        if target is None:
            with self._lock:
                self.transfers["item"] += 1
                self.transfer_bytes += _bytes(source)
            return
        if not target.numel():
            return
        ways = (source.device.type == "npu", target.device.type == "npu")
        cast = source.dtype != target.dtype
        if ways != (True, True):
            with self._lock:
                way = "host -> device" if ways[1] else "device -> host"
                self.transfers[way] += 1
                self.transfer_bytes += _bytes(target)
            if not cast or not ways[0]:
                return  # what comes from the host is converted there
        if cast:
            with self._lock:
                self.casts[f"{_short(source.dtype)} -> {_short(target.dtype)}"] += 1
        self.on_launch(name, (source,), target)

    def _count_layout_copies(self, name: str, inputs: Any) -> None:
        base, _, overload = name.removeprefix("npu::").partition(".")
        schema = getattr(getattr(torch.ops.npu, base), overload or "default")._schema
        args, kwargs = inputs
        named = [
            *zip((argument.name for argument in schema.arguments), args, strict=False),
            *kwargs.items(),
        ]
        for argument, value in named:
            for tensor in _tensors(value):
                if tensor.device.type == "npu" and tensor.numel() and not tensor.is_contiguous():
                    self.layout_copies[f"{name}({argument})"] += 1
                    self.layout_copy_bytes += 2 * _bytes(tensor)

    def _count_squares(self, name: str, written: list[Tensor]) -> None:
        first = written[0]
        if first.dim() < 2 or min(first.shape[-2:]) < 2:
            return
        # matmul flattens leading dimensions; the last two and the size stay the same.
        shape = (*first.shape[-2:], first.numel())
        if name in _PRODUCTS:
            self._scores = None
        if first.dtype == torch.bool or shape == self._scores:
            self._square(name, _bytes(first))
        elif name in _SOFTMAX:
            if first.dim() >= 3:
                for led, before, size in self._chain:
                    if before == shape:
                        self._square(led, size)
                self._square(name, _bytes(first))
                self._scores = shape
            self._chain.clear()
        else:
            self._chain.append((name, shape, _bytes(first)))
            del self._chain[:-16]

    def _square(self, name: str, size: int) -> None:
        self.squares[name] += 1
        self.square_bytes += size


class _CallableModule(ModuleType):
    """``mindiesd.emulator.trace`` names a function and a module; calling either is the same."""

    def __call__(self) -> AbstractContextManager[Trace]:
        return trace()


sys.modules[__name__].__class__ = _CallableModule


@contextmanager
def trace() -> Iterator[Trace]:
    """Count what the emulated device is asked to do in this block, in all threads."""
    counted = Trace()
    record.add(counted)
    try:
        yield counted
    finally:
        record.remove(counted)
