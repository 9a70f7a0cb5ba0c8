"""The engine: installs records, undoes them, and knows the state of each.

It knows nothing of attention or norms. What is installed is a plain Python function: a
``wrapt.FunctionWrapper`` was measured to be silently bypassed, or to crash, under
``torch.compile``. wrapt resolves and applies, and tells when a module has been imported.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module, metadata
from types import FunctionType
from typing import Any

import wrapt
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mindiesd.patches import law, sweep, verify
from mindiesd.patches.hooks import ImportWatch, find_module, is_initializing
from mindiesd.patches.registry import INSIDE, Patch, records
from mindiesd.patches.scope import Site

_log = logging.getLogger("mindiesd")


@dataclass
class State:
    """What the engine did with one record.

    Attributes:
        patch: the record.
        site: the record as its replacement sees it.
        wanted: how many migrations want it installed.
        reason: why it was skipped; empty when it was not.
        replaced: the original and the replacement of each installation; a reload adds one.
        holders: every place that was rebound, the target itself first.
        lost: places that somebody else has changed since, found while undoing.
    """

    patch: Patch
    site: Site
    wanted: int = 0
    reason: str = ""
    replaced: list[sweep.Swap] = field(default_factory=list)
    holders: list[sweep.Holder] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


class Engine:
    """Installs and undoes records for the whole process; every method is thread-safe."""

    def __init__(self) -> None:
        """Know every record, install none."""
        self._lock = threading.RLock()
        self._states: dict[str, State] = {
            patch.name: State(patch, Site(patch.name)) for patch in records()
        }
        self._watch = ImportWatch(self._module_executed)
        self.notes: list[str] = []

    def state(self, name: str) -> State:
        """The state of the record called ``name``."""
        return self._states[name]

    def lock(self) -> threading.RLock:
        """The engine's lock, for callers that take several steps."""
        return self._lock

    def unlock_after_fork(self) -> None:
        """Replace the lock: a thread that held it while this process was forked is not here."""
        self._lock = threading.RLock()

    def acquire(self, patches: Iterable[Patch], verified: bool = False) -> None:
        """Install these records, now or as soon as their modules are imported.

        Args:
            patches: the records.
            verified: install them so that calls can be verified; what is installed without is
                installed anew.
        """
        with self._lock:
            fresh = []
            for patch in patches:
                state = self._states[patch.name]
                state.wanted += 1
                again = verified and not state.site.watching
                state.site.watching |= verified
                if again and state.replaced:
                    with self._changing():
                        self._uninstall([state])
                    state.site.watching = True
                if state.wanted == 1 or again:
                    state.reason = ""
                    state.lost = []
                    fresh.append(patch)
            with self._changing():
                # Modules that are loaded already are handled together: one sweep serves all.
                self._install([patch for patch in fresh if _loaded(patch)], swept=True)
            for name in dict.fromkeys(patch.after for patch in fresh):
                self._watch.watch(name)

    def release(self, patches: Iterable[Patch]) -> list[str]:
        """Undo these records unless another migration still wants them.

        Returns:
            Places that were not restored because somebody else had replaced our function there.
        """
        with self._lock:
            unwanted = []
            for patch in patches:
                state = self._states[patch.name]
                state.wanted -= 1
                if state.wanted == 0:
                    unwanted.append(state)
            with self._changing():
                return self._uninstall(unwanted)

    def status(self, patch: Patch) -> tuple[str, str]:
        """``("applied" | "pending" | "skipped", reason)`` of a record."""
        with self._lock:
            self._watch.retry_partial()
            state = self._states[patch.name]
            if state.replaced:
                return "applied", ""
            if state.reason:
                return "skipped", state.reason
            missing = unavailable(patch)
            if missing:
                return "skipped", missing
            return "pending", f"{patch.module} has not been imported"

    def unreached(self, patches: Iterable[Patch]) -> dict[str, list[str]]:
        """Places that hold an original and were left alone, by record name."""
        with self._lock:
            originals = {
                patch.name: self._states[patch.name].replaced[-1].old
                for patch in patches
                if self._states[patch.name].replaced
            }
            # PyTorch's own tables of functions are no call sites.
            return sweep.describe_holders(originals, _left_alone(("torch",))) if originals else {}

    # Installing.

    def _module_executed(self, name: str) -> None:
        with self._lock:
            ready = [
                state.patch
                for state in self._states.values()
                if state.patch.after == name and state.wanted and not self._is_current(state)
            ]
            with self._changing():
                self._install(ready, swept=name == "torch")

    def _is_current(self, state: State) -> bool:
        """Whether the target is our replacement right now; a reload puts a new original there."""
        if not state.replaced:
            return False
        try:
            _, _, value = wrapt.resolve_path(state.patch.module, state.patch.attribute)
        except (ImportError, AttributeError):
            return False
        return any(value is swap.new for swap in state.replaced)

    def _install(self, patches: Iterable[Patch], swept: bool) -> None:
        fresh: dict[int, sweep.Swap] = {}
        keep: set[str] = set()
        by_original: dict[int, State] = {}
        for patch in patches:
            state = self._states[patch.name]
            try:
                swap = self._install_one(state)
            except _Skip as skip:
                state.reason = str(skip)
                _log.info("%s skipped: %s", patch.name, skip)
                continue
            except Exception as error:  # noqa: BLE001 - one broken record must not stop the rest
                state.reason = f"could not be built: {type(error).__name__}: {error}"
                _log.warning("%s %s", patch.name, state.reason)
                _log.debug("%s", patch.name, exc_info=True)
                continue
            if not swap.alone:
                fresh[id(swap.old)] = swap
            by_original[id(swap.old)] = state
            keep.update(patch.keep_in)
        if swept and fresh:
            for holder in sweep.rebind(fresh, _left_alone(keep)):
                by_original[holder.found].holders.append(holder)

    def _install_one(self, state: State) -> sweep.Swap:
        patch = state.patch
        missing = unavailable(patch)
        if missing:
            raise _Skip(missing)
        try:
            owner, attribute, original = wrapt.resolve_path(patch.module, patch.attribute)
        except (ImportError, AttributeError) as error:
            raise _Skip(f"{patch.target} does not exist here") from error
        if isinstance(owner, type) and attribute not in vars(owner):
            raise _Skip(f"{patch.target} is inherited, not defined there")
        if patch.parameters is None and isinstance(original, FunctionType):
            raise _Skip(f"{patch.target} was already replaced by {original.__module__}")
        alone = sweep.is_alone(vars(owner), attribute)
        state.site.arm()
        build = _resolve(patch.build)
        try:
            replacement = build(original, state.site)
            if state.site.watching and patch.reference != INSIDE:
                replacement = verify.watch(
                    replacement,
                    original,
                    state.site.verification_now,
                    patch.name,
                    _resolve(patch.reference) if patch.reference else None,
                )
            state.site.installed = replacement
            law.dress(replacement, original, patch.module, patch.attribute)
        except law.SignatureChanged as changed:
            raise _Skip(str(changed)) from changed
        after_install = getattr(import_module(patch.build.partition(":")[0]), "after_install", None)
        if after_install is not None:
            after_install(replacement)
        wrapt.apply_patch(owner, attribute, replacement)
        swap = sweep.Swap(original, replacement, alone)
        state.replaced.append(swap)
        state.holders.append(
            sweep.Holder(
                patch.target,
                id(original),
                original,
                replacement,
                lambda: vars(owner).get(attribute),
                lambda value: wrapt.apply_patch(owner, attribute, value),
            )
        )
        _log.info("%s: %s -> %s", patch.name, patch.target, patch.becomes)
        return swap

    # Undoing.

    def _uninstall(self, states: Iterable[State]) -> list[str]:
        back: dict[int, sweep.Swap] = {}
        lost: list[str] = []
        for state in states:
            for holder in reversed(state.holders):
                if not holder.undo():
                    state.lost.append(holder.where)
            for original, replacement, _ in state.replaced:
                _tell(state.patch, "after_uninstall", replacement)
                back[id(replacement)] = sweep.Swap(replacement, original)
            lost += state.lost
            state.holders, state.replaced = [], []
            state.site.watching, state.site.installed = False, None
        if back:
            # Modules imported while we were installed took our function by name.
            sweep.rebind(back, _left_alone(()), to_replacement=False)
        return lost

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around every change of what is installed."""
        before = self._installed()
        collecting = gc.isenabled()
        # After large imports a full collection is due at any moment. It takes longer than all of
        # this, and need not fall into the middle of it.
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()
            if self._installed() != before and _compiled_anything():
                self._reset_dynamo()

    def _installed(self) -> int:
        return sum(len(state.replaced) for state in self._states.values())

    def _reset_dynamo(self) -> None:
        """Drop what ``torch.compile`` compiled.

        Dynamo does not guard on the ``forward`` of a nested module's class or on closures, so code
        compiled before would go on calling what it saw then.
        """
        import torch

        torch.compiler.reset()
        note = "torch.compiler.reset() was called: compiled code would have kept the old functions"
        if note not in self.notes:
            self.notes.append(note)
        _log.info(note)


class _Skip(Exception):
    """Why a record cannot be installed."""


def _compiled_anything() -> bool:
    """Whether Dynamo has compiled a frame since it was last reset."""
    if "torch._dynamo.convert_frame" not in sys.modules:
        return False
    from torch._dynamo import convert_frame

    # Not public; where it is gone, resetting once too often is the safe side.
    codes = getattr(convert_frame, "input_codes", None)
    return bool(getattr(codes, "seen", True))


def unavailable(patch: Patch) -> str:
    """Why the packages this record needs are absent or of an unknown version; empty: they fit."""
    for distribution, versions in patch.requires.items():
        try:
            version = _version(distribution)
        except metadata.PackageNotFoundError:
            if find_module(distribution):
                return f"{distribution} has no version to check"
            return f"{distribution} is not installed"
        if not SpecifierSet(versions).contains(version, prereleases=True):
            return f"{distribution} {version} is not a tested version ({versions})"
    return ""


@functools.cache
def _version(distribution: str) -> Version:
    return Version(metadata.version(distribution))


def _loaded(patch: Patch) -> bool:
    module = sys.modules.get(patch.after)
    return module is not None and not is_initializing(module) and patch.module in sys.modules


def _left_alone(more: Iterable[str]) -> Callable[[str], bool]:
    """Modules whose references are not rebound: ours, and those a record names."""
    roots = ("mindiesd", *more)

    def skip(name: str) -> bool:
        return any(name == root or name.startswith(root + ".") for root in roots)

    return skip


def _resolve(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    found: Callable[..., Any] = getattr(import_module(module), name)
    return found


def _tell(patch: Patch, event: str, replacement: Callable[..., Any]) -> None:
    """Call the family's ``after_install`` or ``after_uninstall``, where it has one."""
    told = getattr(import_module(patch.build.partition(":")[0]), event, None)
    if told is not None:
        told(replacement)


ENGINE = Engine()
"""The one engine of this process."""

os.register_at_fork(after_in_child=ENGINE.unlock_after_fork)
