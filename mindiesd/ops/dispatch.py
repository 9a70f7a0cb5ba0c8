"""Which kernel a call asked for: ``opt_mode``, ``op_type`` and ``layout``, one table for all.

``static`` leaves the choice to the backend, which makes it from the device, the dtype and the kind
of mask alone: the same call always takes the same kernel. ``runtime`` lets a backend with several
kernels time those that may take the call, once per kind of call (:class:`Fastest`); never while a
call is traced or captured into a graph, and redirected calls do not ask for it. ``manual`` names
the kernel. A backend without a choice computes the same result with the kernel it has.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

from mindiesd.errors import ParametersInvalid
from mindiesd.ops.checks import choice

MODES = ("runtime", "static", "manual")
OPERATORS = ("prompt_flash_attn", "fused_attn_score", "ascend_laser_attention")
LAYOUTS = ("BNSD", "BSND", "BSH")

# Overrides op_type, in manual mode only.
OPERATOR_VARIABLE = "MINDIE_SD_FA_TYPE"
_ENCODED = os.environ.encodekey(OPERATOR_VARIABLE)


class Kernel(NamedTuple):
    """The kernel that a manual call asks for.

    Attributes:
        operator: one of :data:`OPERATORS`.
        layout: one of :data:`LAYOUTS`, the layout handed to the kernel, not the caller's.
    """

    operator: str
    layout: str


# What a backend is given in the runtime mode: the fastest, not the first.
MEASURED = Kernel("measured", "")

KERNELS = {(name, layout): Kernel(name, layout) for name in OPERATORS for layout in LAYOUTS}


def requested(
    opt_mode: str = "runtime", op_type: str = "fused_attn_score", layout: str = "BNSD"
) -> Kernel | None:
    """The kernel a call names, or None where the backend is to choose.

    Args:
        opt_mode: ``"runtime"``, ``"static"`` or ``"manual"``.
        op_type: one of :data:`OPERATORS`; effective in manual mode, where the environment variable
            ``MINDIE_SD_FA_TYPE`` overrides it.
        layout: one of :data:`LAYOUTS`; effective in manual mode.

    Raises:
        ParametersInvalid: a value is not in its table, effective or not.
    """
    try:
        kernel = KERNELS[op_type, layout]
    except (KeyError, TypeError):
        # Not in the table, or unhashable: one of the two is wrong.
        choice("op_type", op_type, OPERATORS)
        choice("layout", layout, LAYOUTS)
        raise
    if opt_mode != "manual":
        if opt_mode != "runtime" and opt_mode != "static":
            choice("opt_mode", opt_mode, MODES)
        return None
    # Looking up an unset variable raises and catches inside os.environ, for a microsecond; the
    # dictionary behind it answers at once.
    data = getattr(os.environ, "_data", None)
    if data is not None and _ENCODED not in data:
        return kernel
    override = os.environ.get(OPERATOR_VARIABLE)
    if override is None:
        return kernel
    if override not in OPERATORS:
        raise ParametersInvalid(
            f"environment variable {OPERATOR_VARIABLE}", override, ", ".join(OPERATORS)
        )
    return KERNELS[override, layout]


T = TypeVar("T")


class Chosen(NamedTuple, Generic[T]):
    """The outcome of one measurement.

    Attributes:
        winner: the fastest candidate; None if every one failed.
        dropped: the candidates that failed, each with the error in a line.
    """

    winner: T | None
    dropped: tuple[tuple[T, str], ...]


class _Measurement(Generic[T]):
    __slots__ = ("chosen", "done")

    def __init__(self) -> None:
        self.chosen: Chosen[T] | None = None
        self.done = threading.Event()


class Fastest(Generic[T]):
    """The fastest of some candidates by kind of call, measured once per kind, also by threads.

    The table is bounded: what was not asked for longest is forgotten first.
    """

    def __init__(self, size: int = 512) -> None:
        """Start with nothing measured.

        Args:
            size: how many kinds are remembered.
        """
        self._size = size
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, _Measurement[T]] = OrderedDict()

    def __len__(self) -> int:
        """How many kinds are remembered."""
        return len(self._known)

    def clear(self) -> None:
        """Forget every measurement."""
        with self._lock:
            self._known.clear()

    def known(self, key: Hashable) -> Chosen[T] | None:
        """What was measured for this kind, without measuring."""
        found = self._known.get(key)
        return None if found is None else found.chosen

    def of(self, key: Hashable, candidates: Sequence[T], time: Callable[[T], float]) -> Chosen[T]:
        """The fastest candidate; threads that come during the measurement wait for it.

        Args:
            key: the kind of call.
            candidates: what may take it; the first wins a tie.
            time: measures one; a candidate for which it raises, or that took no number of
                milliseconds, is dropped.
        """
        while True:
            with self._lock:
                found = self._known.get(key)
                mine = found is None
                if found is None:
                    found = self._known[key] = _Measurement()
                    if len(self._known) > self._size:
                        self._known.popitem(last=False)
                else:
                    self._known.move_to_end(key)
            if mine:
                try:
                    found.chosen = _measure(candidates, time)
                finally:
                    if found.chosen is None:
                        # Interrupted: whoever waits measures instead.
                        with self._lock:
                            if self._known.get(key) is found:
                                del self._known[key]
                    found.done.set()
            else:
                found.done.wait()
            if found.chosen is not None:
                return found.chosen


def _measure(candidates: Sequence[T], time: Callable[[T], float]) -> Chosen[T]:
    best: T | None = None
    least = float("inf")
    dropped = []
    for candidate in candidates:
        try:
            taken = time(candidate)
        except Exception as error:  # noqa: BLE001 # whatever a kernel raises rules it out
            lines = str(error).strip().splitlines()
            dropped.append((candidate, f"{type(error).__name__}: {lines[0] if lines else ''}"))
            continue
        if taken != taken:  # NaN
            dropped.append((candidate, "no time was measured"))
        elif best is None or taken < least:
            best, least = candidate, taken
    return Chosen(best, tuple(dropped))
