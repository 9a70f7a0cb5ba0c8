"""Tables as the kernels take them, made once per table object and kept while it lives.

A model makes its rotary tables once per forward and hands the same objects to every layer. What a
kernel needs instead (real cosines and sines of full width, in four dimensions, on the device of x)
is made when a table is first met and found again by the object's identity. An entry is valid for
the very same objects, unwritten to since.

Nothing is kept of inference tensors, whose versions are not counted, nor where :mod:`..keeping`
says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mindiesd.ops.marks import PLAIN, Mark
from mindiesd.patches import keeping
from mindiesd.patches.keeping import modes, tracing, transforms

Tables: TypeAlias = tuple[Tensor, Tensor]
Sources: TypeAlias = tuple[Tensor, ...]
# From x, the tables a model passed and other facts: cos and sin, or why there are none.
Form: TypeAlias = Callable[[Tensor, Sources, Any], Tables | str]

TABLE_SHAPE = "tables are not of this input's shape"
RANGE = "tables outside of [-1, 1], which the Ascend kernel documents"

# Tables met at the same time, and kinds of x that meet one table.
SOURCES = 64
KINDS = 16

_jit: Callable[[], Any] = torch._C._get_tracing_state


class _Entry:
    """What was made of some table objects, and decided, by kind of x."""

    __slots__ = ("decided", "made", "marks")

    def __init__(self, marks: tuple[Mark, ...]) -> None:
        self.marks = marks
        self.made: dict[Any, Tables | str] = {}
        self.decided: dict[Any, Tables | str] = {}

    def holds(self, sources: Sources) -> bool:
        """Whether these are the objects it was made from, unwritten to since."""
        if len(sources) != len(self.marks):
            return False
        # Mark.holds for each, written out: every layer asks, and this takes half as long.
        for at, (reference, version, address) in enumerate(self.marks):
            source = sources[at]
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
        form: makes the tables.
        fits: whether x can be rotated by them.
        shared: whether the form looks at no more of x than its dtype and device, so that queries
            and keys with fewer heads share tables.
        bounded: whether tables may hold other numbers than sines and cosines, so that they are
            looked at before an Ascend kernel gets them; that waits for the device, once a table.
    """

    def __init__(
        self, form: Form, fits: Callable[[Tensor, Tables], bool], shared: bool, bounded: bool
    ) -> None:
        """Keep nothing yet."""
        self.form = form
        self.fits = fits
        self.shared = shared
        self.bounded = bounded
        self._entries: dict[int, _Entry] = {}

    def __len__(self) -> int:
        """How many tables have something kept for them."""
        return len(self._entries)

    def remembered(self, x: Any, sources: Sources, facts: Any) -> Tables | str | None:
        """What :meth:`find` returned for the like of x and these very tables; None if it did not.

        This is what all layers but the first go through, so nothing is asked twice: an entry is
        only ever made of plain tensors.
        """
        if tracing() or type(x) is not Tensor or modes() or _jit() or transforms() is not None:
            return None
        entry = self._entries.get(id(sources[0]))
        if entry is None or not entry.holds(sources):
            return None
        place = None
        if not x.is_cpu:
            place = keeping.place(x.device, x)
            if place is None:
                return None
        return entry.decided.get((x.shape, x.dtype, place, facts))

    def find(self, x: Tensor, sources: Sources, facts: Any = None) -> Tables | str:
        """cos and sin for x, or why it is not rotated by them; remembered with the tables.

        Args:
            x: what is to be rotated. Decisions depend on its shape, dtype and device only.
            sources: the tables as the model passes them, one at least.
            facts: whatever else they depend on; hashable.
        """
        if tracing() or modes() or transforms() is not None or type(x) not in PLAIN:
            return self._fitting(x, self.form(x, sources, facts))
        place = None
        if not x.is_cpu:
            place = keeping.place(x.device, x)
            if place is None:
                return self._fitting(x, self.form(x, sources, facts))
        entry = self._entries.get(id(sources[0]))
        if entry is None or not entry.holds(sources):
            fresh = self._enter(sources)
            if fresh is None:
                return self._fitting(x, self._made(x, sources, sources, facts))
            entry = fresh
        kind = (x.shape, x.dtype, place, facts)
        found = entry.decided.get(kind)
        if found is None:
            key = kind[1:] if self.shared else kind
            tables = entry.made.get(key)
            if tables is None:
                # Aliases that are no views: a view would keep the table itself alive.
                aliases = tuple(source.data for source in sources)
                with torch.inference_mode(False), torch.no_grad():
                    tables = self._made(x, sources, aliases, facts)
            if len(entry.decided) >= KINDS:
                entry.decided.clear()
                entry.made.clear()
            entry.made[key] = tables
            found = entry.decided[kind] = self._fitting(x, tables)
        return found

    def _fitting(self, x: Tensor, tables: Tables | str) -> Tables | str:
        return tables if isinstance(tables, str) or self.fits(x, tables) else TABLE_SHAPE

    def _made(self, x: Tensor, sources: Sources, aliases: Sources, facts: Any) -> Tables | str:
        tables = self.form(x, aliases, facts)
        if self.bounded and not isinstance(tables, str) and x.device.type == "npu":
            return tables if _within_one(sources, tables) else RANGE
        return tables

    def _enter(self, sources: Sources) -> _Entry | None:
        """A new entry, or None if nothing may be kept of these tables."""
        if any(type(source) not in PLAIN or source.is_inference() for source in sources):
            return None
        key, entries = id(sources[0]), self._entries

        def forget(reference: weakref.ref[Tensor]) -> None:
            entry = entries.get(key)
            if entry is not None and any(mark.tensor is reference for mark in entry.marks):
                entries.pop(key, None)

        entry = _Entry(tuple(Mark.of(source, forget) for source in sources))
        if len(entries) >= SOURCES:
            entries.clear()
        entries[key] = entry
        return entry


# Inference tensors have no version to keep a decision by. Whether their numbers are within bounds
# is remembered all the same: asking waits for the device, and would at every call.
_looked_at: MutableMapping[Tensor, bool] = torch.utils.weak.WeakIdKeyDictionary()


def _within_one(sources: Sources, tables: Tables) -> bool:
    first = sources[0]
    known = _looked_at.get(first) if first.is_inference() else None
    if known is None:
        # Sines and cosines may be one rounding beyond 1.
        limit = 1.0 + torch.finfo(tables[0].dtype).eps
        largest = [torch.linalg.vector_norm(table, torch.inf) for table in tables]
        known = torch.maximum(*largest).item() <= limit
        if first.is_inference():
            _looked_at[first] = known
    return bool(known)
