"""Where the arithmetic is done: one module per family of devices, all with the same functions.

:class:`Backend` is the contract. A backend trusts its arguments: the public functions of
:mod:`mindiesd.ops` have checked them, and the patch engine asks
:func:`mindiesd.ops.attention.refusal` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from mindiesd.ops.backends import native
from mindiesd.ops.dispatch import Kernel
from mindiesd.ops.masks import AttentionMask

# Device type -> the module that computes on it. Any other device is served by ATen.
MODULES: dict[str, str] = {"npu": "mindiesd.ops.backends.npu"}

_loaded: dict[str, Backend] = {}


class Backend(Protocol):
    """The functions every backend module has.

    One may also have ``attention_varlen`` (packed sequences in one kernel, or None to go one by
    one), ``host_list`` (the numbers in a tensor, which it may remember) and ``group_norm_silu``
    with ``group_norm_silu_refusal``.
    """

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask | None,
        scale: float | None,
        head_first: bool,
        kernel: Kernel | None,
    ) -> Tensor:
        """The best kernel; result in the layout of the query."""

    def attention_composed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: AttentionMask | None,
        scale: float | None,
        head_first: bool,
        softcap: float,
    ) -> Tensor:
        """Matmul, softmax, matmul, in float32 or better."""

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float, as_is: bool = False) -> Tensor:
        """RMS norm over the last dimension, rounded once."""

    def centred_rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The same with ``1 + weight``, which is float32 or better."""

    def layer_norm(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Layer norm over the trailing dimensions, rounded once."""

    def layer_norm_scale_shift(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        scale: Tensor,
        shift: Tensor,
        fast: bool = False,
    ) -> Tensor:
        """Layer norm, then ``* (1 + scale) + shift``, rounded once, or, if ``fast``, more often."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """Rotary position embedding, rounded once."""

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """GELU: ``"none"``, ``"tanh"`` or ``"fast"``."""

    def geglu(self, x: Tensor, approximate: str) -> Tensor:
        """First half of the last dimension * GELU of the second: ``"none"`` or ``"tanh"``."""

    def swiglu(self, x: Tensor) -> Tensor:
        """SiLU of the first half of the last dimension * the second."""


def backend_for(device_type: str) -> Backend:
    """The backend of a device type, e.g. ``"cpu"``; imported when first asked for."""
    backend = _loaded.get(device_type)
    if backend is None:
        name = MODULES.get(device_type)
        if device_type == "npu" and torch.compiler.is_compiling():
            # Tracers follow the statement, not the function.
            from mindiesd.ops.backends import npu

            return cast(Backend, npu)
        backend = cast(Backend, native if name is None else import_module(name))
        _loaded[device_type] = backend
    return backend


def backend_of(tensor: Tensor) -> Backend:
    """The backend of the device a tensor is on."""
    # The flag is several times cheaper to read than `device.type`. `is_cuda` would not do for CUDA:
    # torch_npu's transfer_to_npu makes it say yes of tensors on an NPU.
    if tensor.is_cpu:
        return _native
    return backend_for(tensor.device.type)


_native: Backend = native
