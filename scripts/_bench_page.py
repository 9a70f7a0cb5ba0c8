"""docs/benchmarks.md and its charts, from the runs kept in docs/benchmarks/."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import _history
from _chart import Bar, bars
from _history import KEPT, Figure, Part, Run, goals

PAGE = KEPT.parent / "benchmarks.md"

TITLES = {
    "host": "Host overhead, import and start-up",
    "parity": "The picture stays the same",
    "sparse": "Sparse attention",
    "launches": "Launches on the emulated NPU",
}
NOTES = {
    "host": (
        "What patching costs on a machine without an NPU: added host time per call, start-up, and "
        "a whole pipeline. Single calls compare minima of alternating repetitions, whole programs "
        "medians of alternating runs."
    ),
    "parity": (
        "The tiny Flux pipeline of the examples on the CPU, two prompts, against itself in "
        "float64. 1 × means that patching costs no accuracy."
    ),
    "sparse": (
        "Against dense SDPA on the CPU; the smaller of the ratios by wall and by processor time. "
        "Memory and quality are in [sparse_benchmark.md](sparse_benchmark.md) and in the JSON."
    ),
    "launches": (
        "Counts over tiny configurations of every model, the same on every machine; each model has "
        "a row in [coverage.md](coverage.md), and real sizes are in [estimates.md](estimates.md)."
    ),
}

# Models that the chart of launches shows.
SHOWN = {
    "SDXL (UNet)": "unet_sdxl",
    "SD 3.5": "sd35",
    "Flux": "flux",
    "Flux 2": "flux2",
    "Qwen-Image": "qwenimage",
    "Z-Image": "z_image",
    "Wan": "wan",
    "HunyuanVideo": "hunyuan_video",
    "CogVideoX": "cogvideox",
    "VAE": "vae",
    "T5": "t5",
}


def _named(name: str) -> Callable[[Part], Figure]:
    def find(part: Part) -> Figure:
        for figure in part.figures:
            if figure.name == name:
                return figure
        raise LookupError(f"no figure {name!r} after {part.command}")

    return find


def _sparse(part: Part) -> Figure:
    chosen = [f for f in part.figures if f.details.get("strategy", [0, 0])[1] == 0.75]
    ratios = [figure.value for figure in chosen if figure.details["table"] == "time"]
    return Figure(name="median", value=statistics.median(ratios), unit="×")


# Columns of the history: title, part, figure.
COLUMNS: tuple[tuple[str, str, Callable[[Part], Figure]], ...] = (
    ("launches, of unpatched", "launches", _named("launches, of unpatched")),
    ("bytes, of unpatched", "launches", _named("bytes read and written, of unpatched")),
    ("SDPA redirected", "host", _named("SDPA redirected, no mask, kernel a no-op")),
    ("`import mindiesd`", "host", _named("`import mindiesd`, added to `python -c pass`")),
    (
        "`patch_all()`",
        "host",
        _named("`patch_all()` after importing diffusers and transformers"),
    ),
    ("pipeline, patched / unpatched", "host", _named("a tiny Flux pipeline, patched / unpatched")),
    ("error, patched / unpatched", "parity", _named("error patched / unpatched, float32")),
    ("sparse 0.75, median", "sparse", _sparse),
)


def charts(runs: Sequence[Run]) -> dict[str, str]:
    """The SVG text of each chart that there are figures for, by file name."""
    found = {}
    run = _history.latest(runs, "launches")
    if run is not None:
        by_name = {figure.name: figure for figure in run.parts["launches"].figures}
        rows = []
        for label, model in SHOWN.items():
            figure = by_name.get(f"launches of {model}")
            if figure is not None:
                before = float(figure.details["unpatched"])
                shown = f"{before:.0f} → {figure.value:.0f}"
                rows.append(Bar(label, (before, figure.value), shown))
        title = "Launches of one forward (tiny configurations)"
        found["launches.svg"] = bars(title, ("unpatched", "patched"), rows)
    run = _history.latest(runs, "host")
    if run is not None:
        rows = [
            Bar(
                figure.name.removesuffix(", kernel a no-op"),
                (max(figure.value, 0.0),),
                figure.shown(),
            )
            for figure in run.parts["host"].figures
            if figure.unit == "µs"
        ]
        found["host.svg"] = bars("Host time added to a call, in µs", ("added",), rows)
    run = _history.latest(runs, "sparse")
    if run is not None:
        rows = [
            Bar(figure.name.partition(": ")[2], (figure.value,), figure.shown())
            for figure in run.parts["sparse"].figures
            if figure.details.get("table") == "time"
        ]
        title = "Sparse attention: times as fast as dense SDPA (CPU)"
        found["sparse.svg"] = bars(title, ("faster than dense",), rows, mark=1.0)
    return found


def _told(run: Run, part: Part) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in part.versions.items())
    where = run.machine
    if part.depends == "versions":
        return f"Commit {run.commit}, {run.day}; {versions}. Made by `{part.command}`."
    return (
        f"Commit {run.commit}, {run.day}; {where['processor']}, {where['cores']} cores, load "
        f"{where['load']} when it ended; {versions}. Made by `{part.command}`."
    )


def _figures(name: str, part: Part) -> str:
    if name == "launches":
        chosen = [f for f in part.figures if not f.name.startswith("launches of ")]
        lines = ["| what | unpatched | patched | |", "|---|---:|---:|---:|"]
        for figure in chosen:
            before = figure.details["unpatched"]
            after = figure.details.get("patched", figure.value)
            ratio = figure.shown() if figure.unit == "%" else ""
            lines.append(f"| {figure.name} | {before:.0f} | {after:.0f} | {ratio} |")
        return "\n".join(lines)
    if name == "sparse":
        return goals(f for f in part.figures if f.details.get("table") == "time")
    return goals(part.figures)


def history_table(runs: Sequence[Run]) -> str:
    """One row a run, the newest first; a part that a run does not have is a dash."""
    lines = [
        "| date | commit | " + " | ".join(title for title, _, _ in COLUMNS) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for run in reversed(runs):
        cells = [
            find(run.parts[part]).shown() if part in run.parts else "–" for _, part, find in COLUMNS
        ]
        lines.append(f"| {run.day} | {run.commit} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(runs: Sequence[Run], pictures: Sequence[str]) -> str:
    """The page, each part from the last run that has it.

    Args:
        runs: the oldest first.
        pictures: file names of the charts that there are.
    """
    lines = [
        "# Benchmarks",
        "",
        "Generated by `scripts/bench` from the runs in `docs/benchmarks/`; do not edit.",
        "Nothing here was measured on Ascend hardware. `scripts/bench --compare` measures again",
        "and fails where a figure is worse than in the last kept run by more than its tolerance.",
        "",
    ]
    for name, title in TITLES.items():
        run = _history.latest(runs, name)
        lines += [f"## {title}", "", NOTES[name], ""]
        if run is None:
            lines += ["Not measured yet.", ""]
            continue
        lines += [_told(run, run.parts[name]), ""]
        if f"{name}.svg" in pictures:
            lines += [f"![{title}](benchmarks/{name}.svg)", ""]
        lines += [_figures(name, run.parts[name]), ""]
    lines += ["## History", "", history_table(runs), ""]
    return "\n".join(lines)


def files(folder: Path = KEPT) -> dict[Path, str]:
    """Every generated file and its text."""
    runs = _history.history(folder)
    drawn = charts(runs)
    found = {folder / name: text for name, text in drawn.items()}
    found[folder.parent / "benchmarks.md"] = page(runs, [*drawn])
    return found


def write(folder: Path = KEPT) -> list[Path]:
    """Write them."""
    made = files(folder)
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return [*made]
