"""``mindiesd-run --emulate --compare``: both runs for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
import torch
import torch.nn.functional as F

q = torch.randn(1, 4, 2, 8, device="npu").transpose(1, 2)
mask = torch.randn(4, 4, device="npu")
norm = torch.nn.RMSNorm(8).npu()
with torch.no_grad():
    out = [norm(F.scaled_dot_product_attention(q, q, q, attn_mask=mask)) for _ in range(5)]
print("done", *sys.argv[1:], sys.stdin.read(), hash("text"))
with open("seen", "a") as file:
    print(sys.argv[1:], os.getcwd(), hash("text"), float(torch.rand(1)), file=file)
"""


def run(folder: Path, *command: str, stdin: str = "") -> subprocess.CompletedProcess:
    dropped = ("MINDIESD_", "_MINDIESD_", "ASCEND_", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    env.pop("PYTHONHASHSEED", None)
    (folder / "temp").mkdir(exist_ok=True)
    root = str(Path(__file__).resolve().parents[2])
    env.update(TMPDIR=str(folder / "temp"), PYTHONPATH=root)
    return subprocess.run(
        [sys.executable, "-m", "mindiesd.cli", "--emulate", "--compare", *command],
        env=env,
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def left(folder: Path) -> list[str]:
    return [path.name for path in (folder / "temp").iterdir() if "mindiesd" in path.name]


def test_table_file_and_child(tmp_path: Path) -> None:
    """The script in a subprocess of the script: what it launches is counted too."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "parent.py").write_text(
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, 'script.py', *sys.argv[1:]], check=True)\n"
    )
    done = run(tmp_path, "--report", "parent.py", "a b", stdin="text")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done a b text") == 1
    one, two = (tmp_path / "seen").read_text().splitlines()
    assert one == two, "same arguments, folder, hashes and random numbers"
    assert done.stderr.index("first without") < done.stderr.index("now with")
    (row,) = (line.split() for line in done.stderr.splitlines() if line.startswith("launches"))
    before, after = int(row[1]), int(row[2])
    assert after < before and row[3] == f"{after / before:.2f}"
    assert "script.py:10" in done.stderr
    assert left(tmp_path) == []


def test_a_failing_run_and_the_file(tmp_path: Path) -> None:
    """It fails only without the patches: both were run, and the code is passed on."""
    failing = SCRIPT + (
        "import mindiesd.patches.process as p\nif p.current_migration() is None: sys.exit(7)\n"
    )
    (tmp_path / "script.py").write_text(failing)
    done = run(tmp_path, "--report=r.json", "script.py")
    assert done.returncode == 7, done.stderr
    assert "without the patches failed (exit code 7)" in " ".join(done.stderr.split())
    data = json.loads((tmp_path / "r.json").read_text())
    compare = data["compare"]
    assert compare["exit_codes"] == {"unpatched": 7, "patched": 0}
    assert compare["complete"] is False
    assert compare["trace"]["total_launches"] > data["trace"]["total_launches"] > 0
    assert data["trace"]["launches"]["npu::npu_fusion_attention_v2"] == 5
    old, new = compare["lines"][f"{tmp_path}/script.py:10"]
    assert old > new


@pytest.mark.slow
def test_a_script_that_patches_itself_is_told_of(tmp_path: Path) -> None:
    code = "import mindiesd, torch; mindiesd.patch_all(); torch.ones(2, device='npu') * 2"
    done = run(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert "calls patch_all() itself" in " ".join(done.stderr.split())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_dies_of_a_signal(tmp_path: Path, number: int) -> None:
    code = f"import os; print('once', flush=True); os.kill(os.getpid(), {int(number)})"
    done = run(tmp_path, "-c", code)
    assert done.returncode == -number
    if number == signal.SIGTERM:
        # Whoever ends the first run does not want a second one.
        assert done.stdout == "" and "now with" not in done.stderr
    else:
        assert done.stdout == "once\n"
        assert f"with the patches failed (signal {int(number)})" in " ".join(done.stderr.split())
    assert left(tmp_path) == []


def test_without_torch_there_is_nothing_to_compare(tmp_path: Path) -> None:
    done = run(tmp_path, "-c", "print('out')")
    assert (done.returncode, done.stdout) == (0, "out\n")
    assert "torch was never imported, nothing to patch" in done.stderr
    assert "nothing was counted" in done.stderr
    assert "launches" not in done.stderr.replace("launches there", "")
