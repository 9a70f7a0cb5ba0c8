"""Threads that compute alone: each runs ATen's operators on one core.

ATen's own threads split one operator at a time. Where a task is a chain of small operators, giving
whole tasks to threads is faster; then each operator must not be split again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import TypeAlias, TypeVar

import torch

# Rows given to a thread at once, at most.
_ROWS = 8

Item = TypeVar("Item")
Rows: TypeAlias = Callable[[int, int, int], None]
Result = TypeVar("Result")


class _Here(threading.local):
    """What a thread is about: how many of us it may share its work with, if it is one of us."""

    threads = 0


class Workers:
    """A pool of such threads; they are started at the first use and wait without computing."""

    def __init__(self) -> None:
        """Start no thread yet."""
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0

    def forget(self) -> None:
        """Forget the threads: a forked child has none of its parent's."""
        self.__init__()  # type: ignore[misc]

    def alone(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in one of the threads; what it hands to the others, it does with them.

        It runs under the caller's inference mode, without gradients and without autocast. ATen's
        own threads are not woken by it, nor do they go on waiting, which occupies a core, when the
        next operator is ours.
        """
        threads = torch.get_num_threads()
        if threads <= 1:
            with torch.no_grad():
                return work()
        inference = torch.is_inference_mode_enabled()

        def run() -> Result:
            _here.threads = threads
            try:
                with torch.inference_mode(inference), torch.no_grad():
                    return work()
            finally:
                _here.threads = 0

        return self._of(threads).submit(run).result()

    def each(self, items: Iterable[Item], work: Callable[[Item], None]) -> None:
        """Call ``work`` with each item; inside of :meth:`alone`, in several threads."""
        waiting = list(items)
        left = iter(waiting)

        def some() -> None:
            for item in left:
                work(item)

        self.run(some, len(waiting))

    def run(self, work: Callable[[], None], tasks: int) -> None:
        """Inside of :meth:`alone`, run ``work`` in as many threads as ATen may use; else here.

        Args:
            work: takes tasks until none is left.
            tasks: how many there are.
        """
        threads = min(_here.threads, tasks)
        if threads <= 1:
            work()
            return
        inference = torch.is_inference_mode_enabled()

        def run() -> None:
            with torch.inference_mode(inference), torch.no_grad():
                work()

        others = [self._of(threads).submit(run) for _ in range(threads - 1)]
        try:
            work()
        finally:
            # Where all threads are taken, by other callers, there may be nothing left to begin.
            begun = [one for one in others if not one.cancel()]
            errors = [error for error in (one.exception() for one in begun) if error is not None]
        if errors:
            raise errors[0]

    def share_rows(self, pairs: int, rows: int, tasks: int, start: Callable[[], Rows]) -> None:
        """Inside of :meth:`alone`, share out the rows of all pairs of a batch and a head.

        Args:
            pairs: batches times heads.
            rows: of each; up to eight consecutive ones of a pair are a task.
            tasks: make them shorter, if there are not so many else.
            start: called once in each thread; what it returns is called with (pair, first, stop).
        """
        group = max(1, min(_ROWS, pairs * rows // tasks))
        groups = -(-rows // group)
        tickets = count()

        def work() -> None:
            some = start()
            for ticket in tickets:
                if ticket >= pairs * groups:
                    return
                pair, nth = divmod(ticket, groups)
                some(pair, nth * group, min(rows, (nth + 1) * group))

        self.run(work, pairs * groups)

    def _of(self, threads: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._size < threads:
                self._pool = _started(threads)
                self._size = threads
            return self._pool


def _started(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads all run, each with one thread of ATen's.

    The number of threads is a thread's own, but setting it also sets what threads started later
    begin with; so all of ours are started now, and the caller's number is put back for the rest.
    """
    before = torch.get_num_threads()
    met = threading.Barrier(threads)

    def alone() -> None:
        # A thread's first operator takes over the process's number, which by then is the caller's
        # again, unless that has happened already: asking for the number does it.
        torch.get_num_threads()
        torch.set_num_threads(1)
        met.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="mindiesd-sparse")
    try:
        for one in [pool.submit(alone) for _ in range(threads)]:
            one.result()
    finally:
        torch.set_num_threads(before)
    return pool


_here = _Here()
WORKERS = Workers()

os.register_at_fork(after_in_child=WORKERS.forget)
