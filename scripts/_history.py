"""Measured figures as data: one JSON file a run, kept in docs/benchmarks/, and compared.

Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "docs" / "benchmarks"
SCHEMA = 1
PACKAGES = ("torch", "torch_npu", "diffusers", "transformers")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured or counted number.

    Attributes:
        name: what it is, the same in every run.
        value: the number.
        unit: ``"µs"``, ``"ms"``, ``"×"``, ``"launches"``, …; empty for plain numbers.
        better: ``"less"`` or ``"more"``.
        goal: what it should reach, or None.
        tolerance: how much worse than another run it may be before that is a regression, as a part
            of the other's value.
        slack: how much worse on top of that, in the figure's unit.
        details: what else is known of it, for tables.
    """

    name: str
    value: float
    unit: str = ""
    better: str = "less"
    goal: float | None = None
    tolerance: float = 0.0
    slack: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.better == "less" else self.value >= self.goal

    def shown(self, number: float | None = None) -> str:
        """The value, or another number of the same unit, for people."""
        number = self.value if number is None else number
        digits = {"µs": 2, "ms": 0, "×": 3, "launches": 0, "copies": 0, "%": 1, "MiB": 1}
        text = f"{number:.{digits[self.unit]}f}" if self.unit in digits else f"{number:.3g}"
        return f"{text} {self.unit}".strip()

    def excess(self, before: Figure) -> float:
        """How much worse than ``before`` beyond what is tolerated; at most 0: no regression."""
        worse = self.value - before.value if self.better == "less" else before.value - self.value
        return worse - self.slack - self.tolerance * abs(before.value)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The figures of one command.

    Attributes:
        command: what measures them again.
        depends: ``"machine"``: times, to be compared on the same machine only; ``"versions"``:
            counts, the same everywhere with the same packages.
        versions: of Python and the packages that were used.
        figures: in the order of the tables.
    """

    command: str
    depends: str
    versions: dict[str, str]
    figures: list[Figure]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that was measured at one commit on one day.

    Attributes:
        date: when it ended, as ``2026-01-31T12:00:00Z``.
        commit: the short hash, with ``+`` where files were changed since.
        machine: what tells machines apart, and the load when it ended.
        parts: by name; a run need not have all.
    """

    date: str
    commit: str
    machine: dict[str, Any]
    parts: dict[str, Part]

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.day}-{self.commit.replace('+', '-changed')}.json"

    @property
    def day(self) -> str:
        """The day alone."""
        return self.date[:10]

    def to_json(self) -> str:
        """The text of its file."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Run:
        """Read back what ``to_json`` wrote.

        Raises:
            ValueError: it was written by another version of this file.
        """
        data = json.loads(text)
        schema = data.pop("schema", None)
        if schema != SCHEMA:
            raise ValueError(f"schema {schema}; this is for schema {SCHEMA}")
        parts = {
            name: Part(**{**part, "figures": [Figure(**one) for one in part["figures"]]})
            for name, part in data.pop("parts").items()
        }
        return cls(**data, parts=parts)


def history(folder: Path = KEPT) -> list[Run]:
    """Every kept run, the oldest first."""
    files = sorted(folder.glob("*.json"))
    runs = [Run.from_json(file.read_text(encoding="utf-8")) for file in files]
    return sorted(runs, key=lambda run: run.date)


def keep(run: Run, folder: Path = KEPT) -> Path:
    """Write a run, and return its file; nothing that is kept is lost.

    Parts of the same day, commit and machine that it does not have are taken over. A run of the
    same day and commit on another machine gets a file of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / run.name, 1
    while path.exists():
        older = Run.from_json(path.read_text(encoding="utf-8"))
        if _same_machine(older, run):
            run = replace(run, parts={**older.parts, **run.parts})
            break
        number += 1
        path = folder / run.name.replace(".json", f"-{number}.json")
    path.write_text(run.to_json(), encoding="utf-8")
    return path


def _same_machine(one: Run, other: Run) -> bool:
    keys = (one.machine.keys() | other.machine.keys()) - {"load"}
    return all(one.machine.get(key) == other.machine.get(key) for key in keys)


def latest(runs: Sequence[Run], part: str) -> Run | None:
    """The last run that has this part."""
    return next((run for run in reversed(runs) if part in run.parts), None)


@dataclass(frozen=True)
class Change:
    """One figure, before and now.

    Attributes:
        judged: whether the two can be compared at all.
        worse: by more than the figure's tolerance.
    """

    part: str
    before: Figure | None
    now: Figure | None
    judged: bool
    worse: bool

    def __str__(self) -> str:
        """One line for people."""
        either = self.now or self.before
        assert either is not None
        first = "new" if self.before is None else self.before.shown()
        second = "no longer measured" if self.now is None else self.now.shown()
        if self.worse:
            remark = "  WORSE"
        elif not self.judged:
            remark = "  (not judged)"
        else:
            remark = ""
        return f"{self.part}: {either.name}: {first} → {second}{remark}"


def compare(runs: Sequence[Run], now: Run) -> list[Change]:
    """Each figure of ``now`` beside the last kept run that has its part.

    Times are judged on the same machine only, counts with the same versions only. A figure that the
    kept run has and this one has not is worse: nothing disappears silently.
    """
    changes = []
    for name, part in now.parts.items():
        earlier = [run for run in runs if part.depends != "machine" or _same_machine(run, now)]
        run = latest(earlier, name)
        judged = run is not None
        run = run or latest(runs, name)
        if run is None:
            changes += [Change(name, None, figure, False, False) for figure in part.figures]
            continue
        old = run.parts[name]
        if part.depends == "versions":
            judged = old.versions == part.versions
        before = {figure.name: figure for figure in old.figures}
        for figure in part.figures:
            known = before.pop(figure.name, None)
            worse = judged and known is not None and figure.excess(known) > 0
            changes.append(Change(name, known, figure, judged and known is not None, worse))
        changes += [Change(name, figure, None, judged, judged) for figure in before.values()]
    return changes


def goals(figures: Iterable[Figure]) -> str:
    """A Markdown table of figures beside their goals."""
    lines = ["| what | measured | goal | met |", "|---|---|---|---|"]
    for figure in figures:
        goal, met = "", ""
        if figure.goal is not None:
            sign = "≤" if figure.better == "less" else "≥"
            goal = f"{sign} {figure.goal:g} {figure.unit}".strip()
            met = "yes" if figure.met else "**no**"
        lines.append(f"| {figure.name} | {figure.shown()} | {goal} | {met} |")
    return "\n".join(lines)


def figures_to_json(figures: Iterable[Figure]) -> str:
    """What a script that measures writes for scripts/bench: figures and installed versions."""
    told = {"versions": versions(), "figures": [asdict(figure) for figure in figures]}
    return json.dumps(told, indent=1, ensure_ascii=False) + "\n"


def figures_from_json(text: str) -> tuple[dict[str, str], list[Figure]]:
    """Read back what ``figures_to_json`` wrote."""
    told = json.loads(text)
    return told["versions"], [Figure(**one) for one in told["figures"]]


def commit() -> str:
    """The short hash of HEAD, with ``+`` where tracked files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "mindiesd", "scripts")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def machine() -> dict[str, Any]:
    """What tells this machine apart, and its load."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        model = next(named, model)
    return {
        "architecture": platform.machine(),
        "processor": model,
        "cores": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of Python and the packages that figures depend on, as installed here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time, as a run's ``date``."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
