"""``mindiesd-run --status``: what is installed, whether it loads, what each patch would do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mindiesd
from mindiesd.cli.listing import print_rows
from mindiesd.patches.engine import nothing_to_mend, to_be_provided, unavailable
from mindiesd.patches.registry import records
from mindiesd.patches.report import versions

# Seconds for `import torch_npu` in a process of its own.
TIME_LIMIT = 90.0

# The current directory, which `python -c` puts first, is none of our business.
_TRY = (
    "import sys; sys.path[:] = [entry for entry in sys.path if entry]; "
    "import torch, torch_npu; print(torch.npu.device_count())"
)


def show_status() -> None:
    """Write the diagnosis to standard output."""
    found = versions()
    width = max(map(len, [*found, "mindiesd"]))
    print(f"{'mindiesd':<{width}}  {mindiesd.__version__}  {Path(mindiesd.__file__).parent}")
    for name, version in found.items():
        remark = f"  {sys.executable}" if name == "python" else ""
        print(f"{name:<{width}}  {version or 'not installed'}{remark}")
    print()
    print(f"NPU   {_npu(found['torch_npu'], found['torch'])}")
    print(f"CANN  {_cann()}")
    print()
    rows = []
    for record in records():
        reason = unavailable(record)
        outcome = f"would be skipped: {reason}" if reason else "would be applied"
        if not reason and to_be_provided(record):
            outcome = "would be provided to the script: the package is not installed"
        if nothing_to_mend(record):
            outcome = f"nothing to do: {reason}"
        if record.by_name_only:
            outcome += ", if named in only="
        rows.append((record.name, outcome, record.target))
    print_rows(("patch", "outcome", "target"), rows)


def _npu(torch_npu: str | None, torch: str | None) -> str:
    if torch_npu is None:
        return "torch_npu is not installed: scripts run on what torch finds, CPU or CUDA"
    if torch is None:
        return "torch_npu is installed but torch is not"
    # torch's own loading of torch_npu would hide the reason behind a general remark.
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TRY],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIME_LIMIT,
        )
    except subprocess.TimeoutExpired:
        return f"torch_npu {torch_npu} did not load within {TIME_LIMIT:.0f} s"
    if done.returncode == 0:
        count = (done.stdout.split() or ["an unknown number of"])[-1]
        return f"torch_npu {torch_npu} loads and sees {count} devices"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else f"it ended with code {done.returncode} and said nothing"
    return (
        f"torch_npu {torch_npu} is installed but cannot be loaded: {last}\n"
        "      until it can, `import torch` may need TORCH_DEVICE_BACKEND_AUTOLOAD=0"
    )


def _cann() -> str:
    for variable in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        path = os.environ.get(variable)
        if path:
            there = "" if os.path.isdir(path) else ", which does not exist"
            return f"{variable}={path}{there}"
    return "absent: ASCEND_HOME_PATH is not set (source CANN's set_env.sh to set it)"
