"""Times kernels on the device, with its own events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP, RUNS = 2, 5

_ticks: dict[torch.device, bool] = {}


def ticks(device: torch.device) -> bool:
    """Whether the device's events measure anything: those of an emulated one do not."""
    known = _ticks.get(device)
    if known is None:
        elapsed = _between(device, lambda: None)
        known = _ticks[device] = elapsed == elapsed  # not NaN
    return known


def milliseconds(device: torch.device, run: Callable[[], Any]) -> float:
    """What one ``run()`` takes on the device, on average."""
    for _ in range(WARM_UP):
        run()

    def several() -> None:
        for _ in range(RUNS):
            run()

    return _between(device, several) / RUNS


def _between(device: torch.device, work: Callable[[], Any]) -> float:
    npu: Any = torch.npu  # type: ignore[attr-defined]
    with npu.device(device):
        start, end = npu.Event(enable_timing=True), npu.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))
