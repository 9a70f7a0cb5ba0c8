"""What ``scripts/demo`` runs: one unmodified script, with and without mindiesd, and a judgement.

The script draws handwritten digits with a small Flux pipeline that was trained for this
(``examples/digits``, made by ``scripts/train_demo``). It runs with plain Python, patched, patched
on an emulated NPU, and with sparse attention asked for, each time from the same seeds; a classifier
that was trained on real digits reads what was drawn.

Exit status 1: a picture is wrong, or a patch that this pipeline should exercise was never taken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mindiesd.patches.report import Report, render  # noqa: E402
from scripts import _digits, _scores, _sheet  # noqa: E402

MODEL = "examples/digits"
SCRIPT = "examples/text_to_image.py"
PROMPTS = [f"the digit {name}" for name in _digits.NAMES]
EACH, STEPS, TEXT_LENGTH = 20, 16, 8
SPARSE = "rf_v2:0.75"

# The largest difference allowed in any colour channel of any pixel, of 255, between two runs that
# compute the same on the CPU.
TOLERANCE = 1
# The same on average over all pixels, between float32 on the CPU and bfloat16 on the emulated NPU:
# 0.32 with this model.
ROUNDING = 2
# The share of pictures that must be read as the digit that was asked for, in every column.
REQUIRED = 0.85
# The families of patches that a Flux pipeline calls at every step.
FAMILIES = ("sdpa", "rms_norm", "layer_norm", "ada_norm", "rope")

ENVIRONMENT = os.environ | {
    "CUDA_VISIBLE_DEVICES": "",  # the tolerance is for the CPU
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    "OMP_NUM_THREADS": "1",  # so small a model: threads would only wait for each other
    # Warnings and progress bars of the libraries, which are the same with and without mindiesd.
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}


@dataclass
class Run:
    """One run of the script, and what became of it.

    Attributes:
        name: of its files.
        folder: where they are written.
        title: of its column.
        launcher: what stands before the script in the command line.
        absent: why it was not made; empty where it was.
        report: what ``mindiesd-run`` wrote, as it is in JSON.
        sheet: what the script drew, [height, width, 3] of 0 to 255.
        read: the digit that the judge read in each picture.
        remarks: what is said about it.
    """

    name: str
    folder: Path
    title: str
    launcher: list[str]
    absent: str = ""
    report: dict[str, Any] | None = None
    sheet: np.ndarray | None = None
    read: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    remarks: list[str] = field(default_factory=list)

    @property
    def picture(self) -> Path:
        return self.folder / f"{self.name}.png"

    @property
    def report_file(self) -> Path:
        return self.folder / f"{self.name}.json"


def main() -> None:
    options = read_options()
    folder = ROOT / options.output
    folder.mkdir(parents=True, exist_ok=True)
    plain, patched, emulated, sparse = runs = planned(options, folder)
    comparison = folder / "comparison.png"
    for old in (comparison, *(path for run in runs for path in (run.picture, run.report_file))):
        old.unlink(missing_ok=True)

    stage("1/5  draw with plain Python")
    draw(plain, options.each)
    stage("2/5  draw with the same script under mindiesd-run")
    draw(patched, options.each)
    print(render(Report.from_dict(patched.report)))
    stage("3/5  draw with the same script on an emulated NPU")
    draw(emulated, options.each)
    stage("4/5  draw with the same script, sparse attention asked for")
    draw(sparse, options.each)
    stage("5/5  read the pictures and compare")
    failures = judge(runs)

    shown_columns(runs).save(comparison)
    print(f"\nthe pictures side by side: {shown(comparison)}")
    if failures:
        fail("; ".join(failures))
    if emulated.absent:
        print(f"NOT DRAWN on the emulated NPU: {emulated.absent}")
    print("demo passed: the pictures are right, and every expected patch was taken")


def planned(options: argparse.Namespace, folder: Path) -> list[Run]:
    here = str(Path(sys.executable).with_name("mindiesd-run"))
    npu = f"{options.npu}/bin/mindiesd-run"
    ways = [
        ("plain", "python …", [sys.executable]),
        ("patched", "mindiesd-run …", [here]),
        ("emulated", "mindiesd-run --emulate …", [npu, "--emulate"]),
        ("sparse", f"mindiesd-run --sparse={SPARSE} …", [here, f"--sparse={SPARSE}"]),
    ]
    runs = [Run(name, folder, title, launcher) for name, title, launcher in ways]
    for run in runs[1:]:
        run.launcher.insert(1, f"--report={shown(run.report_file)}")
    runs[2].absent = unavailable(npu) if options.npu else options.no_npu
    return runs


def unavailable(launcher: str) -> str:
    """Why no NPU can be emulated, such as for want of a C compiler; empty where one can."""
    command = [launcher, "--emulate", "--quiet", "-c", "pass"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    told = done.stderr.strip() or f"mindiesd-run --emulate ended with {done.returncode}"
    return told.splitlines()[-1]


def draw(run: Run, each: int) -> None:
    """Run the script, unless it is already known that this cannot be."""
    if run.absent:
        print(f"  NOT DRAWN: {run.absent}")
        return
    command = [*run.launcher, SCRIPT, "--model", MODEL, "--size", str(_digits.SIZE)]
    command += ["--steps", str(STEPS), "--each", str(each), "--text-length", str(TEXT_LENGTH)]
    execute([*command, "--output", shown(run.picture), "--prompt", *PROMPTS])
    run.sheet = np.asarray(Image.open(run.picture).convert("RGB"))
    if run.launcher[0] != sys.executable:
        run.report = json.loads(run.report_file.read_text(encoding="utf-8"))


def execute(command: list[str]) -> None:
    """Run one command from the project's folder, shown as a person would type it."""
    words = [shown(Path(command[0])), *command[1:]]
    print("  $ " + " ".join(f'"{word}"' if " " in word else word for word in words), flush=True)
    start = time.perf_counter()
    code = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=False).returncode
    if code:
        fail(f"that command ended with status {code}")
    print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)


