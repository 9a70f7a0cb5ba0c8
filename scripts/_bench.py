"""Measures everything, keeps it in docs/benchmarks/, and writes docs/benchmarks.md from that.

    scripts/bench                     measure, keep, write the page; some 30 minutes
    scripts/bench --only host parity  these parts only; the page takes the others from earlier runs
    scripts/bench --compare           measure, compare with the last kept run, keep nothing
    scripts/bench --page              write the page and its charts from what is kept
    scripts/bench --quick             see that everything runs; the figures mean nothing

With --compare the status is 1 if a figure is worse than it was by more than its tolerance, which
stands beside it in the JSON. Measure on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import _bench_page
import _history
from _history import ROOT, Part, Run

NPU = ROOT / ".venv-npu" / "bin" / "python"


@dataclass(frozen=True)
class Measurement:
    """One command that measures.

    Attributes:
        script: in scripts/; it takes ``--json FILE``.
        npu: whether it runs in the environment with torch_npu.
        depends: see ``_history.Part``.
        quick: arguments that make it short.
    """

    script: str
    npu: bool
    depends: str
    quick: tuple[str, ...]


MEASUREMENTS = {
    "host": Measurement("bench_overhead.py", False, "machine", ("--quick",)),
    "parity": Measurement("_parity.py", False, "machine", ()),
    "sparse": Measurement("bench_sparse.py", False, "machine", ("--quick",)),
    "launches": Measurement("_coverage.py", True, "versions", ("--only", "flux", "vae_tiny")),
}


def measured(name: str, quick: bool, python: Path) -> Part:
    """Run one command and read its figures.

    Raises:
        SystemExit: it failed.
    """
    measurement = MEASUREMENTS[name]
    shown = f"{'.venv-npu' if measurement.npu else '.venv'}/bin/python scripts/{measurement.script}"
    print(f"{name}: {shown}", file=sys.stderr, flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if measurement.npu:
        environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [str(python), f"scripts/{measurement.script}", "--json", str(file)]
        if quick:
            command += measurement.quick
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False
        )
        if done.returncode:
            raise SystemExit(f"{name}: {' '.join(command)} failed with status {done.returncode}")
        versions, figures = _history.figures_from_json(file.read_text(encoding="utf-8"))
    return Part(command=shown, depends=measurement.depends, versions=versions, figures=figures)


def run(names: list[str], quick: bool, npu: Path) -> Run:
    """Measure these parts."""
    parts = {}
    for name in names:
        python = Path(sys.executable)
        if MEASUREMENTS[name].npu:
            if not npu.exists():
                print(f"{name}: NOT MEASURED, there is no {npu}", file=sys.stderr)
                continue
            python = npu
        parts[name] = measured(name, quick, python)
    return Run(
        date=_history.now(), commit=_history.commit(), machine=_history.machine(), parts=parts
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, help="these parts only")
    parser.add_argument("--compare", action="store_true", help="compare instead of keeping")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--quick", action="store_true", help="see that it runs; keeps nothing")
    parser.add_argument("--npu", type=Path, default=NPU, help="Python with torch_npu")
    options = parser.parse_args()
    if options.page:
        for path in _bench_page.write():
            print(path.relative_to(ROOT))
        return 0
    now = run(options.only or [*MEASUREMENTS], options.quick, options.npu)
    if options.quick:
        for name, part in now.parts.items():
            print(f"{name}: {len(part.figures)} figures")
        return 0
    changes = _history.compare(_history.history(), now)
    worse = [change for change in changes if change.worse]
    for change in changes if options.compare else worse:
        print(change)
    print(f"{len(changes)} figures, {len(worse)} worse than in the last kept run")
    if options.compare:
        return 1 if worse else 0
    print(_history.keep(now).relative_to(ROOT))
    for path in _bench_page.write():
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
