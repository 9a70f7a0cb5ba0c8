"""The emulated device for every test of this folder; skipped only where torch_npu is missing."""

from __future__ import annotations

import os
from importlib import util

import pytest
from hypothesis import HealthCheck, settings

# Before torch is imported by any test module: with torch_npu installed and no CANN, a bare
# `import torch` raises.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

settings.register_profile(
    "npu", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)

if util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def _device():
    """Start the emulator once."""
    if util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is not installed")
    from mindiesd import emulator

    emulator.start()
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh(_device):
    """Nothing seeded, cached or decided by another test."""
    import torch

    from mindiesd.ops.backends.npu import dense, derived

    settings.load_profile("npu")
    torch.manual_seed(0)
    derived.TABLE.clear()
    derived._constants.clear()
    dense._plans.clear()
    dense._fastest.clear()