def judge(runs: list[Run]) -> list[str]:
    """Read every picture, say what was found, and return what is wrong."""
    judge = _digits.Judge()
    print(f"the judge, a classifier of real digits: {share(*judge.held_out)} of held-out real ones")
    plain, _, emulated, sparse = runs
    failures = []
    for run in runs:
        print(f"\n{run.title}")
        if run.sheet is None:
            print(f"  NOT DRAWN: {run.absent}")
            continue
        pictures = _digits.cut(run.sheet, len(PROMPTS))
        run.read = judge.read(pictures)
        truth = asked(len(pictures))
        right = int((run.read == truth).sum())
        remark(run, f"read as the digit asked for: {share(right, len(truth))}")
        if right / len(truth) < REQUIRED:
            failures.append(f"{run.title}: only {right} of {len(truth)} pictures are right")
        if run is not plain:
            failures += against(plain, run, truth) + taken(run)
        if run is emulated:
            launches = run.report["trace"]["total_launches"]
            remark(run, f"{launches} operators launched on the emulated NPU, in bfloat16")
            if not launches:
                failures.append(f"{run.title}: nothing was launched on the emulated NPU")
        if run is sparse:
            about_sparse(run)
    return failures


def against(plain: Run, run: Run, truth: np.ndarray) -> list[str]:
    """Compare a run with the unpatched one, picture by picture."""
    difference = np.abs(run.sheet.astype(int) - plain.sheet.astype(int))
    found = _scores.paired(plain.read, run.read, truth)
    exact = is_exact(run)
    allowed = f" (allowed: {TOLERANCE})" if exact else ""
    remark(
        run,
        f"from the unpatched: at most {difference.max()} of 255 in any pixel{allowed}, "
        f"{difference.mean():.2g} on average",
    )
    verdict = "within noise" if found.within_noise else "MORE THAN NOISE"
    remark(
        run,
        f"{found.same} of {found.of} read as the same digit; right there only {found.lost}, "
        f"here only {found.won}: {verdict} (McNemar p = {found.p:.2g})",
    )
    failures = []
    if exact and difference.max() > TOLERANCE:
        failures.append(
            f"{run.title}: pictures differ by {difference.max()} of 255, more than {TOLERANCE}"
        )
    if not exact and not redirected(run)["sparse"] and difference.mean() > ROUNDING:
        failures.append(f"{run.title}: pictures differ by more than {ROUNDING} of 255 on average")
    if not found.within_noise and found.lost > found.won:
        failures.append(f"{run.title}: worse than unpatched by more than noise")
    return failures


