"""What two runs launched, side by side: as data and as a table."""

from __future__ import annotations

import io
import shutil
from typing import Any, NamedTuple

from mindiesd.emulator.counts import Counts, human, shown
from mindiesd.patches.report import Report

# Lines of the program in the table; the file has them all.
_LINES = 20


class Outcome(NamedTuple):
    """What came of one run.

    Attributes:
        code: the exit code; a negative one is a signal.
        report: of all its processes.
        missing: how many processes announced counts and did not hand them in.
    """

    code: int
    report: Report
    missing: int


def compared(unpatched: Outcome, patched: Outcome) -> dict[str, Any]:
    """The ``compare`` part of the report.

    Args:
        unpatched: the run without the patches.
        patched: the run with them.

    Returns:
        ``trace`` and ``processes`` of the run without patches; ``exit_codes`` of both runs, a
        negative one being a signal; ``complete``, whether both ended well and every process of
        theirs handed its counts in, without which the counts cannot be compared; ``notes`` on the
        run without patches; ``lines``: for each line of the program that launched something its
        launches ``[without, with]``. What a patched function launches counts for the line that
        calls it, in both runs.
    """
    ranges: dict[str, list[tuple[int, int]]] = {}
    for patch in patched.report.patches:
        for source in patch.sources:
            file, _, span = source.rpartition(":")
            first, _, last = span.partition("-")
            ranges.setdefault(shown(file), []).append((int(first), int(last)))
    before, after = _counts(unpatched.report), _counts(patched.report)
    lines_before, lines_after = before.outside(ranges), after.outside(ranges)
    every = sorted(
        {*lines_before, *lines_after}, key=lambda line: (-lines_after[line], -lines_before[line])
    )
    both = (unpatched, patched)
    return {
        "trace": unpatched.report.trace,
        "processes": unpatched.report.processes,
        "exit_codes": {"unpatched": unpatched.code, "patched": patched.code},
        "complete": not any(run.code or run.missing for run in both)
        and all(run.report.trace is not None for run in both),
        "notes": unpatched.report.notes,
        "lines": {line: [lines_before[line], lines_after[line]] for line in every},
    }


def table(report: Report) -> str:
    """The comparison for people.

    Args:
        report: with its ``compare`` part.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    found = report.compare
    assert found is not None
    out = io.StringIO()
    console = Console(file=out, width=shutil.get_terminal_size((120, 24)).columns)
    for line in _remarks(report, found):
        console.print(line, highlight=False, markup=False)
    if report.trace is None and found["trace"] is None:
        return out.getvalue()
    before, after = Counts.from_dict(found["trace"] or _NOTHING), _counts(report)

    def new(*columns: str) -> Table:
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        made.add_column(columns[0], overflow="fold")
        for name in columns[1:]:
            made.add_column(name, justify="right", no_wrap=True)
        return made

    rows = new("emulated NPU (counts; it has no clock)", "without", "patched", "ratio")
    for title, old, fresh, is_size in _figures(before, after):
        ratio = _ratio(old, fresh) if found["complete"] else "–"
        texts = [human(old), human(fresh)] if is_size else [_spaced(old), _spaced(fresh)]
        rows.add_row(title, *texts, ratio)
    console.print(rows)
    console.print()
    lines = new("lines that launch most, patched", "without", "patched")
    ranked = list(found["lines"].items())
    for line, (old, fresh) in ranked[:_LINES]:
        lines.add_row(Text(line), _spaced(old), _spaced(fresh))
    rest = ranked[_LINES:]
    if rest:
        sums = [_spaced(sum(pair[side] for _, pair in rest)) for side in (0, 1)]
        lines.add_row(f"{len(rest)} more lines", *sums)
    console.print(lines)
    return out.getvalue().rstrip() + "\n"


_NOTHING = Counts().to_dict()


def _counts(report: Report) -> Counts:
    return Counts.from_dict(report.trace or _NOTHING)


def _remarks(report: Report, found: dict[str, Any]) -> list[str]:
    """What spoils the comparison, a line each."""
    said = []
    for which, name in (("unpatched", "without the patches"), ("patched", "with the patches")):
        code = found["exit_codes"][which]
        if code:
            how = f"exit code {code}" if code > 0 else f"signal {-code}"
            said.append(f"mindiesd: the run {name} failed ({how}): its counts end there")
    for trace, name in ((found["trace"], "without the patches"), (report.trace, "with them")):
        if trace is None:
            said.append(
                f"mindiesd: nothing was counted in the run {name}: "
                "no process of this Python imported torch and ended by itself"
            )
    said += [
        f"note: without the patches: {note}" for note in found["notes"] if note not in report.notes
    ]
    return said


def _figures(before: Counts, after: Counts) -> list[tuple[str, int, int, bool]]:
    return [
        ("launches", before.total, after.total, False),
        ("bytes read", before.bytes_read, after.bytes_read, True),
        ("bytes written", before.bytes_written, after.bytes_written, True),
        ("dtype casts", before.casts.total(), after.casts.total(), False),
        (
            "hidden layout copies",
            before.layout_copies.total(),
            after.layout_copies.total(),
            False,
        ),
        ("their bytes", before.layout_copy_bytes, after.layout_copy_bytes, True),
        ("Sq × Skv tensors", before.squares.total(), after.squares.total(), False),
        ("their bytes", before.square_bytes, after.square_bytes, True),
        ("host transfers", before.transfers.total(), after.transfers.total(), False),
    ]


def _ratio(before: int, after: int) -> str:
    return f"{after / before:.2f}" if before else ("1.00" if not after else "–")


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
