"""A trace that also tells apart kinds of hidden copies and kinds of softmax."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mindiesd.emulator import record
from mindiesd.emulator.trace import Trace

SOFTMAX = frozenset({"aten::_softmax", "aten::softmax.int", "aten::_safe_softmax"})
PRODUCTS = frozenset({"aten::matmul", "aten::bmm", "aten::mm", "aten::baddbmm", "aten::addmm"})


def kind_of_copy(tensor: Tensor, others: Sequence[Tensor] = ()) -> str:
    """Why a fused operator's argument is not contiguous.

    ``"view"``: its memory is dense, in another order of dimensions, and the call could have been
    made in that order. ``"needed"``: dense likewise, but not innermost in its last dimension, or
    in another order than the call's other tensors, of which one or the other has to be copied in
    any layout. ``"repeat"``: it repeats memory (stride 0). ``"slice"``: its rows lie apart in a
    larger tensor.

    Args:
        tensor: the argument.
        others: the query, key and value of an attention, of which it is one.
    """
    strides = tensor.stride()
    if any(stride == 0 and size > 1 for stride, size in zip(strides, tensor.shape, strict=True)):
        return "repeat"
    # Dense in the order of its strides: each dimension begins where the ones inside it end.
    inside = 1
    for stride, size in sorted(zip(strides, tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != inside:
            return "slice"
        inside *= size
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        return "needed"
    if tensor.dim() == 4 and not all(other.transpose(1, 2).is_contiguous() for other in others):
        return "needed"
    return "view"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class Counts(Trace):
    """A trace with two more counters.

    Attributes:
        copies: hidden copies by kind, see :func:`kind_of_copy`.
        softmaxes: ``"attention"`` if the result, or something computed from it of the same shape,
            is the left factor of a matrix product of three or more dimensions; else ``"other"``,
            such as the router of a mixture of experts.
    """

    def __init__(self) -> None:
        """Start with nothing counted."""
        super().__init__()
        self.copies: Counter[str] = Counter()
        self.softmaxes: Counter[str] = Counter()
        # Weights that are not multiplied with anything yet; kept, so that memory is not used again.
        self._weights: list[tuple[int, Tensor]] = []
        self._found: set[int] = set()

    def on_launch(self, name: str, inputs: Any, outputs: Any) -> None:
        """Count one kernel (called by the kernels)."""
        super().on_launch(name, inputs, outputs)
        if name.startswith("npu::"):
            three = inputs[0][:3] if "attention" in name else ()
            for tensor in _tensors(inputs):
                if tensor.device.type == "npu" and tensor.numel() and not tensor.is_contiguous():
                    self.copies[kind_of_copy(tensor, three)] += 1
        written = [tensor for tensor in _tensors(outputs) if tensor.numel()]
        if name in SOFTMAX and written:
            self.softmaxes["other"] += 1
            self._weights.append((self.softmaxes.total(), written[0]))
        elif self._weights:
            self._follow(name, [*_tensors(inputs)], written)

    def _follow(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        for number, weights in self._weights[-8:]:
            memory = weights.untyped_storage().data_ptr()
            users = [t for t in read if t.untyped_storage().data_ptr() == memory]
            if not users:
                continue
            if name in PRODUCTS:
                if users[0] is read[0] and weights.dim() >= 3 and number not in self._found:
                    self._found.add(number)
                    self.softmaxes["other"] -= 1
                    self.softmaxes["attention"] += 1
            elif written and written[0].numel() == weights.numel():
                self._weights.append((number, written[0]))


@contextmanager
def counting() -> Iterator[Counts]:
    """Count what the emulated device is asked to do in this block."""
    counted = Counts()
    record.add(counted)
    try:
        yield counted
    finally:
        record.remove(counted)
