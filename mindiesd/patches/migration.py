"""A migration: the patches somebody asked for, in force everywhere or in one pipeline."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import CodeType, FunctionType
from typing import Any

from mindiesd.errors import ParametersInvalid, PatchError
from mindiesd.patches.device import DEVICE
from mindiesd.patches.engine import ENGINE, nothing_to_mend
from mindiesd.patches.front_doors.finder import FINDER
from mindiesd.patches.ledger import Ledger
from mindiesd.patches.registry import select, words
from mindiesd.patches.report import PatchReport, Report, SiteReport, versions
from mindiesd.patches.sparse_options import SparseOptions, read
from mindiesd.patches.sweep import Swap
from mindiesd.patches.verify import Place, Verification

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
        sparse: object = None,
        device: bool = False,
        sites: bool = False,
    ) -> None:
        """Check the options.

        Raises:
            ParametersInvalid: one of them is not allowed.
        """
        if numerics not in NUMERICS:
            raise ParametersInvalid("numerics", numerics, " or ".join(map(repr, NUMERICS)))
        if type(verify) is not int or verify < 0:
            raise ParametersInvalid("verify", verify, "an int that is not negative")
        if type(strict) is not bool:
            raise ParametersInvalid("strict", strict, "True or False")
        if type(device) is not bool:
            raise ParametersInvalid("device", device, "True or False")
        if type(sites) is not bool:
            raise ParametersInvalid("sites", sites, "True or False")
        self.only = _tuple("only", only)
        self.skip = _tuple("skip", skip)
        self.numerics = numerics
        self.verify = verify
        self.strict = strict
        self.sparse: SparseOptions | None = read(sparse)
        named = words("only", self.only) or frozenset()
        self.patches = tuple(
            patch
            for patch in select(self.only, self.skip, () if self.sparse is None else ("sparse",))
            if named & {patch.name, patch.family} or not nothing_to_mend(patch)
        )
        if self.sparse is not None:
            names = [patch.name for patch in self.patches]
            if "sdpa" not in names or not any(patch.option == "sparse" for patch in self.patches):
                raise ParametersInvalid(
                    "sparse", "given without its patches", "None, or sdpa and sparse left selected"
                )
        self.device = device
        self.sites = sites

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data."""
        asked = {} if self.sparse is None else {"sparse": self.sparse.to_dict()}
        return {
            "only": None if self.only is None else list(self.only),
            "skip": None if self.skip is None else list(self.skip),
            "numerics": self.numerics,
            "verify": self.verify,
            "strict": self.strict,
            "device": self.device,
            "sites": self.sites,
            **asked,
        }

    def __eq__(self, other: object) -> bool:
        """Options are equal when they ask for the same."""
        return isinstance(other, Options) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _site(place: Place) -> SiteReport:
    counts = place.counts
    redirected, _, fell_back = (None, 0, None) if counts is None else counts.snapshot()
    return SiteReport(
        where=place.where,
        redirected=redirected,
        fell_back=fell_back,
        verified=place.verified,
        largest_error=place.error,
        failure=place.failure,
        without_reference=dict(place.unjudged),
    )


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
        watched = options.verify or options.sites
        self.verification = Verification(options.verify, options.sites) if watched else None
        self.scope = scope
        self.notes: list[str] = []
        self._frozen: Report | None = None

    def install(self) -> None:
        """Install the selected records.

        Raises:
            PatchError: a record cannot be applied, under ``strict``; or none can of what a word of
                ``only`` names. Nothing stays installed then.
        """
        ENGINE.acquire(
            self.options.patches, verified=self.options.verify > 0, sites=self.options.sites
        )
        skipped = {}
        for patch in self.options.patches:
            status, reason = ENGINE.status(patch)
            if status == "skipped":
                skipped[patch.name] = reason
        problems = [f"{name}: {reason}" for name, reason in self._missed(skipped).items()]
        if problems:
            ENGINE.release(self.options.patches)
            raise PatchError("cannot be applied: " + "; ".join(problems))
        if self.options.device:
            DEVICE.acquire()

    def _missed(self, skipped: dict[str, str]) -> dict[str, str]:
        """Of the skipped records, those that were asked for: a family is, where all of it was."""
        if self.options.strict:
            return skipped
        selected = {patch.name for patch in self.options.patches}
        missed: dict[str, str] = {}
        for word in words("only", self.options.only) or ():
            meant = [patch.name for patch in select(word) if patch.name in selected]
            if all(name in skipped for name in meant):
                missed |= {name: skipped[name] for name in meant}
        return missed

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
        if self.verification is not None:
            self.verification.forget_counts()

    def report(self) -> Report:
        """What this migration did so far; after its end, what it had done."""
        return self._build() if self._frozen is None else self._frozen

    def _verified(self, patch: str) -> dict[str, Any]:
        """The report's fields on verification and on single lines."""
        if self.verification is None:
            return {}
        places = self.verification.places(patch)
        unjudged: dict[str, int] = {}
        for place in places:
            for reason, count in place.unjudged.items():
                unjudged[reason] = unjudged.get(reason, 0) + count
        return {
            "verified": sum(place.verified for place in places),
            "largest_error": max((place.error for place in places), default=0.0),
            "failed_verification": [
                f"{place.where}: {place.failure}" for place in places if place.failure
            ],
            "without_reference": unjudged,
            "sites": [_site(place) for place in places],
        }

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
                        **self._verified(patch.name),
                        sources=_sources(state.replaced),
                    )
                )
            notes = [*ENGINE.notes, *FINDER.notes(), *self.notes]
            if self.options.device and DEVICE.note:
                notes.append(DEVICE.note)
        return Report(
            patches=patches,
            options={**self.options.to_dict(), "scope": self.scope},
            versions=versions(),
            notes=notes,
            torch_imported="torch" in sys.modules,
        )
