"""One forward of each tiny model on the emulated NPU, unpatched and with ``patch_all()``.

A model that the installed versions do not have, or cannot make, is a row that says so.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import _matrix
import _seen


@dataclass
class Run:
    """One forward on the device: its counts, or what went wrong."""

    launches: int = 0
    softmax: int = 0
    other_softmax: int = 0
    views: int = 0
    needed: int = 0
    slices: int = 0
    casts: int = 0
    read: int = 0
    error: float = 0.0
    failed: str = ""


@dataclass
class Row:
    """One model, before and after, and what the patches did.

    Attributes:
        absent: why it cannot run at all with the installed versions, on any device; then nothing
            else of the row means anything.
    """

    name: str
    before: Run = field(default_factory=Run)
    after: Run = field(default_factory=Run)
    redirected: int = 0
    fell_back: dict[str, int] = field(default_factory=dict)
    cells: dict[str, _matrix.Cell] = field(default_factory=dict)
    absent: str = ""

    @property
    def launches(self) -> str:
        """``before → after``, or what went wrong in their place."""
        before, after = (run.failed or str(run.launches) for run in (self.before, self.after))
        return f"{before} → {after}"


@dataclass
class _Subject:
    """A model between its two runs."""

    tiny: Any
    row: Row
    model: Any = None
    expected: Any = None
    seen: dict[str, set[str]] = field(default_factory=dict)


def rows(only: Iterable[str] = ()) -> list[Row]:
    """Every model of the tests, or those named, in the order of the tests."""
    from mindiesd.emulator import start

    start()
    from tests.emulator.tiny_models import MODELS

    wanted = set(only) or set(MODELS)
    subjects = [_Subject(tiny, Row(name)) for name, tiny in MODELS.items() if name in wanted]
    for subject in subjects:
        _unpatched(subject)
    subjects_here = [subject for subject in subjects if not subject.row.absent]
    import mindiesd

    # Once for all of them: finding what to patch takes longer than most of the models.
    migration = mindiesd.patch_all()
    try:
        for subject in subjects_here:
            _patched(subject, migration)
    finally:
        mindiesd.unpatch_all()
    return [subject.row for subject in subjects]


def _unpatched(subject: _Subject) -> None:
    import torch

    from tests.emulator.tiny_models import first_tensor, without_torch_npu

    row = subject.row
    model, failed = _made(subject.tiny)
    if model is None:
        # As on a machine without an NPU; what the library's makers have tested.
        with without_torch_npu():
            model, row.absent = _made(subject.tiny)
        if model is None:
            return
    try:
        with torch.no_grad(), without_torch_npu(), _seen.watching() as subject.seen:
            subject.expected = first_tensor(model(**subject.tiny.make_inputs()))
    except Exception as error:  # noqa: BLE001 - whatever it is belongs in the table
        row.absent = _told(error)
        return
    if failed:
        row.before = Run(failed=failed)
        return
    subject.model = model.to("npu")
    with _seen.watching() as seen:
        row.before = _measure(subject)
    if not row.before.failed:
        subject.seen = seen


def _patched(subject: _Subject, migration: Any) -> None:
    row = subject.row
    if subject.model is None:
        model, failed = _made(subject.tiny)
        if model is None:
            row.after = Run(failed=failed)
            return
        subject.model = model.to("npu")
    with _seen.watching() as still:
        _measure(subject)  # what is kept with parameters and positions is made once
    migration.forget_counts()
    row.after = _measure(subject)
    subject.model = None
    report = migration.report()
    row.redirected = report.redirected
    if not row.after.failed:
        row.cells = _matrix.cells(subject.seen, still, *_matrix.outcomes(report))
    for patch in report.patches:
        for reason, count in patch.fell_back.items():
            row.fell_back[f"{patch.name}: {reason}"] = count
    print(f"{row.name}: {row.launches}", file=sys.stderr, flush=True)


def _made(tiny: Any) -> tuple[Any, str]:
    """The model, or why it cannot be made."""
    try:
        return tiny.build(), ""
    except Exception as error:  # noqa: BLE001 - whatever it is belongs in the table
        return None, _told(error)


def _measure(subject: _Subject) -> Run:
    """Forward the model once under a trace and compare with the CPU's result."""
    import torch
    from _counts import counting

    from tests.emulator.tiny_models import first_tensor, move

    inputs = move(subject.tiny.make_inputs(), lambda tensor: tensor.to("npu"))
    try:
        with torch.no_grad(), counting() as counted:
            got = first_tensor(subject.model(**inputs))
    except Exception as error:  # noqa: BLE001 - whatever it is belongs in the table
        return Run(failed=_told(error))
    difference = (got.cpu().double() - subject.expected.double()).abs().max().item()
    return Run(
        launches=counted.total,
        softmax=counted.softmaxes["attention"],
        other_softmax=counted.softmaxes["other"],
        views=counted.copies["view"],
        needed=counted.copies["needed"],
        slices=counted.copies["slice"] + counted.copies["repeat"],
        casts=counted.casts.total(),
        read=counted.bytes_read + counted.bytes_written,
        error=difference,
    )


def _told(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:80]}".replace("|", "/")
