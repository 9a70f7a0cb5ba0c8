"""Random numbers on the emulated device.

The device's generator is torch_npu's own: a seed and an offset, as in CUDA's Philox. Every kernel
that draws seeds a CPU generator from the two and moves the offset on, so that ``manual_seed``,
``get_rng_state``, ``fork_rng`` and generators given by the user act as on the device. The numbers
themselves are the emulator's own, not the Ascend's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# One draw moves the offset by this much; torch_npu wants multiples of four.
_STEP = 4
_MIX = 0x9E3779B97F4A7C15
_lock = threading.Lock()


def _default_generator() -> torch.Generator:
    import torch_npu

    torch_npu.npu._lazy_init()
    found: torch.Generator = torch_npu.npu.default_generators[0]
    return found


def cpu_generator(generator: torch.Generator | None) -> torch.Generator:
    """A CPU generator for one draw from the device's ``generator`` (None: its default one)."""
    if generator is None:
        generator = _default_generator()
    elif generator.device.type != "npu":
        raise RuntimeError(
            f"Expected a 'npu' device type for generator but found '{generator.device.type}'"
        )
    with _lock:
        state = generator.get_state()
        seed, offset = state.view(torch.int64).tolist()
        state.view(torch.int64)[1] = offset + _STEP
        generator.set_state(state)
    drawn = torch.Generator(device="cpu")
    drawn.manual_seed((seed + offset * _MIX) % 2**63)
    return drawn


@contextmanager
def cpu_default_generator() -> Iterator[None]:
    """Let a CPU kernel that takes no generator draw from the device's default one."""
    drawn = cpu_generator(None)
    with _lock:
        kept = torch.default_generator.get_state()
        torch.default_generator.set_state(drawn.get_state())
        try:
            yield
        finally:
            torch.default_generator.set_state(kept)
