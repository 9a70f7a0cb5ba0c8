"""Running code in a fresh interpreter: import order can only be tested there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, *, check: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """Run ``code`` in a fresh interpreter that can import ``tests``; its asserts are the test."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MINDIESD_")}
    env["PYTHONPATH"] = str(ROOT)
    env["OMP_NUM_THREADS"] = "1"
    env.update(variables)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check:
        assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
