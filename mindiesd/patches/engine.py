"""The engine: installs records, undoes them, and knows the state of each.

It knows nothing of attention or norms. What is installed is a plain Python function: a
``wrapt.FunctionWrapper`` was measured to be silently bypassed, or to crash, under
``torch.compile``. wrapt resolves and applies, and tells when a module has been imported.
"""

from __future__ import annotations

import functools
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

from mindiesd import collecting
from mindiesd.patches import faults, law, sweep, verify
from mindiesd.patches.front_doors.finder import FINDER
from mindiesd.patches.hooks import ImportWatch, find_module, is_initializing
from mindiesd.patches.registry import INSIDE, NOT_COMPARED, Patch, records
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
        references: of what nobody but its class or module held, the references there were to the
            original and to its replacement, by the id of the latter.
        provided: whether the record's packages are provided, because they are not installed.
    """

    patch: Patch
    site: Site
    wanted: int = 0
    reason: str = ""
    replaced: list[sweep.Swap] = field(default_factory=list)
    holders: list[sweep.Holder] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    references: dict[int, tuple[int, int]] = field(default_factory=dict)
    provided: bool = False


class Engine:
    """Installs and undoes records for the whole process; every method is thread-safe."""

    def __init__(self) -> None:
        """Know every record, install none."""
        self._lock = threading.RLock()
        self._states: dict[str, State] = {
            patch.name: State(patch, Site(patch.name)) for patch in records()
        }
        self._after: dict[str, list[State]] = {}
        for state in self._states.values():
            self._after.setdefault(state.patch.after, []).append(state)
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

    def acquire(
        self, patches: Iterable[Patch], verified: bool = False, sites: bool = False
    ) -> None:
        """Install these records, now or as soon as their modules are imported.

        Args:
            patches: the records.
            verified: install them so that calls can be verified; what is installed without is
                installed anew.
            sites: install them so that calls can be counted by line; likewise.
        """
        with self._lock:
            fresh = []
            for patch in patches:
                state = self._states[patch.name]
                state.wanted += 1
                watched = sites or (verified and patch.reference != NOT_COMPARED)
                again = watched and not state.site.watching
                state.site.watching |= watched
                if again and state.replaced:
                    with self._changing():
                        self._uninstall([state])
                    state.site.watching = True
                if state.wanted == 1 or again:
                    state.reason = ""
                    state.lost = []
                    if not state.provided and not self._provide(state):
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
        """``("applied" | "provided" | "pending" | "skipped", reason)`` of a record."""
        with self._lock:
            self._watch.retry_partial()
            state = self._states[patch.name]
            if state.replaced:
                return "applied", ""
            if state.provided:
                return "provided", ""
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
                and _may_be_held(self._states[patch.name], self._states[patch.name].replaced[-1])[0]
            }
            # PyTorch's own tables of functions are no call sites.
            return sweep.describe_holders(originals, _left_alone(("torch",))) if originals else {}

    # Providing.

    def _provide(self, state: State) -> bool:
        """Open a record's door if there is nothing to redirect; say whether that was done."""
        patch = state.patch
        if not to_be_provided(patch) or unavailable(patch):
            return False

        def build() -> Any:
            state.site.arm()
            module, _, name = patch.contents.partition(":")
            return getattr(import_module(module), name)(state.site)

        for package in patch.provides:
            FINDER.open(package, build)
        state.provided = True
        _log.info("%s: provided", patch.name)
        return True

    def _withdraw(self, state: State) -> None:
        if state.provided:
            for package in state.patch.provides:
                FINDER.close(package)
            state.provided = False

    # Installing.

    def _module_executed(self, name: str) -> None:
        with self._lock:
            ready = [
                state.patch
                for state in self._after[name]
                if state.wanted and not self._is_current(state)
            ]
            if not ready:
                return
            with self._changing():
                # A package's own __init__ may have taken its functions by name.
                swept = name == "torch" or any(patch.provides for patch in ready)
                self._install(ready, swept=swept)

    def _is_current(self, state: State) -> bool:
        """Whether the target is our replacement right now; a reload puts a new original there."""
        if not state.replaced:
            return False
        try:
            _, _, value = wrapt.resolve_path(state.patch.module, state.patch.attribute)
        except (ImportError, AttributeError):
            return False
        if any(value is swap.new for swap in state.replaced):
            return True
        # Another record with the same target may stand over ours.
        over = {id(swap.new): swap for other in self._states.values() for swap in other.replaced}
        while id(value) in over:
            value = over[id(value)].old
            if any(value is swap.new for swap in state.replaced):
                return True
        return False

    def _install(self, patches: Iterable[Patch], swept: bool) -> None:
        fresh: dict[int, sweep.Swap] = {}
        keep: set[str] = set()
        by_original: dict[int, State] = {}
        for patch in patches:
            state = self._states[patch.name]
            alone = sweep.alone(patch.module, patch.attribute)
            try:
                swaps = self._install_one(state)
            except _Skip as skip:
                state.reason = str(skip)
                _log.info("%s skipped: %s", patch.name, skip)
                continue
            except Exception as error:  # noqa: BLE001 - one broken record must not stop the rest
                state.reason = f"could not be built: {type(error).__name__}: {error}"
                _log.warning("%s %s", patch.name, state.reason)
                _log.debug("%s", patch.name, exc_info=True)
                continue
            if alone and not patch.also:
                state.references[id(swaps[0].new)] = sweep.references(swaps[0])
                continue
            for swap in swaps:
                fresh[id(swap.old)] = swap
                by_original[id(swap.old)] = state
            keep.update(patch.keep_in)
        if swept and fresh:
            for holder in sweep.rebind(fresh, _left_alone(keep)):
                by_original[holder.found].holders.append(holder)

    def _install_one(self, state: State) -> list[sweep.Swap]:
        patch = state.patch
        missing = unavailable(patch)
        if missing:
            raise _Skip(missing)
        # All of a record's targets, or none: each is looked at before the first is replaced.
        ready = [
            self._ready(state, module, attribute)
            for module, attribute in ((patch.module, patch.attribute), *patch.also)
        ]
        return [self._replace(state, *one) for one in ready]

    def _ready(self, state: State, module: str, path: str) -> tuple[Any, ...]:
        """One target and its replacement."""
        patch, target = state.patch, f"{module}.{path}"
        try:
            owner, attribute, original = wrapt.resolve_path(module, path)
        except (ImportError, AttributeError) as error:
            raise _Skip(f"{target} does not exist here") from error
        if isinstance(owner, type) and attribute not in vars(owner):
            raise _Skip(f"{target} is inherited, not defined there")
        builtin = patch.parameters is None and not patch.provides
        if builtin and isinstance(original, FunctionType):
            raise _Skip(f"{target} was already replaced by {original.__module__}")
        tables = [_table(where) for where in patch.tables]
        state.site.arm()
        build = _resolve(patch.build)
        try:
            replacement = build(original, state.site)
            # Of what is made for rewriting each part is guarded; a front door's original cannot
            # run where it is redirected.
            if patch.reference != INSIDE and not patch.provides:
                replacement = faults.guard(replacement, original, state.site)
            if state.site.watching and patch.reference != INSIDE:
                replacement = verify.watch(
                    replacement,
                    original,
                    state.site.verification_now,
                    patch.name,
                    _resolve(patch.reference) if ":" in patch.reference else None,
                    comparable=patch.reference != NOT_COMPARED,
                )
            state.site.installed = replacement
            law.dress(replacement, original, module, path)
        except law.SignatureChanged as changed:
            raise _Skip(str(changed)) from changed
        return target, owner, attribute, original, replacement, tables

    def _replace(
        self,
        state: State,
        target: str,
        owner: Any,
        attribute: str,
        original: Any,
        replacement: Any,
        tables: list[Any],
    ) -> sweep.Swap:
        patch = state.patch
        after_install = getattr(import_module(patch.build.partition(":")[0]), "after_install", None)
        if after_install is not None:
            after_install(replacement)
        wrapt.apply_patch(owner, attribute, replacement)
        swap = sweep.Swap(original, replacement)
        state.replaced.append(swap)
        state.holders.append(
            sweep.Holder(
                target,
                id(original),
                original,
                replacement,
                lambda: vars(owner).get(attribute),
                lambda value: wrapt.apply_patch(owner, attribute, value),
            )
        )
        for where, table in tables:
            state.holders += sweep.rebind_values(table, swap, where)
        _log.info("%s: %s -> %s", patch.name, target, patch.becomes)
        return swap

    # Undoing.

    def _uninstall(self, states: Iterable[State]) -> list[str]:
        back: dict[int, sweep.Swap] = {}
        lost: list[str] = []
        # Of two records with one target, the later one's original is the earlier one's replacement.
        for state in reversed(list(states)):
            self._withdraw(state)
            shared = [swap for swap in state.replaced if _may_be_held(state, swap)[1]]
            for holder in reversed(state.holders):
                if not holder.undo():
                    state.lost.append(holder.where)
            for original, replacement in state.replaced:
                _tell(state.patch, "after_uninstall", replacement)
                if any(replacement is swap.new for swap in shared):
                    back[id(replacement)] = sweep.Swap(replacement, original)
            lost += state.lost
            state.holders, state.replaced, state.references = [], [], {}
            state.site.watching, state.site.installed = False, None
        if back:
            # Modules imported while we were installed took our function by name.
            sweep.rebind(back, _left_alone(()), to_replacement=False)
        return lost

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Around every change of what is installed."""
        before = self._installed()
        try:
            with collecting.paused():
                yield
        finally:
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


def _may_be_held(state: State, swap: sweep.Swap) -> tuple[bool, bool]:
    """Whether anybody but us may hold the original, and the replacement."""
    then = state.references.get(id(swap.new))
    if then is None:
        return True, True
    now = sweep.references(swap)
    return now[0] > then[0], now[1] > then[1]


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
    if nothing_to_mend(patch):
        return nothing_to_mend(patch)
    for distribution, versions in patch.requires.items():
        if distribution != "torch" and to_be_provided(patch):
            continue
        try:
            version = _version(distribution)
        except metadata.PackageNotFoundError:
            if find_module(distribution):
                return f"{distribution} has no version to check"
            return f"{distribution} is not installed"
        if not _contains(versions, version):
            return f"{distribution} {version} is not a tested version ({versions})"
    return ""


def nothing_to_mend(patch: Patch) -> str:
    """Which installed package does not have the fault that this record puts right; empty: none."""
    for distribution, versions in patch.mends.items():
        try:
            version = _version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if not _contains(versions, version):
            return f"{distribution} {version} does not need it ({versions} does)"
    return ""


def to_be_provided(patch: Patch) -> bool:
    """Whether the record's packages are absent, so that they can be provided instead."""
    return bool(patch.provides) and not any(map(find_module, patch.provides))


@functools.cache
def _version(distribution: str) -> Version:
    return Version(metadata.version(distribution))


@functools.cache
def _contains(versions: str, version: Version) -> bool:
    return SpecifierSet(versions).contains(version, prereleases=True)


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


def _table(path: str) -> tuple[str, dict[str, Any]]:
    """The dictionary at ``"module:attribute"``, with its dotted name."""
    where = path.replace(":", ".")
    try:
        found: Any = wrapt.resolve_path(*path.split(":"))[2]
    except (ImportError, AttributeError) as error:
        raise _Skip(f"{where} does not exist here") from error
    return where, found


def _tell(patch: Patch, event: str, replacement: Callable[..., Any]) -> None:
    """Call the family's ``after_install`` or ``after_uninstall``, where it has one."""
    told = getattr(import_module(patch.build.partition(":")[0]), event, None)
    if told is not None:
        told(replacement)


ENGINE = Engine()
"""The one engine of this process."""

os.register_at_fork(after_in_child=ENGINE.unlock_after_fork)
