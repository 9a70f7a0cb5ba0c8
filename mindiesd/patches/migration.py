"""A migration: the patches somebody asked for, in force everywhere or in one pipeline."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import CodeType, FunctionType
from typing import Any

from mindiesd.errors import ParametersInvalid, PatchError
from mindiesd.patches.device import DEVICE
from mindiesd.patches.engine import ENGINE
from mindiesd.patches.ledger import Ledger
from mindiesd.patches.registry import select
from mindiesd.patches.report import PatchReport, Report, versions
from mindiesd.patches.sweep import Swap

NUMERICS = ("faithful", "fast")


class Options:
    """The checked options of :func:`patch_all` and :func:`patch_pipeline`."""

    def __init__(
        self,
        only: str | Iterable[str] | None,
        skip: str | Iterable[str] | None,
        numerics: str,
        verify: int,
        strict: bool,
        device: bool = False,
    ) -> None:
        """Check the options.

        Raises:
            ParametersInvalid: one of them is not allowed.
        """
        if numerics not in NUMERICS:
            raise ParametersInvalid("numerics", numerics, " or ".join(map(repr, NUMERICS)))
        if type(verify) is not int or verify != 0:
            raise ParametersInvalid("verify", verify, "0; verification is not available yet")
        if type(strict) is not bool:
            raise ParametersInvalid("strict", strict, "True or False")
        if type(device) is not bool:
            raise ParametersInvalid("device", device, "True or False")
        self.only = _tuple("only", only)
        self.skip = _tuple("skip", skip)
        self.numerics = numerics
        self.verify = verify
        self.strict = strict
        self.device = device
        self.patches = select(self.only, self.skip)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data."""
        return {
            "only": None if self.only is None else list(self.only),
            "skip": None if self.skip is None else list(self.skip),
            "numerics": self.numerics,
            "verify": self.verify,
            "strict": self.strict,
            "device": self.device,
        }

    def __eq__(self, other: object) -> bool:
        """Options are equal when they ask for the same."""
        return isinstance(other, Options) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _tuple(argument: str, value: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    words = (value,) if isinstance(value, str) else value
    names = tuple(words) if isinstance(words, Iterable) else (value,)
    for name in names:
        if not isinstance(name, str):
            raise ParametersInvalid(argument, value, "None, a text or a sequence of texts")
    return names


def _sources(replaced: Iterable[Swap]) -> list[str]:
    """Where the originals lie that functions of ours stand for, as ``file:first-last``.

    A function that was made from the original's own source counts for itself: its lines are the
    original's.
    """
    found = []
    for swap in replaced:
        old, new = swap.old, swap.new
        if isinstance(old, FunctionType) and isinstance(new, FunctionType):
            code = old.__code__
            if new.__code__.co_filename != code.co_filename:
                found.append(f"{code.co_filename}:{code.co_firstlineno}-{_last_line(code)}")
    return found


def _last_line(code: CodeType) -> int:
    lines = [line for _, _, line in code.co_lines() if line is not None]
    inner = [_last_line(const) for const in code.co_consts if isinstance(const, CodeType)]
    return max([code.co_firstlineno, *lines, *inner])


class Migration:
    """What :func:`mindiesd.patch_all` returns and ``with mindiesd.patch_pipeline(...)`` yields."""

    def __init__(self, options: Options, scope: str) -> None:
        """Start a migration that has installed nothing yet.

        Args:
            options: the checked options.
            scope: ``"process"``, or what is patched, for the report.
        """
        self.options = options
        self.ledger = Ledger()
        self.scope = scope
        self.notes: list[str] = []
        self._frozen: Report | None = None

    def install(self) -> None:
        """Install the selected records.

        Raises:
            PatchError: under ``strict`` or for a record that ``only`` names, when it cannot be
                applied. Nothing stays installed then.
        """
        ENGINE.acquire(self.options.patches)
        problems = []
        for patch in self.options.patches:
            status, reason = ENGINE.status(patch)
            named = self.options.only is not None
            if status == "skipped" and (self.options.strict or named):
                problems.append(f"{patch.name}: {reason}")
        if problems:
            ENGINE.release(self.options.patches)
            raise PatchError("cannot be applied: " + "; ".join(problems))
        if self.options.device:
            DEVICE.acquire()

    def uninstall(self) -> None:
        """Undo the selected records; the report keeps the last state."""
        self._frozen = self._build()
        for place in ENGINE.release(self.options.patches):
            self.notes.append(f"not restored, somebody else replaced it: {place}")
        if self.options.device:
            lost = DEVICE.release()
            self.notes += [f"not restored, somebody else replaced it: {place}" for place in lost]
        self._frozen.notes = list(dict.fromkeys(self._frozen.notes + self.notes))

    def forget_counts(self) -> None:
        """Count from zero: a forked child has made none of its parent's calls."""
        for counts in self.ledger.values():
            counts.forget()

    def report(self) -> Report:
        """What this migration did so far; after its end, what it had done."""
        return self._build() if self._frozen is None else self._frozen

    def _build(self) -> Report:
        patches = []
        with ENGINE.lock():
            unreached = ENGINE.unreached(self.options.patches)
            for patch in self.options.patches:
                status, reason = ENGINE.status(patch)
                state = ENGINE.state(patch.name)
                redirected, traced, fell_back = self.ledger[patch.name].snapshot()
                patches.append(
                    PatchReport(
                        name=patch.name,
                        family=patch.family,
                        target=patch.target,
                        becomes=patch.becomes,
                        why=patch.why,
                        numerics=patch.numerics,
                        status=status,
                        reason=reason,
                        redirected=redirected,
                        traced=traced,
                        fell_back=fell_back,
                        rebound=[holder.where for holder in state.holders[1:]],
                        unreached=unreached.get(patch.name, []),
                        sources=_sources(state.replaced),
                    )
                )
            notes = [*ENGINE.notes, *self.notes]
            if self.options.device and DEVICE.note:
                notes.append(DEVICE.note)
        return Report(
            patches=patches,
            options={**self.options.to_dict(), "scope": self.scope},
            versions=versions(),
            notes=notes,
            torch_imported="torch" in sys.modules,
        )
