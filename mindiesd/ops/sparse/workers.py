"""Threads that compute alone: each runs ATen's operators on one core.

ATen's own threads split one operator at a time. Where a task is a chain of small operators, giving
whole tasks to threads is faster; then each operator must not be split again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


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

    def run(self, work: Callable[[], None], tasks: int) -> None:
        """Run ``work`` in as many threads as ATen may use here, and wait until all have ended.

        Args:
            work: takes tasks until none is left; runs under the caller's inference mode, without
                gradients and without autocast.
            tasks: how many there are; a few are not worth a thread.
        """
        threads = min(torch.get_num_threads(), tasks // 2)
        if threads <= 1:
            with torch.no_grad():
                work()
            return
        inference = torch.is_inference_mode_enabled()

        def run() -> None:
            with torch.inference_mode(inference), torch.no_grad():
                work()

        running = [self._of(threads).submit(run) for _ in range(threads)]
        errors = [error for error in (one.exception() for one in running) if error is not None]
        if errors:
            raise errors[0]

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


WORKERS = Workers()

os.register_at_fork(after_in_child=WORKERS.forget)
