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
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator import record

_SOFTMAX = frozenset({"aten::_softmax", "aten::softmax.int", "aten::_safe_softmax"})
_PRODUCTS = frozenset({"aten::matmul", "aten::bmm", "aten::mm", "aten::baddbmm"})
_CASTS = frozenset({"npu::npu_dtype_cast", "npu::_npu_dtype_cast"})
# The whole package: a redirected call belongs to the line that made it.
_HERE = str(Path(__file__).parent.parent) + "/"
_TORCH = str(Path(torch.__file__).parent)
_INSIDE = (_HERE, _TORCH + "/", _TORCH + "_npu/", "<frozen ", "<eval_with_key>")


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


def _site() -> str:
    """``file:line`` of the innermost frame that is neither torch's nor the emulator's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_INSIDE):
            shown = name
            marker = "site-packages/"
            if marker in name:
                shown = name[name.rindex(marker) + len(marker) :]
            return f"{shown}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return "<autograd>"


class Trace:
    """The counts of one ``with trace()`` block, over all threads of the process.

    Attributes:
        launches: launches by operator.
        sites: launches by calling line, then by operator.
        bytes_read: of the arguments of all launches.
        bytes_written: of their results.
        casts: dtype casts, as ``"float32 -> float16"``.
        layout_copies: hidden copies, as ``"npu::operator(argument)"``.
        layout_copy_bytes: what they read and write.
        squares: Sq x Skv tensors written, by operator.
        square_bytes: what they hold.
        transfers: ``"host -> device"``, ``"device -> host"`` and ``"item"``.
        transfer_bytes: what those moved.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.launches: Counter[str] = Counter()
        self.sites: dict[str, Counter[str]] = {}
        self.bytes_read = 0
        self.bytes_written = 0
        self.casts: Counter[str] = Counter()
        self.layout_copies: Counter[str] = Counter()
        self.layout_copy_bytes = 0
        self.squares: Counter[str] = Counter()
        self.square_bytes = 0
        self.transfers: Counter[str] = Counter()
        self.transfer_bytes = 0
        self._lock = threading.Lock()
        # Launches that may turn out to lead to a softmax: (operator, shape, bytes).
        self._chain: list[tuple[str, tuple[int, ...], int]] = []
        # The shape of the scores that the last softmax wrote.
        self._scores: tuple[int, ...] | None = None

    @property
    def total(self) -> int:
        """All launches."""
        return self.launches.total()

    def on_launch(self, name: str, inputs: Any, outputs: Any) -> None:
        """Count one kernel (called by the kernels)."""
        written = [tensor for tensor in _tensors(outputs) if tensor.numel()]
        if not written:
            return
        read = [tensor for tensor in _tensors(inputs) if tensor.device.type == "npu"]
        site = _site()
        with self._lock:
            self.launches[name] += 1
            self.sites.setdefault(site, Counter())[name] += 1
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

    def to_dict(self) -> dict[str, Any]:
        """Everything, for programs (JSON can hold it)."""
        return {
            "total_launches": self.total,
            "launches": dict(self.launches.most_common()),
            "sites": {
                site: dict(counts.most_common())
                for site, counts in sorted(self.sites.items(), key=lambda item: -item[1].total())
            },
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "casts": dict(self.casts.most_common()),
            "layout_copies": dict(self.layout_copies.most_common()),
            "layout_copy_bytes": self.layout_copy_bytes,
            "squares": dict(self.squares.most_common()),
            "square_bytes": self.square_bytes,
            "transfers": dict(self.transfers.most_common()),
            "transfer_bytes": self.transfer_bytes,
        }

    def __str__(self) -> str:
        """A short table, for people."""
        lines = [
            f"{self.total} launches, {_human(self.bytes_read)} read, "
            f"{_human(self.bytes_written)} written (counts only; the emulator has no clock)"
        ]
        for title, counts in (("", self.launches), ("cast ", self.casts)):
            lines += [f"{count:7}  {title}{name}" for name, count in counts.most_common()]
        for count, text in (
            (self.layout_copies.total(), f"hidden layout copies, {_human(self.layout_copy_bytes)}"),
            (self.squares.total(), f"Sq x Skv tensors written, {_human(self.square_bytes)}"),
            (self.transfers.total(), f"transfers, {_human(self.transfer_bytes)}"),
        ):
            lines.append(f"{count:7}  {text}")
        lines += ["by calling line:"]
        ranked = sorted(self.sites.items(), key=lambda item: -item[1].total())
        for site, counts in ranked[:20]:
            most = ", ".join(f"{count} {name}" for name, count in counts.most_common(4))
            lines.append(f"{counts.total():7}  {site}  ({most})")
        if len(ranked) > 20:
            lines.append(f"         and {len(ranked) - 20} more lines")
        return "\n".join(lines)


def _human(size: int) -> str:
    if size < 1024:
        return f"{size} B"
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


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
