"""Where torch_npu differs from torch: what it computes otherwise, and what it answers otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator import record
from mindiesd.emulator.alias import cpu_alias, npu_copy
from mindiesd.emulator.call import below


def gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    """``aten::gelu``: the tanh form, whatever ``approximate`` says.

    torch_npu calls aclnnGelu, which computes it, unless TORCH_NPU_USE_COMPATIBLE_IMPL asks for
    aclnnGeluV2 (op-plugin, GeluKernelNpuOpApi).
    """
    with below():
        computed = torch.ops.aten.gelu.default(
            cpu_alias(self), approximate=approximate if _compatible_impl() else "tanh"
        )
        result = npu_copy(computed, keep_strides=True)
    if record.active:
        record.launch("aten::gelu", ((self,), {}), result)
    return result


def gelu_backward(grad_output: Tensor, self: Tensor, *, approximate: str = "none") -> Tensor:
    """``aten::gelu_backward``: of the tanh form, as :func:`gelu`."""
    with below():
        computed = torch.ops.aten.gelu_backward.default(
            cpu_alias(grad_output),
            cpu_alias(self),
            approximate=approximate if _compatible_impl() else "tanh",
        )
        result = npu_copy(computed)
    if record.active:
        record.launch("aten::gelu_backward", ((grad_output, self), {}), result)
    return result


def _compatible_impl() -> bool:
    import torch_npu

    enabled = getattr(torch_npu.npu, "are_compatible_impl_enabled", None)
    return enabled is not None and bool(enabled())


def ior_scalar(self: Tensor, other: Any) -> Tensor:
    """``aten::__ior__.Scalar``: or in place."""
    return self.bitwise_or_(other)


def ior_tensor(self: Tensor, other: Tensor) -> Tensor:
    """``aten::__ior__.Tensor``: or in place."""
    return self.bitwise_or_(other)


def slogdet(self: Tensor) -> tuple[Tensor, Tensor]:
    """``aten::slogdet``: the old name of ``linalg_slogdet``."""
    sign, value = torch.linalg.slogdet(self)
    return sign, value


def fill_diagonal_(self: Tensor, fill_value: Any, wrap: bool = False) -> Tensor:
    """``aten::fill_diagonal_``, for tensors without gradients."""
    if self.requires_grad:
        raise NotImplementedError("not emulated: aten::fill_diagonal_ with gradients")
    with below():
        torch.ops.aten.fill_diagonal_.default(cpu_alias(self), fill_value, wrap)
    if record.active:
        record.launch("aten::fill_diagonal_", ((self,), {}), self)
    return self


# Composite operators that torch_npu answers above autograd, with kernels that no dispatch reaches.
ABOVE_AUTOGRAD: dict[str, Callable[..., Any]] = {
    "__ior__.Scalar": ior_scalar,
    "__ior__.Tensor": ior_tensor,
    "fill_diagonal_": fill_diagonal_,
    "slogdet": slogdet,
}

TABLE: dict[str, Callable[..., Any]] = {
    "gelu": gelu,
    "gelu_backward": gelu_backward,
}
