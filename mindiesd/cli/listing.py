"""``mindiesd-run --list``: the registry, for people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from mindiesd.patches.registry import Patch, records


def show_list() -> None:
    """Write every patch record to standard output."""
    print_rows(
        ("patch", "target", "becomes", "why", "numerics", "versions"),
        [
            (
                record.name,
                record.target,
                record.becomes,
                record.why,
                record.numerics,
                wanted_versions(record),
            )
            for record in records()
        ],
    )


def wanted_versions(record: Patch) -> str:
    """The versions a record is for, e.g. ``torch>=2.5 diffusers>=0.35``."""
    return " ".join(f"{name}{versions}" for name, versions in record.requires.items())


def print_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write rows as a table on a terminal, else as plain text that grep and less can read.

    Args:
        header: the names of the columns.
        rows: the cells. In plain text the first cell of a row becomes a heading of its own.
    """
    if not sys.stdout.isatty():
        width = max(len(name) for name in header[1:])
        for row in rows:
            print(row[0])
            for name, cell in zip(header[1:], row[1:], strict=True):
                print(f"    {name:<{width}}  {cell}")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
