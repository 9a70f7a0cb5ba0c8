"""The same standard input for two runs of a command, one after the other."""

from __future__ import annotations

import os
import select
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_CHUNK = 1 << 16


class Stdin:
    """Standard input, given as often as it is asked for.

    A file is read again from where it stood. What comes through a pipe is remembered while the
    first run reads it, and no further than that, so that a pipe nobody closes stops nobody. A
    terminal cannot be asked twice: the runs get an empty input instead.
    """

    def __init__(self) -> None:
        """Look at what standard input is."""
        self._seen = bytearray()
        self._ended = False
        self._start: int | None = None
        try:
            mode = os.fstat(0).st_mode
        except OSError:  # closed
            self._kind = "as it is"
            return
        if os.isatty(0):
            self._kind = "empty"
        elif stat.S_ISREG(mode):
            self._kind, self._start = "file", os.lseek(0, 0, os.SEEK_CUR)
        elif stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            self._kind = "stream"
        else:  # /dev/null and its like
            self._kind = "as it is"

    @contextmanager
    def again(self) -> Iterator[int | None]:
        """What to give ``subprocess`` as ``stdin`` for one run, for as long as it lasts."""
        if self._kind == "empty":
            yield subprocess.DEVNULL
        elif self._kind == "stream":
            with self._replayed() as end:
                yield end
        else:
            if self._start is not None:
                os.lseek(0, self._start, os.SEEK_SET)
            yield None

    @contextmanager
    def _replayed(self) -> Iterator[int]:
        theirs, ours = os.pipe()
        wake, waker = os.pipe()
        feeder = threading.Thread(target=self._feed, args=(ours, wake), daemon=True)
        try:
            feeder.start()
            yield theirs
        finally:
            os.write(waker, b".")
            feeder.join()
            for end in (theirs, wake, waker):
                os.close(end)

    def _feed(self, target: int, wake: int) -> None:
        """Write what was seen before, then what comes, until the run or the input ends."""
        os.set_blocking(target, False)
        given = 0
        try:
            while True:
                if given < len(self._seen):
                    _, writable, _ = select.select([wake], [target], [])
                    if not writable:
                        return
                    given += os.write(target, self._seen[given : given + _CHUNK])
                elif self._ended:
                    return
                else:
                    readable, _, _ = select.select([0, wake], [], [])
                    if wake in readable:
                        return
                    come = os.read(0, _CHUNK)
                    self._seen += come
                    self._ended = not come
        finally:
            os.close(target)
