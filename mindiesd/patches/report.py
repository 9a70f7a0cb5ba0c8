"""The report: what was patched and what became of the calls, for people and for programs."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import mindiesd
from mindiesd.errors import ParametersInvalid

SCHEMA = 3
"""Version of the dictionary form; grows when a field comes, goes away or changes its meaning.

2 added ``trace``, ``compare`` and the patches' ``sources``; 3 the patches' ``sites`` and what of
verification is in the summary. ``docs/report.md`` describes every field.
"""

DISTRIBUTIONS = ("torch", "torch_npu", "diffusers", "transformers", "wrapt")
"""The packages whose versions decide what a patch may assume."""

_NAMED = 12
"""So many patches of which there is nothing to tell are named in the table for people."""

_STATUS_ORDER = ("applied", "provided", "pending", "skipped")


def versions() -> dict[str, str | None]:
    """The installed versions that matter here, read from package metadata; ``None``: absent."""
    from importlib import metadata

    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@dataclass(kw_only=True)
class SiteReport:
    """What happened to the calls that one patch got from one calling line.

    Attributes:
        where: ``file:line``.
        redirected: eager calls that took the new path; ``None`` where calls were not counted by
            line (without ``sites``).
        fell_back: reason -> eager calls that went to the original; ``None`` likewise.
        verified: calls that ``verify=N`` ran both ways and found right.
        largest_error: of those, the largest root-mean-square error relative to the result.
        failure: what was wrong with the call because of which this line went back to the original;
            empty where none was.
        without_reference: why a call was compared with the original alone -> such calls.
    """

    where: str
    redirected: int | None = None
    fell_back: dict[str, int] | None = None
    verified: int = 0
    largest_error: float = 0.0
    failure: str = ""
    without_reference: dict[str, int] = field(default_factory=dict)


@dataclass(kw_only=True)
class PatchReport:
    """What happened to one patch.

    Attributes:
        name: the record's name.
        family: the record's family.
        target: dotted name of what is redirected.
        becomes: dotted name of where it is redirected to.
        why: what is gained.
        numerics: how the result relates to the original's.
        status: ``"applied"``, ``"provided"`` (the package is not installed; the user's own code
            gets it from mindiesd), ``"pending"`` (its module has not been imported) or
            ``"skipped"``.
        reason: why it is pending or skipped; empty when applied.
        redirected: eager calls that took the new path.
        traced: calls traced into compiled graphs on the new path; how often a compiled graph runs
            is not counted.
        fell_back: reason -> eager calls that went to the original.
        rebound: other places that held the original and now hold the replacement.
        unreached: places that hold the original and were left alone; calls made through them are
            not redirected.
        verified: calls that ``verify=N`` ran both ways and found right.
        largest_error: of those, the largest root-mean-square error relative to the result.
        failed_verification: calling lines that went back to the original, each with what was
            wrong and what the call was.
        without_reference: why a call was compared with the original alone -> such calls.
        sources: where the source of an original lies in whose place a function of mindiesd stands,
            as ``"file:first-last"`` line.
        sites: the calling lines, where ``verify=N`` or ``sites`` looked at them.
    """

    name: str
    family: str
    target: str
    becomes: str
    why: str
    numerics: str
    status: str
    reason: str = ""
    redirected: int = 0
    traced: int = 0
    fell_back: dict[str, int] = field(default_factory=dict)
    rebound: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    verified: int = 0
    largest_error: float = 0.0
    failed_verification: list[str] = field(default_factory=list)
    without_reference: dict[str, int] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    sites: list[SiteReport] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PatchReport:
        """Read back what ``dataclasses.asdict`` gave."""
        return cls(**{**data, "sites": [SiteReport(**site) for site in data["sites"]]})


@dataclass(kw_only=True)
class Report:
    """What a migration did so far.

    Attributes:
        patches: one entry for each selected patch.
        options: the options of ``patch_all`` or ``patch_pipeline``.
        versions: installed versions, by distribution.
        notes: one-line remarks that belong to no single patch.
        processes: how many processes' counts are in here.
        torch_imported: whether any of those processes imported torch.
        trace: what an emulated NPU was asked to do, as ``mindiesd.emulator.Trace.to_dict`` gives
            it; ``None`` without one.
        compare: the same command's run without patches (``mindiesd-run --compare``), else ``None``:
            its ``trace`` and ``processes``, and ``exit_codes`` of both runs.
    """

    patches: list[PatchReport]
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    processes: int = 1
    torch_imported: bool = True
    trace: dict[str, Any] | None = None
    compare: dict[str, Any] | None = None

    @property
    def redirected(self) -> int:
        """Eager calls that took the new path, over all patches."""
        return sum(patch.redirected for patch in self.patches)

    @property
    def traced(self) -> int:
        """Calls traced into compiled graphs, over all patches."""
        return sum(patch.traced for patch in self.patches)

    @property
    def fell_back(self) -> int:
        """Eager calls that went to the original, over all patches."""
        return sum(sum(patch.fell_back.values()) for patch in self.patches)

    @property
    def verified(self) -> int:
        """Calls that ``verify=N`` found right, over all patches."""
        return sum(patch.verified for patch in self.patches)

    @property
    def failed_verification(self) -> int:
        """Calling lines that ``verify=N`` sent back to the original, over all patches."""
        return sum(len(patch.failed_verification) for patch in self.patches)

    def summary(self) -> str:
        """One line for the terminal."""
        if not self.torch_imported:
            return "mindiesd: torch was never imported, nothing to patch"
        applied = sum(patch.status == "applied" for patch in self.patches)
        parts = [
            f"{applied} patches",
            f"{_spaced(self.redirected)} calls redirected",
            f"{_spaced(self.fell_back)} fell back",
        ]
        if self.verified or self.failed_verification:
            parts.append(f"{_spaced(self.verified)} verified")
        if self.failed_verification:
            parts.append(f"{self.failed_verification} lines FAILED verification")
        if self.traced:
            parts.append(f"{_spaced(self.traced)} compiled in")
        for status in ("provided", "skipped", "pending"):
            count = sum(patch.status == status for patch in self.patches)
            if count:
                parts.append(f"{count} {status}")
        if self.processes > 1:
            parts.append(f"{self.processes} processes")
        return "mindiesd: " + ", ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; ``schema`` names the version of this form."""
        return {
            "schema": SCHEMA,
            "mindiesd": mindiesd.__version__,
            "summary": {
                "patches": sum(patch.status == "applied" for patch in self.patches),
                "redirected": self.redirected,
                "traced": self.traced,
                "fell_back": self.fell_back,
                "verified": self.verified,
                "failed_verification": self.failed_verification,
            },
            "options": self.options,
            "versions": self.versions,
            "notes": self.notes,
            "processes": self.processes,
            "torch_imported": self.torch_imported,
            "patches": [asdict(patch) for patch in self.patches],
            "trace": self.trace,
            "compare": self.compare,
        }

    def to_json(self) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Read back what ``to_dict`` wrote.

        Raises:
            ParametersInvalid: ``data`` has another schema version.
        """
        if data.get("schema") != SCHEMA:
            raise ParametersInvalid("data['schema']", data.get("schema"), str(SCHEMA))
        return cls(
            patches=[PatchReport.from_dict(patch) for patch in data["patches"]],
            options=dict(data["options"]),
            versions=dict(data["versions"]),
            notes=list(data["notes"]),
            processes=data["processes"],
            torch_imported=data["torch_imported"],
            trace=data["trace"],
            compare=data["compare"],
        )

    @classmethod
    def merged(cls, reports: Iterable[Report]) -> Report:
        """One report for several processes of one program: counts add up.

        Options and versions are the first report's; a patch counts as applied when it was applied
        in any process.

        Raises:
            ParametersInvalid: there is no report to merge.
        """
        every = list(reports)
        if not every:
            raise ParametersInvalid("reports", every, "at least one report")
        merged: dict[str, PatchReport] = {}
        for report in every:
            for patch in report.patches:
                known = merged.get(patch.name)
                if known is None:
                    merged[patch.name] = PatchReport.from_dict(asdict(patch))
                else:
                    _add(known, patch)
        return cls(
            patches=list(merged.values()),
            options=every[0].options,
            versions=every[0].versions,
            notes=list(dict.fromkeys(note for report in every for note in report.notes)),
            processes=sum(report.processes for report in every),
            torch_imported=any(report.torch_imported for report in every),
            trace=_added([report.trace for report in every if report.trace is not None]),
        )

    def __str__(self) -> str:
        """A table for people, 120 columns wide unless the terminal says otherwise."""
        return render(self)


def _add(into: PatchReport, other: PatchReport) -> None:
    if _STATUS_ORDER.index(other.status) < _STATUS_ORDER.index(into.status):
        into.status, into.reason = other.status, other.reason
    into.redirected += other.redirected
    into.traced += other.traced
    into.fell_back = _sum(into.fell_back, other.fell_back)
    into.verified += other.verified
    into.largest_error = max(into.largest_error, other.largest_error)
    into.failed_verification = list(
        dict.fromkeys(into.failed_verification + other.failed_verification)
    )
    into.without_reference = _sum(into.without_reference, other.without_reference)
    into.rebound = list(dict.fromkeys(into.rebound + other.rebound))
    into.unreached = list(dict.fromkeys(into.unreached + other.unreached))
    into.sources = list(dict.fromkeys(into.sources + other.sources))
    known = {site.where: site for site in into.sites}
    for site in other.sites:
        if site.where in known:
            _add_site(known[site.where], site)
        else:
            into.sites.append(replace(site))


def _add_site(into: SiteReport, other: SiteReport) -> None:
    if into.redirected is None or other.redirected is None:
        into.redirected = None
    else:
        into.redirected += other.redirected
    if into.fell_back is None or other.fell_back is None:
        into.fell_back = None
    else:
        into.fell_back = _sum(into.fell_back, other.fell_back)
    into.verified += other.verified
    into.largest_error = max(into.largest_error, other.largest_error)
    into.failure = into.failure or other.failure
    into.without_reference = _sum(into.without_reference, other.without_reference)


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in [*one, *other]}


def _added(traces: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not traces:
        return None
    from mindiesd.emulator.counts import Counts

    total = Counts()
    for trace in traces:
        total.add(Counts.from_dict(trace))
    return total.to_dict()


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _is_quiet(patch: PatchReport) -> bool:
    """Whether one line for several patches says all there is to say of this one."""
    return not (patch.redirected or patch.traced or patch.fell_back or patch.unreached)


def _quiet_because(patch: PatchReport) -> str:
    if patch.status == "applied":
        return "applied, never called"
    if patch.status == "pending":
        return "pending, module never imported"
    if patch.status == "provided":
        return "provided, never called"
    return f"{patch.status}, {patch.reason}"


def _together(patches: list[PatchReport]) -> str:
    """Their names; of many that were not skipped, how many each family has."""
    if len(patches) <= _NAMED or patches[0].status == "skipped":
        return ", ".join(patch.name for patch in patches)
    families: dict[str, int] = {}
    for patch in patches:
        families[patch.family] = families.get(patch.family, 0) + 1
    return ", ".join(f"{family} {count}" for family, count in families.items())


def _remarks(patch: PatchReport) -> list[str]:
    remarks = [f"{patch.target} → {patch.becomes}"]
    if patch.reason:
        remarks.append(patch.reason)
    if patch.status == "applied" and not (patch.redirected or patch.traced or patch.fell_back):
        remarks.append("never called")
    if patch.traced:
        remarks.append(f"{_spaced(patch.traced)} calls compiled into graphs")
    remarks += [
        f"{_spaced(count)} × {reason}"
        if patch.status == "provided"  # there is no original to fall back to
        else f"fell back {_spaced(count)} ×: {reason}"
        for reason, count in sorted(patch.fell_back.items(), key=lambda item: -item[1])
    ]
    if patch.verified:
        remarks.append(
            f"{_spaced(patch.verified)} calls verified, largest error {patch.largest_error:.1e}"
        )
    remarks += [f"FAILED verification: {failure}" for failure in patch.failed_verification]
    remarks += [
        f"{_spaced(count)} compared with the original alone: {reason}"
        for reason, count in patch.without_reference.items()
    ]
    remarks += [_line(site) for site in patch.sites if site.redirected is not None]
    if patch.rebound:
        remarks.append("also rebound: " + ", ".join(patch.rebound))
    if patch.unreached:
        remarks.append("not reached: " + ", ".join(patch.unreached))
    return remarks


def _line(site: SiteReport) -> str:
    """What is known of one calling line."""
    parts = [f"{_spaced(site.redirected or 0)} redirected"]
    parts += [
        f"{_spaced(count)} fell back: {reason}"
        for reason, count in sorted((site.fell_back or {}).items(), key=lambda item: -item[1])
    ]
    if site.verified:
        parts.append(f"{_spaced(site.verified)} verified, largest error {site.largest_error:.1e}")
    return f"{site.where}: {', '.join(parts)}"


def render(report: Report, width: int | None = None, color: bool = False) -> str:
    """The report as text.

    Args:
        report: what to show.
        width: columns; ``None`` takes the terminal's width, 120 where there is none.
        color: whether to use terminal colours.
    """
    import io
    import shutil

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("patch", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("redirected", justify="right", no_wrap=True)
    table.add_column("fell back", justify="right", no_wrap=True)
    table.add_column("target and remarks", overflow="fold")
    styles = {"applied": "green", "provided": "green", "pending": "yellow", "skipped": "red"}
    quiet: dict[str, list[PatchReport]] = {}
    for patch in report.patches:
        if _is_quiet(patch):
            quiet.setdefault(_quiet_because(patch), []).append(patch)
            continue
        table.add_row(
            patch.name,
            Text(patch.status, style=styles.get(patch.status, "")),
            _spaced(patch.redirected),
            _spaced(sum(patch.fell_back.values())),
            Text("\n".join(_remarks(patch))),
        )
    out = io.StringIO()
    columns = width or shutil.get_terminal_size((120, 24)).columns
    console = Console(file=out, width=columns, force_terminal=color, color_system="auto")
    console.print(report.summary(), style="bold", highlight=False, markup=False)
    if table.row_count:
        console.print(table)
    for because, patches in quiet.items():
        text = f"{because} ({len(patches)}): {_together(patches)}"
        console.print(text, highlight=False, markup=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    return out.getvalue().rstrip() + "\n"
