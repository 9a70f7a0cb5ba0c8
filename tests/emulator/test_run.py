"""``mindiesd-run --emulate``: a script finds an NPU, patched; its launches are told at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
import torch.nn.functional as F

assert torch.npu.is_available(), "no NPU"
q = torch.randn(1, 4, 2, 8, device="npu").transpose(1, 2)
with torch.no_grad():
    out = F.scaled_dot_product_attention(q, q, q)
expected = F.scaled_dot_product_attention(q.cpu(), q.cpu(), q.cpu())
torch.testing.assert_close(out.cpu(), expected)
print("done", *sys.argv[1:])
"""


def run(*command: str) -> subprocess.CompletedProcess:
    dropped = ("MINDIESD_", "_MINDIESD_", "ASCEND_", "TORCH_DEVICE_BACKEND_AUTOLOAD")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return subprocess.run(
        [sys.executable, "-m", "mindiesd.cli", *command],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_report_and_trace(script: str) -> None:
    done = run("--emulate", "--report", script, "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done --steps 2\n"
    # One call on the device, one on the CPU.
    assert "2 calls redirected" in done.stderr
    assert "emulated NPU: " in done.stderr
    assert "npu::npu_fusion_attention" in done.stderr
    assert "script.py:9" in done.stderr, "the launch belongs to the script's line"


def test_one_line_each_without_report(script: str) -> None:
    done = run("--emulate", script)
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert [line.split(":")[0] for line in ours] == ["mindiesd", "emulated NPU"], done.stderr


def test_children_have_it_too(script: str) -> None:
    code = f"import subprocess, sys; subprocess.run([sys.executable, {script!r}], check=True)"
    done = run("--emulate", "-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    assert "2 calls redirected" in done.stderr
