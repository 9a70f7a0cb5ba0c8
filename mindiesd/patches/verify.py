"""``verify=N`` and ``sites``: what is known of single calling lines.

With ``verify=N`` the first N redirected calls of each line run both ways and are judged.

The judge is float64, not the original: the original is called once more with float64 arguments on
the CPU, and ours may not be farther from that than the original is. A line that fails goes back to
the original for the rest of the run and stands in the report. With ``sites`` all calls are counted
by line; the line is looked up at every call, which costs about as much as a small redirect.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from mindiesd.patches.ledger import Counts
from mindiesd.patches.wrapper import Template

if TYPE_CHECKING:
    from torch import Tensor

FAILED = "failed verification at this line"
"""The reason counted for calls from a line that was sent back to the original."""

MARGIN = 1.1
"""How much larger than the original's error ours may be, as root mean squares."""

NOISE = 4.0
"""Units in the last place, relative to the result, below which two errors are not told apart."""

BLIND_NOISE = 32.0
"""The same where no float64 reference could be had and ours is compared with the original."""

_UNDECIDED = "undecided"


class _Busy(threading.local):
    """What a thread is about.

    Attributes:
        verifying: whether it is inside the original of a call that is being verified.
        blocked: the patch whose calls are refused now, because their line failed.
        outcomes: by patch, the reason of its last call.
    """

    def __init__(self) -> None:
        """Nothing, in each thread anew."""
        self.verifying = False
        self.blocked = ""
        self.outcomes: dict[str, str | None] = {}


_busy = _Busy()


@dataclass
class Place:
    """One calling line of one patch.

    Attributes:
        where: ``file:line``.
        left: how many more of its calls are verified.
        verified: how many were, and passed.
        error: largest root-mean-square error of a verified call, relative to the result.
        failure: what was wrong with the call that failed; empty while none did.
        unjudged: why calls could not be verified, with counts.
        counts: what became of its calls; ``None`` where they are not counted by line.
    """

    where: str
    left: int
    verified: int = 0
    error: float = 0.0
    failure: str = ""
    unjudged: dict[str, int] = field(default_factory=dict)
    counts: Counts | None = None


class Verification:
    """What ``verify=N`` and ``sites`` of one migration found so far."""

    def __init__(self, calls: int, sites: bool = False) -> None:
        """Verify the first ``calls`` redirected calls of each calling line.

        Args:
            calls: how many.
            sites: whether all calls are counted by line.
        """
        self.calls = calls
        self.sites = sites
        self._places: dict[tuple[str, CodeType, int], Place] = {}
        # The same by instruction, and code by identity: what every call asks for. Hashing a code
        # object goes through all of it, and finding an instruction's line through a table. The code
        # is held, so that no other gets its identity; equal code shares its lines.
        self._at: dict[tuple[str, int, int], tuple[Place, CodeType]] = {}

    def place(self, patch: str) -> Place:
        """The calling line, now seen through ``patch``.

        It is the innermost one in a module that is neither ours nor torch's; if there is none, the
        line that calls the patched function.
        """
        # The first frames are this one's, the watch's, and the wrapper's, which a thread may have
        # been started with.
        wrapper = sys._getframe(2)
        frame = first = wrapper.f_back or wrapper
        while True:
            module = frame.f_globals.get("__name__", "")
            outside = _outside.get(module)
            if outside is None:
                outside = _outside[module] = _is_outside(module)
            if outside:
                break
            if frame.f_back is None:
                frame = first
                break
            frame = frame.f_back
        code = frame.f_code
        instruction = (patch, id(code), frame.f_lasti)
        known = self._at.get(instruction)
        if known is None:
            known = self._at[instruction] = (self._line(patch, frame), code)
        return known[0]

    def _line(self, patch: str, frame: FrameType) -> Place:
        key = (patch, frame.f_code, frame.f_lineno)
        known = self._places.get(key)
        if known is None:
            where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            counts = Counts() if self.sites else None
            known = self._places.setdefault(key, Place(where, self.calls, counts=counts))
        return known

    def forget_counts(self) -> None:
        """Count from zero."""
        for place in list(self._places.values()):
            place.verified, place.unjudged = 0, {}
            if place.counts is not None:
                place.counts.forget()

    def places(self, patch: str) -> list[Place]:
        """The calling lines of one patch that were looked at."""
        return [place for key, place in list(self._places.items()) if key[0] == patch]


@dataclass(frozen=True)
class Verdict:
    """How ours and the original's result compare with the reference.

    Attributes:
        passed: ours is at least as good.
        error: our root-mean-square error, relative to the reference's size.
        why: what is wrong; empty when it passed.
    """

    passed: bool
    error: float
    why: str


