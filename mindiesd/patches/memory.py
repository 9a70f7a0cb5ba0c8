"""Results of pure functions of tensors, kept while those tensors live and are not written to.

A sampler hands the same position ids to the model at every step, and the model makes the same
tables of them every time. A result is found again by the identity of the tensors it was made from
(views count by the tensor they look into), their version counters and the addresses of their
memory, and by the numbers it depends on besides. It is made anew when it was written to itself.

Nothing is kept of inference tensors, whose versions are not counted, nor where :mod:`.keeping` says
so.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mindiesd.ops.marks import PLAIN, Mark
from mindiesd.patches import keeping

# Results that are kept at a time, the bytes of one that is too large, and of all together. What is
# too large here takes little of the time of a step.
RESULTS = 64
LARGEST = 64 << 20
TOTAL = 256 << 20


class _Entry(NamedTuple):
    sources: tuple[Mark, ...]
    result: Any
    versions: tuple[int, ...]
    size: int


class Memory:
    """A bounded table of results; safe to use from several threads."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.RLock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def __len__(self) -> int:
        """How many results are kept."""
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def recall(
        self,
        key: Hashable,
        sources: tuple[Tensor, ...],
        device: torch.device,
        make: Callable[[], Any],
    ) -> Any:
        """``make()``, or what it returned when last asked for the same.

        Args:
            key: what the result depends on besides the sources; tells functions apart, too.
            sources: what it is made from.
            device: where the result is.
            make: makes it; must return a tensor or a tuple of tensors that share no memory with
                the sources. Anything else is returned and not kept.
        """
        place = _place(device, sources)
        if place is None:
            return make()
        roots = tuple(source if source._base is None else source._base for source in sources)
        full = (
            key,
            place,
            tuple(map(id, roots)),
            tuple((s.shape, s.stride(), s.storage_offset(), s.dtype) for s in sources),
        )
        with self._lock:
            entry = self._entries.get(full)
            if entry is not None:
                if all(map(Mark.holds, entry.sources, roots)) and entry.versions == tuple(
                    tensor._version for tensor in _tensors(entry.result)
                ):
                    self._entries.move_to_end(full)
                    return entry.result
                del self._entries[full]
            with torch.inference_mode(False), torch.no_grad():
                result = make()
            size = _size(result, roots)
            if size is None:
                return result

            def forget(_: Any) -> None:
                self._entries.pop(full, None)

            marks = tuple(Mark.of(root, forget) for root in roots)
            versions = tuple(tensor._version for tensor in _tensors(result))
            self._entries[full] = _Entry(marks, result, versions, size)
            total = sum(kept.size for kept in list(self._entries.values()))
            while len(self._entries) > RESULTS or total > TOTAL:
                total -= self._entries.popitem(last=False)[1].size
            return result


def _place(device: torch.device, sources: tuple[Tensor, ...]) -> Hashable | None:
    """Device and stream; None if nothing may be kept here and now."""
    if keeping.tracing() or keeping.modes() or keeping.transforms() is not None:
        return None
    for source in sources:
        if type(source) not in PLAIN or source.is_inference() or source.requires_grad:
            return None
    return keeping.place(device)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if type(result) is tuple else (result,)


def _size(result: Any, roots: tuple[Tensor, ...]) -> int | None:
    """The bytes of a result; None if it must not be kept."""
    owned = {root.untyped_storage().data_ptr() for root in roots}
    size = 0
    for tensor in _tensors(result):
        if type(tensor) is not Tensor or tensor.is_inference() or tensor.requires_grad:
            return None
        if tensor.numel() and tensor.untyped_storage().data_ptr() in owned:
            return None  # it would keep its source alive
        size += tensor.untyped_storage().nbytes()
    return size if size <= LARGEST else None


MEMORY = Memory()
"""What the patches of this process remember."""


class Recent:
    """A function of one tensor whose results :data:`MEMORY` keeps; the last one is found sooner.

    What every block of a model asks for in turn is the same, and a look at the table would cost
    more than some of what it saves.
    """

    def __init__(self, key: Hashable, make: Callable[[Tensor], Tensor]) -> None:
        """Remember ``make(x)`` under ``key``."""
        self._key = key
        self._make = make
        self._local = threading.local()

    def __call__(self, x: Tensor) -> Tensor:
        """``make(x)``; x is no inference tensor."""
        kept: tuple[Mark, Mark, Hashable] | None = getattr(self._local, "kept", None)
        if kept is not None and kept[0].holds(x) and kept[2] == _place(x.device, (x,)):
            last = kept[1].tensor()
            if last is not None and last._version == kept[1].version:
                return last
        result: Tensor = MEMORY.recall(self._key, (x,), x.device, lambda: self._make(x))
        place = _place(x.device, (x,))
        if place is not None and _size(result, (x,)) is not None:
            self._local.kept = Mark.of(x), Mark.of(result), place
        return result


SILU = Recent("silu", lambda x: torch.nn.functional.silu(x))
"""The SiLU of a conditioning."""

ONE_MORE = Recent("1 + x", lambda x: 1 + x)
"""1 added to a projection of the conditioning, of which parts are scales."""

PAIRS = Recent("pairs", lambda x: x.repeat_interleave(2, dim=1, output_size=2 * x.shape[1]))
"""Angles, each twice in a row: the cosines and the sines of pairs of channels are taken of them."""
