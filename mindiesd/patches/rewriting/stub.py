"""What stands in a target's place: it rewrites the target at the first call, and calls that.

Reading and compiling sources costs about a millisecond each. Paid when patches are installed, for
every model that diffusers knows, it would be most of the time that takes.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

from mindiesd.errors import PatchError
from mindiesd.patches.rewriting.rules import Rewrite
from mindiesd.patches.scope import Site

_log = logging.getLogger("mindiesd")


class Lazy:
    """A function that is rewritten when it is first needed.

    Attributes:
        function: what is called; None until it was needed.
        reason: why the original is called instead; empty where it is not.
    """

    def __init__(self, original: FunctionType, rule: Rewrite, site: Site) -> None:
        """Remember what to do."""
        self.function: Callable[..., Any] | None = None
        self.reason = ""
        self._original = original
        self._rule = rule
        self._site = site
        self._lock = threading.Lock()

    def ready(self) -> None:
        """Rewrite, unless that was done."""
        if self.function is not None:
            return
        with self._lock:
            if self.function is None:
                self.function = self._made()

    def _made(self) -> Callable[..., Any]:
        # The reader and the rewriter are imported where they are needed.
        from mindiesd.patches.rewriting.rewrite import rewrite
        from mindiesd.patches.rewriting.source import SourceUnknown

        try:
            return rewrite(self._original, self._rule.counts, self._site)
        except SourceUnknown as unknown:
            self.reason = f"not rewritten: {unknown}"
        except Exception as error:  # noqa: BLE001 - the user's call must not fail of this
            self.reason = f"could not be rewritten: {type(error).__name__}: {error}"
            _log.debug("%s", self._site.name, exc_info=True)
        target = f"{self._rule.module}.{self._rule.qualname}"
        _log.warning("%s %s", target, self.reason)
        return _counting(self._original, self._site, target, self.reason)


def _counting(
    original: Callable[..., Any], site: Site, target: str, reason: str
) -> Callable[..., Any]:
    """The original, with every call counted as fallen back; under ``strict`` it raises."""

    def unknown(*args: Any, **kwargs: Any) -> Any:
        if site.strict_now():
            # Sources are read at the first call: patch_all had nothing to raise yet.
            raise PatchError(f"cannot be applied: {site.name}: {target} {reason}")
        site.takes(reason)
        return original(*args, **kwargs)

    return unknown


def stand_in(original: Any, rule: Rewrite, site: Site) -> Callable[..., Any]:
    """The function to be installed in the place of ``original``.

    Args:
        original: the function that ``rule`` names.
        rule: what is redirected inside it.
        site: the record.
    """
    import torch

    lazy = Lazy(original, rule, site)

    # While Dynamo traces, it runs this for real and leaves nothing of it in the graph. Nothing
    # read lazy.function before in that trace, so no guard remembers that it was None.
    def rewritten() -> None:
        lazy.ready()

    ready = torch.compiler.assume_constant_result(rewritten)  # type: ignore[no-untyped-call]

    def call(*args: Any, **kwargs: Any) -> Any:
        if site.everywhere or site.in_force():
            ready()
            return lazy.function(*args, **kwargs)  # type: ignore[misc]
        return original(*args, **kwargs)

    # In the original's globals: the function belongs to that module, and torch.jit.script, which
    # compiles the source behind __wrapped__, looks names up here.
    stub = FunctionType(
        call.__code__, original.__globals__, original.__name__, None, call.__closure__
    )
    stub.__wrapped__ = original  # type: ignore[attr-defined]
    stub.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return stub
