"""Parts of torch_npu beside its operators that the emulator does not have: they say so.

Without this they would fail inside the stand-in runtime, for want of a C function of CANN whose
name tells a user nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch


def _refuse(what: str) -> Callable[..., NoReturn]:
    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"not emulated: {what}")

    return refused


def install() -> None:
    """Put the refusals in place; once per process."""
    import torch_npu

    graphs: Any = torch_npu.npu.NPUGraph
    graphs.capture_begin = _refuse("NPU graphs (NPUGraph.capture_begin)")
    if torch.distributed.is_available():
        # How torch_npu registers its backends (its _init/registry/distributed.py).
        register: Any = torch.distributed.Backend.register_backend
        for name in ("hccl", "lccl"):
            register(
                name,
                _refuse(f"{name.upper()}, communication between NPUs (there is one)"),
                extended_api=True,
                devices=["npu"],
            )
