"""The emulated device for every test of this folder; skipped only where torch_npu is missing."""

from __future__ import annotations

import os
from importlib import util

import pytest

# Before torch is imported by any test module: with torch_npu installed and no CANN, a bare
# `import torch` raises.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


@pytest.fixture(scope="session", autouse=True)
def npu():
    """Start the emulator once; every test of this folder is skipped where torch_npu is missing."""
    if util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed")
    from mindiesd import emulator

    emulator.start()
    import torch

    torch.set_num_threads(1)
    return torch.device("npu", 0)


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)
