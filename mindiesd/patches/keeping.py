"""Where and when something made of tensors may be kept for later calls.

Not while a graph is traced or captured, where what is made belongs to the graph, and not inside of
function transforms and dispatch modes, whose tensors mean something to them alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from mindiesd.ops.backends.npu.call import frozen
from mindiesd.ops.backends.npu.derived import current_stream

# Asked at every call, so each asks as directly as it can be done.
tracing: Callable[[], bool] = torch.compiler.is_dynamo_compiling
modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
transforms: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack


def place(device: torch.device, there: Tensor | None = None) -> Hashable | None:
    """The device and the stream that makes what is kept there; None if nothing may be kept.

    Args:
        device: where it is.
        there: a tensor on that device, if there is one already.
    """
    if device.type == "cpu":
        return "cpu"
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return None
        return "cuda", device.index, torch._C._cuda_getCurrentRawStream(device.index or 0)
    if device.type == "npu":
        probe = torch.empty(0, device=device) if there is None else there
        return None if frozen(probe) else ("npu", probe.device.index, current_stream(probe))
    return None
