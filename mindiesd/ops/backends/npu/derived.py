"""Tensors made from other tensors, once: inverted masks, biases in another form, cast tables.

A mask is the same for every layer of a step, and often for every step. What a kernel needs instead
of it is kept here for as long as the tensor lives **and is not written to**: an entry is valid for
one object, one version of its memory and one address, one way of looking at it and one stream.
Views count by the tensor they look into, since attention layers make them anew at each call.

Nothing is kept of inference tensors (their versions are not counted), of tensors of a subclass, and
under tracing or graph capture the callers do not come here.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mindiesd.ops.marks import PLAIN, Mark

T = TypeVar("T")

# Tensors whose derivatives are kept, derivatives of one, and the bytes of one that is too large.
SOURCES = 16
FORMS = 8
LARGEST = 256 << 20


class _Entry:
    __slots__ = ("forms", "mark")

    def __init__(self, mark: Mark) -> None:
        self.mark = mark
        self.forms: OrderedDict[Hashable, Any] = OrderedDict()


class Derived:
    """A bounded table of derivatives; safe to use from several threads."""

    def __init__(self) -> None:
        """Start empty."""
        self._lock = threading.RLock()
        self._entries: OrderedDict[int, _Entry] = OrderedDict()

    def __len__(self) -> int:
        """How many tensors have something kept for them."""
        return len(self._entries)

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()

    def get(self, source: Tensor, key: Hashable, build: Callable[[], T]) -> T:
        """``build()``, or what it returned when last asked for this source and key.

        Args:
            source: what the result depends on, besides the key.
            key: which result.
            build: makes it; must return tensors with memory of their own.
        """
        if type(source) not in PLAIN or source.is_inference():
            return build()
        root = source if source._base is None else source._base
        # Views have the version of what they look into, and keep its memory.
        form = (
            key,
            source.data_ptr() - root.data_ptr(),
            source.shape,
            source.stride(),
            source.storage_offset(),
            source.dtype,
            current_stream(source),
        )
        # Under the lock, so that several threads in need of one mask make it once. Building only
        # queues kernels.
        with self._lock:
            entry = self._entries.get(id(root))
            if entry is None or not entry.mark.holds(root):
                entry = self._new_entry(root)
            self._entries.move_to_end(id(root))
            if form in entry.forms:
                entry.forms.move_to_end(form)
                kept: T = entry.forms[form]
                return kept
            with torch.no_grad():
                made = build()
            if _bytes(made) <= LARGEST:
                entry.forms[form] = made
                if len(entry.forms) > FORMS:
                    entry.forms.popitem(last=False)
            return made

    def _new_entry(self, root: Tensor) -> _Entry:
        key = id(root)
        table = weakref.ref(self)

        def forget(reference: weakref.ref[Tensor]) -> None:
            owner = table()
            if owner is not None:
                owner._forget(key, reference)

        entry = _Entry(Mark.of(root, forget))
        self._entries[key] = entry
        if len(self._entries) > SOURCES:
            self._entries.popitem(last=False)
        return entry

    def _forget(self, key: int, reference: weakref.ref[Tensor]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.mark.tensor is reference:
                del self._entries[key]


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, tuple) else 0


def current_stream(tensor: Tensor) -> Hashable:
    """The stream of the tensor's device that kernels are queued on; None off the NPU."""
    device = tensor.device
    if device.type != "npu":
        return None
    import torch_npu

    # The public torch.npu.current_stream costs fifty times as much.
    ask = getattr(torch_npu._C, "_npu_getCurrentStream", None)
    stream: Hashable = (
        ask(device.index) if ask is not None else torch.npu.current_stream(device).npu_stream  # type: ignore[attr-defined]
    )
    return stream


TABLE = Derived()
_constants: dict[tuple[object, ...], Tensor] = {}
_constants_lock = threading.Lock()
# How many of one kind are kept: there is one triangle a device, and few norms without a weight, but
# the masks of windows are many and large.
CONSTANTS = 8


def derived(frozen: bool, source: Tensor, key: Hashable, build: Callable[[], T]) -> T:
    """``build()``, kept with ``source`` unless the call is traced or captured (``frozen``)."""
    if frozen:
        return build()
    return TABLE.get(source, key, build)


def constant(frozen: bool, key: tuple[object, ...], build: Callable[[], Tensor]) -> Tensor:
    """A tensor that depends on nothing but ``key``, made once per device.

    Args:
        frozen: whether the call is traced or captured; then it is made in the graph.
        key: its kind, then device and parameters.
        build: makes it.
    """
    if frozen:
        return build()
    found = _constants.get(key)
    if found is not None:
        return found
    with _constants_lock:
        found = _constants.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = build()
            # From now on every stream may read it.
            torch.npu.current_stream(found.device).synchronize()  # type: ignore[attr-defined]
            alike = [other for other in _constants if other[0] == key[0]]
            if len(alike) >= CONSTANTS:
                del _constants[alike[0]]
            _constants[key] = found
    return found
