"""The demo as a whole: what it draws, what it says, and what it does not let pass."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts import _demo

ROOT = Path(__file__).parents[2]
WHY = "for the sake of the test"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The demo, run with two pictures of each digit and without an NPU."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "scripts/_demo.py", "--each", "2", "--no-npu", WHY]
    done = subprocess.run(
        [*command, "--output", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    return folder, done


@pytest.fixture
def runs(finished) -> list[_demo.Run]:
    """Its runs, to be changed at will."""
    folder, _ = finished
    options = type("Options", (), {"npu": None, "no_npu": WHY})
    runs = _demo.planned(options, folder)
    for run in runs:
        if not run.absent:
            run.sheet = np.asarray(Image.open(run.picture).convert("RGB")).copy()
            if run.name != "plain":
                run.report = json.loads(run.report_file.read_text(encoding="utf-8"))
    return runs


@pytest.mark.slow
def test_demo_passes_and_says_what_it_found(finished):
    folder, done = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"NOT DRAWN on the emulated NPU: {WHY}" in done.stdout
    assert "NOTHING WAS SPARSE" in done.stdout
    assert "FluxTransformerBlock" in done.stdout  # the report's table
    with Image.open(folder / "comparison.png") as picture:
        assert picture.width > 4 * 4 * 32


@pytest.mark.slow
def test_nothing_is_wrong_with_what_was_drawn(runs):
    assert _demo.judge(runs) == []


@pytest.mark.slow
@pytest.mark.parametrize("family", _demo.FAMILIES)
def test_a_patch_that_was_never_taken_is_noticed(runs, family):
    patched = runs[1]
    for patch in patched.report["patches"]:
        if patch["family"] == family:
            patch["redirected"] = 0
    (failure,) = _demo.judge(runs)
    assert f"no call was redirected by {family} " in failure


@pytest.mark.slow
def test_one_pixel_that_differs_is_noticed(runs):
    patched = runs[1]
    patched.sheet[40, 50, 1] ^= 2
    (failure,) = _demo.judge(runs)
    assert "differ by 2 of 255" in failure


@pytest.mark.slow
def test_digits_of_another_row_are_noticed(runs):
    for run in runs:
        if run.sheet is not None:
            run.sheet = np.roll(run.sheet, 32, axis=0)
    failures = _demo.judge(runs)
    assert len(failures) == 3
    assert all("pictures are right" in failure for failure in failures)


@pytest.mark.slow
def test_worse_on_the_npu_than_chance_allows_is_noticed(runs):
    plain, patched, emulated, _ = runs
    emulated.absent = ""
    emulated.report = copy.deepcopy(patched.report) | {"trace": {"total_launches": 1}}
    emulated.sheet = plain.sheet.copy()
    assert _demo.judge(runs) == []
    emulated.sheet[:, :2] ^= 8  # far more than rounding in a few pixels, and nothing is misread
    assert _demo.judge(runs) == []
    emulated.sheet[:] = np.roll(plain.sheet, 32, axis=0)
    assert any("of 255 on average" in told for told in _demo.judge(runs))
    assert any("worse than unpatched by more than noise" in told for told in _demo.judge(runs))
    emulated.report["trace"]["total_launches"] = 0
    assert any("nothing was launched" in told for told in _demo.judge(runs))


@pytest.mark.slow
def test_sparse_calls_and_reasons_are_told(runs):
    sparse = runs[3]
    _demo.about_sparse(sparse)
    assert "none of them ran" in sparse.remarks[-1]
    assert "WanTransformer3DModel" in sparse.remarks[-1]
    patch = next(p for p in sparse.report["patches"] if p["family"] == "sparse")
    patch["fell_back"] = {"shorter than min_sequence": 4}
    _demo.about_sparse(sparse)
    assert sparse.remarks[-1].endswith("shorter than min_sequence")
    patch["redirected"] = 4
    _demo.about_sparse(sparse)
    assert sparse.remarks[-1].startswith("4 attentions were sparse")
    assert not _demo.is_exact(sparse)


def test_why_no_npu_can_be_emulated_is_told():
    launcher = str(Path(sys.executable).with_name("mindiesd-run"))
    told = _demo.unavailable(launcher)
    assert told.startswith("mindiesd-run: --emulate: ")
    assert "torch_npu" in told