def judge(ours: Any, theirs: Any, reference: Any) -> Verdict:
    """Whether ``ours`` is at least as accurate as ``theirs``.

    Args:
        ours: a tensor, or a tuple or list of them.
        theirs: the original's result, of the same structure.
        reference: the same in float64; ``None``: ours is compared with theirs alone.
    """
    ours, theirs = _tensors(ours), _tensors(theirs)
    if len(ours) != len(theirs):
        return Verdict(False, 0.0, f"{len(ours)} results instead of {len(theirs)}")
    exact = [None] * len(ours) if reference is None else _tensors(reference)
    worst = 0.0
    for mine, original, truth in zip(ours, theirs, exact, strict=True):
        verdict = _judge_one(mine, original, truth)
        worst = max(worst, verdict.error)
        if not verdict.passed:
            return verdict
    return Verdict(True, worst, "")


def _judge_one(ours: Tensor, theirs: Tensor, reference: Tensor | None) -> Verdict:
    import torch

    for what in ("dtype", "shape", "device"):
        mine, original = getattr(ours, what), getattr(theirs, what)
        if mine != original:
            return Verdict(False, 0.0, f"{what} {mine} instead of {original}")
    if not ours.dtype.is_floating_point:
        same = torch.equal(ours, theirs)
        return Verdict(same, 0.0, "" if same else "other values")
    mine, original = ours.detach().cpu().double(), theirs.detach().cpu().double()
    blind = reference is None
    truth = original if reference is None else reference.detach().cpu().double()
    finite = mine.isfinite()
    # An infinity or NaN of ours is right where the original has one as well.
    if bool((original.isfinite() & ~finite).any()):
        return Verdict(False, 0.0, "not finite where the original is")
    if blind and bool((finite & ~original.isfinite()).any()):
        return Verdict(False, 0.0, "finite where the original is not")
    both = finite & original.isfinite() & truth.isfinite()
    mine, original, truth = mine[both], original[both], truth[both]
    size = _rms(truth)
    error, theirs_error = _rms(mine - truth), _rms(original - truth)
    relative = error / size if size else error
    unit = torch.finfo(ours.dtype).eps
    allowed = max(MARGIN * theirs_error, (BLIND_NOISE if blind else NOISE) * unit * size)
    if error <= allowed:
        return Verdict(True, relative, "")
    against = "the original" if blind else "float64"
    return Verdict(
        False,
        relative,
        f"error {error:.3g} against {against}, the original's is {theirs_error:.3g}",
    )


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt()) if values.numel() else 0.0


def _tensors(result: Any) -> list[Tensor]:
    from torch import Tensor

    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for part in result for tensor in _tensors(part)]
    return []


def watch(
    replacement: Callable[..., Any],
    original: Callable[..., Any],
    verification_now: Callable[[], Verification | None],
    name: str,
    reference: Callable[..., Any] | None = None,
    comparable: bool = True,
) -> Callable[..., Any]:
    """``replacement``, verified and counted by line.

    Args:
        replacement: the function that redirects or calls ``original``; its ``Site`` must be
            ``watching``, so that it tells whether it took the call.
        original: what it replaces.
        verification_now: the verification that the current call belongs to, if any.
        name: the patch's name.
        reference: called with the arguments, returns the float64 result and, with it, a function
            that picks the same part from a result of the call; ``None``: the original is called
            with float64 arguments on the CPU.
        comparable: whether calls can be verified at all.
    """
    import torch

    watched = _Watch(replacement, original, verification_now, name, reference, comparable)
    tracing = torch.compiler.is_dynamo_compiling
    return _WATCHED.around(replacement, replacement, original, _judged, watched, tracing)


# Inside the original of a call that is being verified, all must be original.
_WATCHED = Template.here(
    """\
def make(_replacement, _original, _judged, _watch, _tracing):
    def watched({parameters}):
        if _tracing():
            return _replacement({arguments})
        if _judged and _watch.verifying():
            return _original({originals})
        _place = _watch.unsettled()
        if _place is None:
            return _replacement({arguments})
        return _watch.call(_place, ({given}), {{{named}}})
    return watched
"""
)


