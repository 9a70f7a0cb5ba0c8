"""The page docs/matrix.md: for each model, what becomes of each kind of operation it calls.

``scripts/_coverage.py --matrix docs/matrix.md`` writes it, from the same run as docs/coverage.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from _seen import KINDS

if TYPE_CHECKING:
    from _runs import Row

# Modules that only call the function that is redirected, or that is a kernel of its own.
_THROUGH = {
    "torch.nn.modules.normalization.RMSNorm.forward": "torch.nn.functional.rms_norm",
    "torch.nn.modules.activation.GELU.forward": "torch.nn.functional.gelu",
    "torch.nn.modules.activation.SiLU.forward": "torch.nn.functional.silu",
    "diffusers.models.activations.GELU.forward": "torch.nn.functional.gelu",
    "diffusers.models.activations.FP32SiLU.forward": "torch.nn.functional.silu",
    "transformers.activations.SiLUActivation.forward": "torch.nn.functional.silu",
}

# One kernel of the device already, in every model alike.
_NATIVE = {
    "torch.nn.functional.silu": "one kernel of the device already",
    "torch.nn.functional.gelu": "one kernel of the device already",
    "torch.nn.modules.activation.GEGLU.forward": "one kernel of the device already",
}


@dataclass
class Cell:
    """One model and one kind of operation.

    Attributes:
        redirected: functions of which calls were redirected.
        left: function -> why its calls were not.
        unknown: functions that nobody has looked at.
    """

    redirected: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """What stands in the table."""
        if self.unknown:
            return "**unknown**"
        if self.redirected:
            return "redirected, in part" if self.left else "redirected"
        return "left" if self.left else "–"


def outcomes(report: Any) -> tuple[dict[str, int], dict[str, str]]:
    """By the dotted name of each original: calls redirected, or why they were not."""
    from mindiesd.patches.engine import ENGINE

    taken: dict[str, int] = {}
    refused: dict[str, str] = {}
    for patch in report.patches:
        places = {patch.target}
        for swap in ENGINE.state(patch.name).replaced:
            original = swap.old
            places.add(f"{original.__module__}.{original.__qualname__}")
        for place in places:
            taken[place] = taken.get(place, 0) + patch.redirected
            if patch.fell_back:
                refused[place] = "; ".join(patch.fell_back)
            elif patch.status == "skipped":
                refused[place] = patch.reason
    return taken, refused


def cells(
    seen: Mapping[str, Iterable[str]],
    still: Mapping[str, Iterable[str]],
    taken: Mapping[str, int],
    refused: Mapping[str, str],
) -> dict[str, Cell]:
    """What became of each function that a model calls.

    Args:
        seen: kind -> dotted names of what it calls unpatched, see :mod:`_seen`.
        still: the same, patched.
        taken: dotted name -> calls redirected.
        refused: dotted name -> why calls fell back.
    """
    from mindiesd.patches.registry import left

    alone = {target.target: target.reason for family in left().values() for target in family}
    row = {kind: Cell() for kind in KINDS}
    for kind, names in seen.items():
        for name in sorted(names):
            target = _THROUGH.get(name, name)
            around = target.partition(".<locals>.")[0]
            owner = target.removesuffix(".forward")
            cell = row[kind]
            if name.endswith("rotate_half") and _has_another(names, name):
                continue  # a part of the function beside it
            if taken.get(target) or taken.get(around):
                cell.redirected.append(target)
            elif target in refused or around in refused:
                cell.left[target] = refused.get(target) or refused[around]
            elif name not in still[kind]:
                # What called it is redirected as a whole.
                cell.redirected.append(target)
            elif target in taken:
                # Called as ever, and what is redirected in it was never reached: a branch that
                # this model does not take.
                continue
            elif {owner, target, _public(owner)} & alone.keys():
                cell.left[target] = next(
                    alone[one] for one in (owner, target, _public(owner)) if one in alone
                )
            elif target in _NATIVE:
                cell.left[target] = _NATIVE[target]
            else:
                cell.unknown.append(target)
    return row


def _has_another(names: Iterable[str], name: str) -> bool:
    """Whether there is another function of the same module."""
    module = name.rpartition(".")[0]
    return any(other != name and other.startswith(module + ".") for other in names)


def _public(name: str) -> str:
    """A class of torch as people write it: ``torch.nn.GroupNorm``."""
    if name.startswith("torch.nn.modules."):
        return f"torch.nn.{name.rpartition('.')[2]}"
    return name


def page(
    rows: Sequence[Row], misfits: Mapping[str, str], versions: Mapping[str, str], command: str
) -> str:
    """The page.

    Args:
        rows: of the models.
        misfits: name of a record that is not in force with these versions -> why.
        versions: distribution -> version that it ran with.
        command: what made it.
    """
    here = [row for row in rows if not row.absent]
    unknown = sum(bool(cell.unknown) for row in here for cell in row.cells.values())
    both = [row for row in here if not row.before.failed and not row.after.failed]
    before = sum(row.before.launches for row in both)
    after = sum(row.after.launches for row in both)
    more = [row.name for row in both if row.after.launches > row.before.launches]
    mended = [row.name for row in here if row.before.failed and not row.after.failed]
    broken = [row.name for row in here if row.after.failed]
    text = [
        "# What becomes of each model's operations",
        "",
        "One forward of each tiny model on the emulated NPU. The functions that a forward calls",
        "were watched while it ran unpatched, so that a function nobody has looked at shows up as",
        "**unknown**, also in a newer diffusers. `left`: not redirected, for the reason given",
        "below; most are one kernel already.",
        "",
        f"Made by `{command}` with {_written(versions)}.",
        "",
        f"- models: {len(here)}; cells that are unknown: {unknown}",
        f"- launches: {before} → {after}; models with more than unpatched: {_names(more)}",
        f"- models that run only with the patches: {_names(mended)}; that do not run with them: "
        f"{_names(broken)}",
        f"- records that are not in force with these versions: {len(misfits)}",
        "",
        "| model | launches | error | " + " | ".join(KINDS) + " |",
        "|---|---|---|" + "---|" * len(KINDS),
    ]
    text += [_line(row) for row in here]
    text += ["", "## Left, and why", "", "| function | why | models |", "|---|---|---|"]
    for (target, reason), names in sorted(_reasons(here).items()):
        text.append(f"| `{target}` | {reason} | {_some(names)} |")
    unseen: dict[str, list[str]] = {}
    for row in here:
        for cell in row.cells.values():
            for target in cell.unknown:
                unseen.setdefault(target, []).append(row.name)
    if unseen:
        text += ["", "## Unknown", "", "| function | models |", "|---|---|"]
        text += [f"| `{target}` | {_some(names)} |" for target, names in sorted(unseen.items())]
    absent = [row for row in rows if row.absent]
    if absent:
        text += [
            *("", "## Models that these versions do not have", ""),
            "Tiny models of the newest versions that cannot be made, or do not run on the CPU.",
            *("", "| model | why |", "|---|---|"),
        ]
        text += map(_absent, absent)
    if misfits:
        text += ["", "## Records that are not in force", "", "| why | records |", "|---|---|"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in misfits.items():
            by_reason.setdefault(reason, []).append(f"`{name}`")
        text += [f"| {why} | {', '.join(names)} |" for why, names in sorted(by_reason.items())]
    return "\n".join(text) + "\n"


def _line(row: Row) -> str:
    texts = [str(row.cells[kind]) if row.cells else "" for kind in KINDS]
    return f"| {row.name} | {row.launches} | {row.after.error:.0e} | {' | '.join(texts)} |"


def _absent(row: Row) -> str:
    return f"| {row.name} | {row.absent} |"


def _reasons(rows: Iterable[Row]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for cell in row.cells.values():
            for target, reason in cell.left.items():
                found.setdefault((target, reason), []).append(row.name)
    return found


def drift(text: str, rows: Sequence[Row], versions: Mapping[str, str]) -> list[str]:
    """Where a page no longer says what the models of ``rows`` did; empty where it does.

    The error is not compared: it is of the last bits, and so of the machine.

    Args:
        text: of the page.
        rows: some of the models, or all.
        versions: that they ran with.
    """
    if _written(versions) not in text:
        return [f"made with other versions than {_written(versions)}"]
    told = lines(text)
    found = []
    for row in rows:
        line = _absent(row) if row.absent else _line(row)
        if row.name not in told:
            found.append(f"{row.name}: not on the page")
        elif _without_error(told[row.name]) != _without_error(line):
            found.append(f"{row.name}: now {line}, on the page {told[row.name]}")
    for target, reason in _reasons(rows):
        if f"| `{target}` | {reason} |" not in text:
            found.append(f"{target}: left because {reason}, which is not on the page")
    return found


def lines(text: str) -> dict[str, str]:
    """The lines of a page's tables of models, by the name of the model."""
    found = {}
    for line in text.partition("\n## Records")[0].splitlines():
        name = line.removeprefix("| ").partition(" | ")[0]
        if line.startswith("| ") and name not in ("model", "function", "why") and "`" not in name:
            found[name] = line
    return found


def comparable(text: str) -> list[str]:
    """The lines of a page without what differs from machine to machine."""
    models = lines(text).values()
    return [_without_error(line) if line in models else line for line in text.splitlines()]


def _without_error(line: str) -> str:
    cells = line.split(" | ")
    return " | ".join(cells[:2] + cells[3:])


def _written(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _some(names: list[str]) -> str:
    return (
        ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"
    )
