"""The page docs/matrix.md: for each model, what becomes of each kind of operation it calls.

``scripts/_coverage.py --matrix docs/matrix.md`` writes it, from the same run as docs/coverage.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from _seen import KINDS

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


def outcomes(migration: Any) -> tuple[dict[str, int], dict[str, str]]:
    """By the dotted name of each original: calls redirected, or why they fell back."""
    from mindiesd.patches.engine import ENGINE

    taken: dict[str, int] = {}
    refused: dict[str, str] = {}
    for patch in migration.report().patches:
        places = {patch.target}
        for swap in ENGINE.state(patch.name).replaced:
            original = swap.old
            places.add(f"{original.__module__}.{original.__qualname__}")
        for place in places:
            taken[place] = taken.get(place, 0) + patch.redirected
            if patch.fell_back:
                refused[place] = "; ".join(patch.fell_back)
    return taken, refused


def cells(
    seen: Mapping[str, Iterable[str]], taken: Mapping[str, int], refused: Mapping[str, str]
) -> dict[str, Cell]:
    """What became of each function that a model calls.

    Args:
        seen: kind -> dotted names, see :mod:`_seen`.
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
            if taken.get(target) or taken.get(around):
                cell.redirected.append(target)
            elif target in refused or around in refused:
                cell.left[target] = refused.get(target) or refused[around]
            elif {owner, target, _public(owner)} & alone.keys():
                cell.left[target] = next(
                    alone[one] for one in (owner, target, _public(owner)) if one in alone
                )
            elif target in taken or (target.endswith("rotate_half") and cell.redirected):
                cell.left[target] = "called by an operation that is redirected as a whole"
            elif target in _NATIVE:
                cell.left[target] = _NATIVE[target]
            else:
                cell.unknown.append(target)
    return row


def _public(name: str) -> str:
    """A class of torch as people write it: ``torch.nn.GroupNorm``."""
    if name.startswith("torch.nn.modules."):
        return f"torch.nn.{name.rpartition('.')[2]}"
    return name


def page(
    found: Iterable[tuple[str, str, dict[str, Cell], str]], versions: str, command: str
) -> str:
    """The page.

    Args:
        found: of each model its name, its launches, its cells and its error.
        versions: of the packages it ran with.
        command: what made it.
    """
    models = list(found)
    unknown = sum(bool(cell.unknown) for _, _, row, _ in models for cell in row.values())
    lines = [
        "# What becomes of each model's operations",
        "",
        "One forward of each tiny model on the emulated NPU. The functions that a forward calls",
        "were watched while it ran unpatched, so that a function nobody has looked at shows up as",
        "**unknown**, also in a newer diffusers. `left`: not redirected, for the reason given",
        "below; most are one kernel already.",
        "",
        f"Made by `{command}` with {versions}.",
        "",
        f"- models: {len(models)}; cells that are unknown: {unknown}",
        "",
        "| model | launches | error | " + " | ".join(KINDS) + " |",
        "|---|---|---|" + "---|" * len(KINDS),
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    unseen: dict[str, list[str]] = {}
    for name, launches, row, error in models:
        texts = [str(row[kind]) for kind in KINDS]
        lines.append(f"| {name} | {launches} | {error} | " + " | ".join(texts) + " |")
        for cell in row.values():
            for target, reason in cell.left.items():
                reasons.setdefault((target, reason), []).append(name)
            for target in cell.unknown:
                unseen.setdefault(target, []).append(name)
    lines += ["", "## Left, and why", "", "| function | why | models |", "|---|---|---|"]
    for (target, reason), names in sorted(reasons.items()):
        lines.append(f"| `{target}` | {reason} | {_some(names)} |")
    if unseen:
        lines += ["", "## Unknown", "", "| function | models |", "|---|---|"]
        lines += [f"| `{target}` | {_some(names)} |" for target, names in sorted(unseen.items())]
    return "\n".join(lines) + "\n"


def _some(names: list[str]) -> str:
    return (
        ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"
    )
