"""The garbage collector, put off while much is made at once.

After large imports a full collection is due at any moment. It walks everything that was imported,
which takes longer than loading or installing all patches, and it need not fall into the middle of
that: the process pays for it a moment later, as it would have without us.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No automatic collection inside; where it was off already, it stays off."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
