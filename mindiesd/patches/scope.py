"""Where a patch is in force: everywhere, or only inside the modules of one pipeline.

The replacements are installed process-wide in both cases and ask :meth:`Site.in_force`. What they
read was chosen by measurement: a plain object attribute and ``getattr`` with a default on a plain
``threading.local`` are guarded correctly by ``torch.compile``, while context variables break the
graph and class-level defaults or ``__dict__`` reads on a thread-local go stale.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from mindiesd.patches.ledger import Ledger

LOCAL = threading.local()
"""``LOCAL.token`` is the token of the scoped module whose forward this thread is inside of."""


class Token:
    """The modules of one ``patch_pipeline`` block, as the replacements see it."""

    def __init__(self, names: frozenset[str], ledger: Ledger) -> None:
        """Open a scope in which the patches called ``names`` are in force."""
        self.active = True
        self.names = names
        self.ledger = ledger


class Site:
    """One installed patch, as its replacement function sees it."""

    def __init__(self, name: str) -> None:
        """Describe the patch called ``name``, in force nowhere yet."""
        self.name = name
        self.everywhere = False
        self.ledger = Ledger()

    def in_force(self) -> bool:
        """Whether the current call is one that this patch may redirect."""
        if self.everywhere:
            return True
        token = getattr(LOCAL, "token", None)
        return token is not None and self.name in token.names

    # The three below run outside compiled graphs only: a counter inside a traced function makes
    # every call recompile.

    def redirected(self) -> None:
        """Count a call that the replacement took."""
        token = getattr(LOCAL, "token", None)
        (self.ledger if token is None else token.ledger)[self.name].redirected()

    def fell_back(self, reason: str) -> None:
        """Count a call that went to the original, and why."""
        token = getattr(LOCAL, "token", None)
        (self.ledger if token is None else token.ledger)[self.name].fell_back(reason)

    def traced(self) -> None:
        """Count a call that was traced into a compiled graph."""
        token = getattr(LOCAL, "token", None)
        (self.ledger if token is None else token.ledger)[self.name].traced()


def trace_note(site: Site) -> Callable[[], None]:
    """A function for replacements to call while Dynamo traces them: counts once per trace."""
    import torch

    # Dynamo runs a function marked as constant for real, once, at trace time, and bakes in its
    # result; nothing of it is left in the graph.
    def note() -> None:
        site.traced()

    marked: Callable[[], None] = torch.compiler.assume_constant_result(note)  # type: ignore[no-untyped-call]
    return marked
