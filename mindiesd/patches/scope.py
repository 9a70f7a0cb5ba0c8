"""Where a patch is in force: everywhere, or only inside the modules of one pipeline.

The replacements are installed process-wide in both cases and ask :meth:`Site.in_force`. What they
read was chosen by measurement: a plain object attribute and ``getattr`` with a default on a plain
``threading.local`` are guarded correctly by ``torch.compile``, while context variables break the
graph and class-level defaults or ``__dict__`` reads on a thread-local go stale.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable

from mindiesd.patches.ledger import Counts, Ledger

LOCAL = threading.local()
"""``LOCAL.token`` is the token of the scoped module whose forward this thread is inside of."""


_numbers = itertools.count(1)
_tokens: weakref.WeakValueDictionary[str, Token] = weakref.WeakValueDictionary()


class Token:
    """The modules of one ``patch_pipeline`` block, as the replacements see it.

    Attributes:
        active: False once the block has ended.
        names: the patches that are in force in the block.
        ledger: where the block's calls are counted.
        key: unique text; a constant to Dynamo, which an object is not.
    """

    def __init__(self, names: frozenset[str], ledger: Ledger) -> None:
        """Open a scope in which the patches called ``names`` are in force."""
        self.active = True
        self.names = names
        self.ledger = ledger
        self.key = f"block {next(_numbers)}"
        _tokens[self.key] = self


OPEN: set[Token] = set()
"""The tokens of the blocks that are open; looked at first, for reading a thread-local is slow."""


class Site:
    """One installed patch, as its replacement function sees it."""

    def __init__(self, name: str) -> None:
        """Describe the patch called ``name``, in force nowhere yet."""
        self.name = name
        self.everywhere = False
        self.count_to(Ledger())

    def count_to(self, ledger: Ledger) -> None:
        """Count the calls that are under no token in this ledger from now on."""
        self._own = ledger[self.name]

    def in_force(self) -> bool:
        """Whether the current call is one that this patch may redirect."""
        if self.everywhere:
            return True
        token = getattr(LOCAL, "token", None)
        return token is not None and self.name in token.names

    # The two below run outside compiled graphs only: a counter inside a traced function makes
    # every call recompile.

    def redirected(self) -> None:
        """Count a call that the replacement took."""
        self._counts().redirected()

    def fell_back(self, reason: str) -> None:
        """Count a call that went to the original, and why."""
        self._counts().fell_back(reason)

    def _counts(self) -> Counts:
        token = getattr(LOCAL, "token", None) if OPEN else None
        return self._own if token is None else token.ledger[self.name]

    def scope_key(self) -> str:
        """The key of the token this call is under; empty where there is none."""
        token = getattr(LOCAL, "token", None)
        return "" if token is None else token.key


def trace_note(site: Site) -> Callable[[str], None]:
    """A function for replacements to call while Dynamo traces them: counts once per trace.

    It is given ``site.scope_key()``: what a traced forward assigned to ``LOCAL`` exists in the
    trace only, so the function cannot look there itself.
    """
    import torch

    def note(key: str) -> None:
        token = _tokens.get(key)
        (site._own if token is None else token.ledger[site.name]).traced()

    # Dynamo runs a function marked as constant for real, once, at trace time, and bakes in its
    # result; nothing of it is left in the graph.
    marked: Callable[[str], None] = torch.compiler.assume_constant_result(note)  # type: ignore[no-untyped-call]
    return marked
