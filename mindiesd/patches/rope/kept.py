"""Tables as the kernels take them, made once per table object and kept while it lives.

A model makes its rotary tables once per forward and hands the same objects to every layer. What a
kernel needs instead (real cosines and sines of full width, in four dimensions, on the device of x)
is made when a table is first met and found again by the object's identity. An entry is valid for
the very same objects, unwritten to since: a weak reference, so that nothing is kept alive, the
version counter and the address of the memory tell. Like everything that counts versions, it cannot
see writes through ``Tensor.data``.

Nothing is kept of inference tensors (their versions are not counted), while a graph is traced or
captured, and inside function transforms and dispatch modes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mindiesd.ops.backends.npu.call import frozen
from mindiesd.ops.backends.npu.derived import current_stream

Tables: TypeAlias = tuple[Tensor, Tensor]
Sources: TypeAlias = tuple[Tensor, ...]
# From x, the tables a model passed and other facts: cos and sin, or why x is not rotated by them.
Decide: TypeAlias = Callable[[Tensor, Sources, Any], Tables | str]

RANGE = "tables outside of [-1, 1], which the Ascend kernel documents"

# Tables met at the same time, and kinds of x that meet one table.
SOURCES = 64
KINDS = 16

_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer) if hasattr(torch.nn, "Buffer") else (Tensor,)

_dynamo: Callable[[], bool] = torch.compiler.is_dynamo_compiling
_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # type: ignore[attr-defined]
_transforms: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


class _Entry:
    """What was decided for some table objects, by kind of x."""

    __slots__ = ("decided", "marks")

    def __init__(self, marks: tuple[tuple[weakref.ref[Tensor], int, int], ...]) -> None:
        self.marks = marks
        self.decided: dict[Any, Tables | str] = {}

    def holds(self, sources: Sources) -> bool:
        """Whether these are the objects it was made from, unwritten to since."""
        if len(sources) != len(self.marks):
            return False
        for source, (reference, version, address) in zip(sources, self.marks, strict=True):
            if (
                reference() is not source
                or source._version != version
                or source.data_ptr() != address
            ):
                return False
        return True


class Kept:
    """A table of decisions; safe to use from several threads.

    Attributes:
        decide: makes a decision.
        bounded: whether tables may hold other numbers than sines and cosines, so that they are
            looked at before an Ascend kernel gets them; that waits for the device, once a table.
    """

    def __init__(self, decide: Decide, bounded: bool) -> None:
        """Keep nothing yet."""
        self.decide = decide
        self.bounded = bounded
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        """How many tables have something kept for them."""
        return len(self._entries)

    def find(self, x: Tensor, sources: Sources, facts: Any = None) -> Tables | str:
        """``decide(x, sources, facts)``, or what it said before of the same tables.

        Args:
            x: what is to be rotated. Decisions depend on its shape, dtype and device only.
            sources: the tables as the model passes them, one at least.
            facts: whatever else they depend on; hashable.
        """
        if _dynamo() or _modes() or _transforms() is not None or type(x) not in _PLAIN:
            return self.decide(x, sources, facts)
        place = None
        if not x.is_cpu:
            place = _place(x)
            if place is None:
                return self.decide(x, sources, facts)
        entry = self._entries.get(id(sources[0]))
        if entry is None or not entry.holds(sources):
            fresh = self._enter(sources)
            if fresh is None:
                return self._checked(self.decide(x, sources, facts), x, sources)
            entry = fresh
        kind = (x.shape, x.dtype, place, facts)
        found = entry.decided.get(kind)
        if found is None:
            # Aliases that are no views: a view would keep the table itself alive.
            aliases = tuple(source.data for source in sources)
            with torch.inference_mode(False), torch.no_grad():
                found = self._checked(self.decide(x, aliases, facts), x, sources)
            if len(entry.decided) >= KINDS:
                entry.decided.clear()
            entry.decided[kind] = found
        return found

    def _enter(self, sources: Sources) -> _Entry | None:
        """A new entry, or None if nothing may be kept of these tables."""
        if any(type(source) not in _PLAIN or source.is_inference() for source in sources):
            return None
        key, entries = id(sources[0]), self._entries

        def forget(reference: weakref.ref[Tensor]) -> None:
            entry = entries.get(key)
            if entry is not None and any(mark[0] is reference for mark in entry.marks):
                entries.pop(key, None)

        entry = _Entry(
            tuple((weakref.ref(s, forget), s._version, s.data_ptr()) for s in sources)
        )
        if len(entries) >= SOURCES:
            entries.clear()
        entries[key] = entry
        return entry

    def _checked(self, found: Tables | str, x: Tensor, sources: Sources) -> Tables | str:
        if self.bounded and not isinstance(found, str) and x.device.type == "npu":
            return found if _within_one(sources, found) else RANGE
        return found


def _place(x: Tensor) -> Any:
    """Device and stream on which tables for x are made; None if they may not be kept."""
    device = x.device
    if device.type == "npu":
        return None if frozen(x) else (device.index, current_stream(x))
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        return device.index, torch._C._cuda_getCurrentRawStream(device.index)
    return None


# Inference tensors have no version to keep a decision by. Whether their numbers are within bounds
# is remembered all the same: asking waits for the device, and would at every call.
_looked_at = torch.utils.weak.WeakIdKeyDictionary()


def _within_one(sources: Sources, tables: Tables) -> bool:
    first = sources[0]
    known = _looked_at.get(first) if first.is_inference() else None
    if known is None:
        # Sines and cosines may be one rounding beyond 1.
        limit = 1.0 + torch.finfo(tables[0].dtype).eps
        known = all(torch.linalg.vector_norm(t, torch.inf).item() <= limit for t in tables)
        if first.is_inference():
            _looked_at[first] = known
    return bool(known)