def is_exact(run: Run) -> bool:
    """Whether a run computes the same as the unpatched one: on the CPU, nothing approximated."""
    return run.report is not None and run.report["trace"] is None and not redirected(run)["sparse"]


def redirected(run: Run) -> dict[str, int]:
    """Family of patches -> calls that it redirected, as the report says."""
    counts = dict.fromkeys([*FAMILIES, "sparse"], 0)
    for patch in run.report["patches"]:
        if patch["family"] in counts:
            counts[patch["family"]] += patch["redirected"]
    return counts


def taken(run: Run) -> list[str]:
    """Say how many calls each expected family redirected, and which redirected none."""
    counts = {name: count for name, count in redirected(run).items() if name in FAMILIES}
    remark(run, "calls redirected: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    missing = [name for name, count in counts.items() if not count]
    if missing:
        where = shown(run.report_file)
        return [f"{run.title}: no call was redirected by {', '.join(missing)} (see {where})"]
    return []


def about_sparse(run: Run) -> None:
    """Say whether anything was sparse, and if not, why."""
    patches = [patch for patch in run.report["patches"] if patch["family"] == "sparse"]
    count = redirected(run)["sparse"]
    if count:
        remark(run, f"{count} attentions were sparse: an approximation")
        return
    reasons = sorted({why for patch in patches for why in (*patch["fell_back"], patch["reason"])})
    models = ", ".join(patch["target"].split(".")[-2] for patch in patches)
    because = "; ".join(filter(None, reasons)) or f"only {models} can be, and none of them ran"
    remark(run, f"NOTHING WAS SPARSE, all attention stayed dense: {because}")


def remark(run: Run, text: str) -> None:
    run.remarks.append(text)
    print(f"  {text}")


def shown_columns(runs: list[Run]) -> Image.Image:
    columns = []
    for run in runs:
        column = _sheet.Column(run.title, run.remarks, absent=run.absent)
        if run.sheet is not None:
            pictures = _digits.cut(run.sheet, len(PROMPTS))
            rows = (len(PROMPTS), -1)
            column.pictures = pictures.reshape(*rows, *pictures.shape[1:])
            column.wrong = (run.read != asked(len(pictures))).reshape(rows)
        columns.append(column)
    foot = f"… is {SCRIPT}, the same each time. The first pictures of each row; red: misread."
    return _sheet.compose(columns, PROMPTS, foot)


def asked(count: int) -> np.ndarray:
    """The digit that was asked for, for each of the pictures, row by row."""
    return np.repeat(np.arange(len(PROMPTS)), count // len(PROMPTS))


def share(right: int, of: int) -> str:
    low, high = _scores.wilson(right, of)
    return f"{right} of {of}, {right / of:.1%} (95 %: {low:.1%} to {high:.1%})"


def stage(text: str) -> None:
    print(f"\n[{text}]", flush=True)


def shown(path: Path) -> str:
    """A path as seen from the project's folder."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def fail(reason: str) -> None:
    print(f"demo FAILED: {reason}", file=sys.stderr)
    raise SystemExit(1)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw digits in several ways and compare.")
    parser.add_argument("--each", type=int, default=EACH, help="pictures of each digit")
    parser.add_argument("--output", default="out/demo", help="folder of the pictures")
    npu = parser.add_mutually_exclusive_group(required=True)
    npu.add_argument("--npu", help="the environment with torch_npu")
    npu.add_argument("--no-npu", metavar="REASON", help="why there is none")
    return parser.parse_args()


if __name__ == "__main__":
    main()
