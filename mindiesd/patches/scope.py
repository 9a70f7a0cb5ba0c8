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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mindiesd.patches import verify
from mindiesd.patches.ledger import Ledger

LOCAL = threading.local()
"""``LOCAL.token`` is the token of the scoped module whose forward this thread is inside of."""


_asked = threading.local()
"""``_asked.name`` is the patch of which this thread asks :meth:`Site.would_take`."""


_asking_lock = threading.Lock()


class _Decided(BaseException):
    """What :meth:`Site.takes` was told, on its way to :meth:`Site.would_take`."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason


_numbers = itertools.count(1)
_tokens: weakref.WeakValueDictionary[str, Token] = weakref.WeakValueDictionary()


class Token:
    """The modules of one ``patch_pipeline`` block, as the replacements see it.

    Attributes:
        active: False once the block has ended.
        names: the patches that are in force in the block.
        ledger: where the block's calls are counted.
        verification: what ``verify=N`` of this block found; ``None`` where nothing is verified.
        strict: whether a redirect that raises is the caller's to see.
        key: unique text; a constant to Dynamo, which an object is not.
        modules: ``id`` of every module in scope; the block keeps them alive.
    """

    def __init__(
        self,
        names: frozenset[str],
        ledger: Ledger,
        verification: verify.Verification | None = None,
        strict: bool = False,
    ) -> None:
        """Open a scope in which the patches called ``names`` are in force."""
        self.active = True
        self.names = names
        self.ledger = ledger
        self.verification = verification
        self.strict = strict
        self.modules: frozenset[int] = frozenset()
        self.key = f"block {next(_numbers)}"
        _tokens[self.key] = self


OPEN: set[Token] = set()
"""The tokens of the blocks that are open; looked at first, for reading a thread-local is slow."""


@contextmanager
def entered(token: Token) -> Iterator[None]:
    """Be inside of a token's modules, as their forward is."""
    outer = getattr(LOCAL, "token", None)
    LOCAL.token = token
    try:
        yield
    finally:
        LOCAL.token = outer


class Site:
    """One installed patch, as its replacement function sees it.

    A replacement asks ``everywhere or in_force()`` whether it may act here and ``takes(reason)``
    whether to take the call, which also counts the outcome.

    Attributes:
        name: the patch's name.
        everywhere: whether it is in force in the whole process.
        watching: whether what is installed is the replacement inside ``verify.watch``.
        verification: what ``verify=N`` of ``patch_all`` found; ``None``: nothing is verified.
        strict: whether a redirect that raises outside of any token is the caller's to see.
        asking: how many threads are inside of ``would_take``.
        installed: what stands at the target, once something does.
    """

    def __init__(self, name: str) -> None:
        """Describe the patch called ``name``, in force nowhere yet."""
        self.name = name
        self.everywhere = False
        self.watching = False
        self.verification: verify.Verification | None = None
        self.strict = False
        self.asking = 0
        self.installed: Any = None
        self.count_to(Ledger())

    def arm(self) -> None:
        """Fetch what ``takes`` needs of torch; before that, the site is data only."""
        import torch

        def note(key: str) -> None:
            token = _tokens.get(key)
            (self._own if token is None else token.ledger[self.name]).traced()

        self._tracing = torch.compiler.is_dynamo_compiling
        # Dynamo runs a function marked as constant for real, once, at trace time, and bakes in its
        # result; nothing of it is left in the graph. It is given a key: what a traced forward
        # assigned to LOCAL exists in the trace only, so it could not look there itself.
        self._note: Callable[[str], None] = torch.compiler.assume_constant_result(note)  # type: ignore[no-untyped-call]

    def count_to(self, ledger: Ledger) -> None:
        """Count the calls that are under no token in this ledger from now on."""
        self._own = ledger[self.name]

    def verification_now(self) -> verify.Verification | None:
        """The verification that the current call belongs to; ``None``: it is not verified."""
        token = getattr(LOCAL, "token", None) if OPEN else None
        return self.verification if token is None else token.verification

    def strict_now(self) -> bool:
        """Whether the current call is one in which a redirect that raises is not put right."""
        token = getattr(LOCAL, "token", None) if OPEN else None
        return self.strict if token is None else token.strict

    def in_force(self) -> bool:
        """Whether the current call is one that this patch may redirect."""
        if self.everywhere:
            return True
        token = getattr(LOCAL, "token", None)
        return token is not None and self.name in token.names

    def token_of(self, module: object) -> Token | None:
        """The open block that has ``module`` in scope, for what is called on it, not in it."""
        for token in tuple(OPEN):
            if id(module) in token.modules and self.name in token.names:
                return token
        return None

    def takes(self, reason: str | None) -> bool:
        """Count what becomes of a call, and say whether the replacement takes it.

        Counters stay outside compiled graphs, where each would make every call recompile: a traced
        call is counted once, while it is traced.

        Args:
            reason: why the call goes to the original; ``None`` when it is redirected.
        """
        if self._tracing():
            if reason is None:
                token = getattr(LOCAL, "token", None)
                self._note("" if token is None else token.key)
        else:
            token = getattr(LOCAL, "token", None) if OPEN else None
            counts = self._own if token is None else token.ledger[self.name]
            if self.asking and getattr(_asked, "name", None) == self.name:
                raise _Decided(reason)
            if self.watching:
                reason = verify.note(self.name, reason)
            if reason is None:
                counts.redirected()
            else:
                counts.fell_back(reason)
        return reason is None

    def would_take(
        self, replacement: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool | None:
        """Whether the replacement takes a call; its kernel is not run, and nothing is counted.

        Returns:
            None where it does not come to a decision.
        """
        with _asking_lock:
            self.asking += 1
        outer = getattr(_asked, "name", None)
        _asked.name = self.name
        try:
            replacement(*args, **kwargs)
        except _Decided as decided:
            return decided.reason is None
        except Exception:  # noqa: BLE001 - it raised before, which is why this is asked
            return None
        finally:
            _asked.name = outer
            with _asking_lock:
                self.asking -= 1
        return None

    def gave_up(self, reason: str, counted: bool) -> None:
        """Count a call that went to the original because the redirect raised.

        Args:
            reason: what is counted.
            counted: whether ``takes`` has counted it as redirected.
        """
        token = getattr(LOCAL, "token", None) if OPEN else None
        counts = self._own if token is None else token.ledger[self.name]
        if self.watching:
            verify.note(self.name, reason)
        counts.gave_up(reason, counted)
