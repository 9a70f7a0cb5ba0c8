"""Patches and unpatches many times and tells what is left over: nothing may be.

    python scripts/soak.py [--cycles 10000] [--only torch_layer_norm,torch_rms_norm] [--every 1000]

A cycle is a `patch_pipeline` block around one forward; every tenth has `patch_all` and
`unpatch_all` as well, every fiftieth a report. Objects, blocks of memory, weak references, tokens,
notes, import hooks and resident memory are counted at the start, on the way and at the end. The
status is 1 if any of them grew.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WARM_UP = 20


@dataclass(frozen=True)
class Left:
    """What is there at one moment; what it may grow by is in `ALLOWED`."""

    objects: int
    blocks: int
    weakrefs: int
    tokens: int
    notes: int
    hooks: int
    resident_kib: int


# Python's own caches come and go; what leaked once a cycle would be a multiple of these.
ALLOWED = Left(
    objects=20, blocks=400, weakrefs=10, tokens=0, notes=0, hooks=0, resident_kib=8 * 1024
)


def now() -> Left:
    import weakref

    from mindiesd.patches import scope
    from mindiesd.patches.engine import ENGINE

    gc.collect()
    objects = gc.get_objects()
    held = [value for value in objects if isinstance(value, (type, weakref.ref)) or callable(value)]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Left(
        objects=len(objects),
        blocks=sys.getallocatedblocks(),
        weakrefs=sum(weakref.getweakrefcount(value) for value in held),
        tokens=len(scope._tokens),
        notes=len(ENGINE.notes),
        hooks=len(sys.meta_path) + len(sys.path_hooks),
        resident_kib=pages * os.sysconf("SC_PAGESIZE") // 1024,
    )


def cycles(number: int, only: str) -> None:
    import torch

    import mindiesd

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(x)

    parts, x = [Part() for _ in range(3)], torch.randn(2, 8)
    expected = [part(x).detach() for part in parts]
    for turn in range(number):
        part = parts[turn % 3]
        with torch.no_grad(), mindiesd.patch_pipeline(part, only=only) as migration:
            result = part(x)
            if turn % 50 == 0:
                migration.report()
        torch.testing.assert_close(result, expected[turn % 3])
        if turn % 10 == 0:
            mindiesd.patch_all(only=only)
            with torch.no_grad():
                part(x)
            mindiesd.unpatch_all()


def show(count: int, left: Left, seconds: float) -> None:
    figures = "  ".join(
        f"{field.name} {value}" for field, value in zip(fields(left), astuple(left), strict=True)
    )
    print(f"after {count} cycles ({seconds:.0f} s): {figures}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=10_000)
    parser.add_argument("--only", default="torch_layer_norm,torch_rms_norm")
    parser.add_argument("--every", type=int, default=1000, help="how often figures are printed")
    given = parser.parse_args()
    cycles(WARM_UP, given.only)
    now()
    before = now()
    show(0, before, 0)
    start, done = time.perf_counter(), 0
    while done < given.cycles:
        count = min(given.every, given.cycles - done)
        cycles(count, given.only)
        done += count
        after = now()
        show(done, after, time.perf_counter() - start)
    names = [field.name for field in fields(Left)]
    grown = [new - old for new, old in zip(astuple(after), astuple(before), strict=True)]
    too_much = [
        f"{name} {more} (allowed {most})"
        for name, more, most in zip(names, grown, astuple(ALLOWED), strict=True)
        if more > most
    ]
    print("grown:", ", ".join(too_much) or "nothing")
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
