"""Counts of what happened to calls, exact under threads and cheap enough for every call."""

from __future__ import annotations

import itertools
import threading


class Tally:
    """A counter that never loses a tick, without a lock on the counting side.

    ``n += 1`` on an attribute loses counts when threads interleave. ``next`` on an
    ``itertools.count`` is one C call and atomic; reading costs a tick too, which is remembered and
    subtracted.
    """

    __slots__ = ("_lock", "_reads", "tick")

    def __init__(self) -> None:
        """Start at zero."""
        self.tick = itertools.count().__next__
        self._reads = 0
        self._lock = threading.Lock()

    def untick(self) -> None:
        """Take one tick back."""
        with self._lock:
            self._reads += 1

    def value(self) -> int:
        """How often ``tick`` was called so far."""
        with self._lock:
            count = self.tick() - self._reads
            self._reads += 1
        return count


class Counts:
    """What happened to the calls of one patch."""

    __slots__ = ("_fell_back", "_redirected", "_traced", "redirected", "traced")

    def __init__(self) -> None:
        """Start with nothing counted."""
        self.forget()

    def forget(self) -> None:
        """Count from zero."""
        self._redirected = Tally()
        self._traced = Tally()
        self._fell_back: dict[str, Tally] = {}
        self.redirected = self._redirected.tick
        self.traced = self._traced.tick

    def fell_back(self, reason: str) -> None:
        """Count one call that went to the original, and why."""
        tally = self._fell_back.get(reason)
        if tally is None:
            # setdefault is atomic: two threads meeting here end up with the same tally.
            tally = self._fell_back.setdefault(reason, Tally())
        tally.tick()

    def gave_up(self, reason: str, counted: bool) -> None:
        """Count a call that went to the original after all.

        Args:
            reason: why.
            counted: whether it was counted as redirected before.
        """
        if counted:
            self._redirected.untick()
        self.fell_back(reason)

    def snapshot(self) -> tuple[int, int, dict[str, int]]:
        """Calls redirected, calls traced into compiled graphs, calls that fell back by reason."""
        reasons = {reason: tally.value() for reason, tally in list(self._fell_back.items())}
        return self._redirected.value(), self._traced.value(), reasons


class Ledger(dict[str, Counts]):
    """The counts of one migration, by patch name; a name is added when it is first asked for."""

    def __missing__(self, name: str) -> Counts:
        """Give a patch that was not counted before its counts."""
        return self.setdefault(name, Counts())
