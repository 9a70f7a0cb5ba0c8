"""The counts of a trace as data: added up over processes, written to a file, shown to people.

Nothing here needs torch: the launcher adds up and compares what its children counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_DEEPER = " < "
"""Between the calling lines of a stack, the innermost first."""


def shown(path: str) -> str:
    """A source file as people know it: installed ones from their package on."""
    marker = "site-packages/"
    return path[path.rindex(marker) + len(marker) :] if marker in path else path


@dataclass(kw_only=True, eq=False)
class Counts:
    """What an emulated device was asked to do. Never a time.

    Attributes:
        launches: launches by operator.
        sites: launches by calling line (``file:line``), then by operator.
        stacks: launches by calling line and the lines that called it, at most four, the innermost
            first, with ``" < "`` between them.
        bytes_read: of the arguments of all launches.
        bytes_written: of their results.
        casts: dtype casts, as ``"float32 -> float16"``.
        layout_copies: hidden copies, as ``"npu::operator(argument)"``.
        layout_copy_bytes: what they read and write.
        squares: Sq x Skv tensors written, by operator.
        square_bytes: what they hold.
        transfers: ``"host -> device"``, ``"device -> host"`` and ``"item"``.
        transfer_bytes: what those moved.
    """

    launches: Counter[str] = field(default_factory=Counter)
    sites: dict[str, Counter[str]] = field(default_factory=dict)
    stacks: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    bytes_written: int = 0
    casts: Counter[str] = field(default_factory=Counter)
    layout_copies: Counter[str] = field(default_factory=Counter)
    layout_copy_bytes: int = 0
    squares: Counter[str] = field(default_factory=Counter)
    square_bytes: int = 0
    transfers: Counter[str] = field(default_factory=Counter)
    transfer_bytes: int = 0

    @property
    def total(self) -> int:
        """All launches."""
        return self.launches.total()

    def to_dict(self) -> dict[str, Any]:
        """Everything, for programs (JSON can hold it)."""
        return {
            "total_launches": self.total,
            "launches": dict(self.launches.most_common()),
            "sites": {
                site: dict(counts.most_common())
                for site, counts in sorted(self.sites.items(), key=lambda item: -item[1].total())
            },
            "stacks": dict(self.stacks.most_common()),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "casts": dict(self.casts.most_common()),
            "layout_copies": dict(self.layout_copies.most_common()),
            "layout_copy_bytes": self.layout_copy_bytes,
            "squares": dict(self.squares.most_common()),
            "square_bytes": self.square_bytes,
            "transfers": dict(self.transfers.most_common()),
            "transfer_bytes": self.transfer_bytes,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        """Read back what ``to_dict`` wrote."""
        return cls(
            launches=Counter(data["launches"]),
            sites={site: Counter(counts) for site, counts in data["sites"].items()},
            stacks=Counter(data["stacks"]),
            bytes_read=data["bytes_read"],
            bytes_written=data["bytes_written"],
            casts=Counter(data["casts"]),
            layout_copies=Counter(data["layout_copies"]),
            layout_copy_bytes=data["layout_copy_bytes"],
            squares=Counter(data["squares"]),
            square_bytes=data["square_bytes"],
            transfers=Counter(data["transfers"]),
            transfer_bytes=data["transfer_bytes"],
        )

    def add(self, other: Counts) -> None:
        """Add what another process counted."""
        for name in ("launches", "stacks", "casts", "layout_copies", "squares", "transfers"):
            getattr(self, name).update(getattr(other, name))
        for site, counts in other.sites.items():
            self.sites.setdefault(site, Counter()).update(counts)
        self.bytes_read += other.bytes_read
        self.bytes_written += other.bytes_written
        self.layout_copy_bytes += other.layout_copy_bytes
        self.square_bytes += other.square_bytes
        self.transfer_bytes += other.transfer_bytes

    def outside(self, ranges: Mapping[str, list[tuple[int, int]]]) -> Counter[str]:
        """Launches by the innermost calling line that lies in none of these ranges.

        Args:
            ranges: file -> (first, last) line numbers, for instance of functions that a patch
                replaces: what such a function launches then belongs to the line that called it,
                with the patch and without.
        """
        lines: Counter[str] = Counter()
        for stack, number in self.stacks.items():
            every = stack.split(_DEEPER)
            lines[next((line for line in every if not _within(line, ranges)), every[-1])] += number
        return lines

    def __str__(self) -> str:
        """A short table, for people."""
        lines = [
            f"{self.total} launches, {human(self.bytes_read)} read, "
            f"{human(self.bytes_written)} written (counts only; the emulator has no clock)"
        ]
        for title, counts in (("", self.launches), ("cast ", self.casts)):
            lines += [f"{count:7}  {title}{name}" for name, count in counts.most_common()]
        for count, text in (
            (self.layout_copies.total(), f"hidden layout copies, {human(self.layout_copy_bytes)}"),
            (self.squares.total(), f"Sq x Skv tensors written, {human(self.square_bytes)}"),
            (self.transfers.total(), f"transfers, {human(self.transfer_bytes)}"),
        ):
            lines.append(f"{count:7}  {text}")
        lines += ["by calling line:"]
        ranked = sorted(self.sites.items(), key=lambda item: -item[1].total())
        for site, counts in ranked[:20]:
            most = ", ".join(f"{count} {name}" for name, count in counts.most_common(4))
            lines.append(f"{counts.total():7}  {site}  ({most})")
        if len(ranked) > 20:
            lines.append(f"         and {len(ranked) - 20} more lines")
        return "\n".join(lines)


def stack(lines: list[str]) -> str:
    """The key of ``stacks`` for calling lines, the innermost first."""
    return _DEEPER.join(lines)


def _within(line: str, ranges: Mapping[str, list[tuple[int, int]]]) -> bool:
    file, _, number = line.rpartition(":")
    return any(first <= int(number) <= last for first, last in ranges.get(file, ()))


def human(size: int) -> str:
    """Bytes for people."""
    if size < 1024:
        return f"{size} B"
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