@dataclass(frozen=True)
class _Watch:
    """What one watched replacement does with calls; the attributes are those of :func:`watch`."""

    replacement: Callable[..., Any]
    original: Callable[..., Any]
    verification_now: Callable[[], Verification | None]
    name: str
    reference: Callable[..., Any] | None
    comparable: bool

    def verifying(self) -> bool:
        """Whether this thread is inside the original of a call that is being verified."""
        return _busy.verifying

    def unsettled(self) -> Place | None:
        """The calling line; None if nothing is to be done there, neither now nor later."""
        verification = self.verification_now()
        if verification is None:
            return None
        place = verification.place(self.name)
        if (self.comparable and place.left > 0) or place.failure or place.counts is not None:
            return place
        return None

    def call(self, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the replacement, note what became of it, and judge it if it is to be judged."""
        judging = self.comparable and place.left > 0
        outcomes = _busy.outcomes
        outcomes[self.name] = _UNDECIDED
        outer = _busy.blocked
        _judged.append(self.name)
        try:
            _busy.blocked = self.name if place.failure else outer
            ours = self.replacement(*args, **kwargs)
            outcome = outcomes[self.name]
            if place.counts is not None and outcome != _UNDECIDED:
                place.counts.redirected() if outcome is None else place.counts.fell_back(outcome)
            if outcome is not None or not judging:
                return ours
            _busy.verifying = True
            result = _compare(place, ours, self.original, self.reference, args, kwargs)
            # Only now: until the verdict is there, other threads' calls are judged too.
            place.left -= 1
            return result
        finally:
            _busy.blocked = outer
            _busy.verifying = False
            _judged.pop()


# The patches of which a call is being judged or counted now, in any thread: as long as there is
# none, nobody has to look at what is kept for the thread, which is slow.
_judged: list[str] = []


def note(name: str, reason: str | None) -> str | None:
    """Note what becomes of the current call of a patch; refuse it where its line failed before."""
    if not _judged:
        return reason
    if reason is None and _busy.blocked == name:
        reason = FAILED
    _busy.outcomes[name] = reason
    return reason


# Whether a module is neither ours nor torch's.
_outside: dict[Any, bool] = {}


def _is_outside(module: Any) -> bool:
    return not isinstance(module, str) or (
        module != "torch" and not module.startswith(("torch.", "mindiesd."))
    )


def _compare(
    place: Place,
    ours: Any,
    original: Callable[..., Any],
    reference: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Judge one call; returns what the caller gets: ours, or the original's when ours failed."""
    try:
        theirs = original(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - ours has a result, the caller gets it
        reason = f"the original raised {type(error).__name__}"
        place.unjudged[reason] = place.unjudged.get(reason, 0) + 1
        return ours
    pick: Callable[[Any], Any] = _whole
    truth: Any = None
    try:
        if reference is None:
            truth = original(*_double(args), **_double(kwargs))
        else:
            truth, pick = reference(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - many originals do not take float64, or not the CPU
        reason = f"no float64 reference: {type(error).__name__}"
        place.unjudged[reason] = place.unjudged.get(reason, 0) + 1
        truth, pick = None, _whole
    try:
        verdict = judge(pick(ours), pick(theirs), truth)
    except Exception as error:  # noqa: BLE001 - a fault of the judge is none of the result
        reason = f"could not be judged: {type(error).__name__}"
        place.unjudged[reason] = place.unjudged.get(reason, 0) + 1
        return ours
    if verdict.passed:
        place.verified += 1
        place.error = max(place.error, verdict.error)
        return ours
    place.failure = f"{verdict.why}; {_describe(args, kwargs)}"
    return theirs


def _whole(result: Any) -> Any:
    return result


def _double(value: Any) -> Any:
    """``value`` with every floating tensor in float64 on the CPU; modules are copied."""
    from torch import Tensor, complex128, float64
    from torch.nn import Module

    if isinstance(value, Tensor):
        there = value.detach().cpu()
        if there.is_complex():
            return there.to(complex128)
        return there.to(float64) if there.is_floating_point() else there
    if isinstance(value, Module):
        copied = copy.deepcopy(value).cpu().double()
        return copied
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_double(part) for part in value)
    if isinstance(value, list):
        return [_double(part) for part in value]
    if isinstance(value, dict):
        return {key: _double(part) for key, part in value.items()}
    return value


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The arguments in a few words: shapes, dtypes, devices, plain values."""
    words = [_word(value) for value in args]
    words += [f"{key}={_word(value)}" for key, value in kwargs.items()]
    return "called with " + ", ".join(words)


def _word(value: Any) -> str:
    from torch import Tensor
    from torch.nn import Module

    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{list(value.shape)} on {value.device}"
    if isinstance(value, Module):
        return type(value).__name__
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(_word, value)) + ")"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def sample_rows(total: int, most: int) -> list[int]:
    """At most ``most`` of ``total`` rows, evenly spread, first and last among them."""
    if total <= most or total < 2:
        return list(range(total))
    if most < 2:
        return [total - 1]
    return sorted({round(row * (total - 1) / (most - 1)) for row in range(most)})
