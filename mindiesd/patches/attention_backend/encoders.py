"""transformers' attention functions, where they are wrong on an Ascend NPU.

``sdpa_attention_forward`` reads every mask that is not bool as "zero attends" there, which loses
the values of a bias. The flash-attention functions that stand in for the package take any keyword
and ignore ``window_size``, so sliding windows are not applied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.errors import ParametersInvalid
from mindiesd.patches.attention_backend.record import record
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

MODULE = "transformers.integrations.sdpa_attention"
FLASH = "transformers.modeling_flash_attention_utils"

_BUILD = "mindiesd.patches.attention_backend.encoders"

RECORDS = (
    record(
        "transformers_sdpa",
        (MODULE, "sdpa_attention_forward"),
        f"{_BUILD}:build_sdpa",
        after="transformers.modeling_utils",
        why=(
            "with torch_npu installed the original turns additive masks into bool ones, so that "
            "a bias is lost, and on the CPU too"
        ),
        when="torch_npu is installed and the mask is not bool; every other call is passed through",
        numerics="those of the original without torch_npu",
        requires={"transformers": ">=5.20,<6"},
        parameters=(
            "module",
            "query",
            "key",
            "value",
            "attention_mask",
            "dropout",
            "scaling",
            "is_causal",
            "position_bias",
            "cache",
            "kwargs",
        ),
        tables=("transformers.modeling_utils:AttentionInterface._global_mapping",),
    ),
    record(
        "transformers_flash",
        (FLASH, "lazy_import_flash_attention"),
        f"{_BUILD}:build_flash",
        becomes="mindiesd.attention_forward_varlen",
        why=(
            'with attn_implementation="flash_attention_2" on an NPU the original ignores sliding '
            "windows and refuses softcaps"
        ),
        when=(
            "the functions for NPUs are the ones in use, and the call has a window or a softcap; "
            "with gradients or dropout such a call raises, any other goes to the original function"
        ),
        numerics="those of flash-attention, with float32 inside",
        requires={"transformers": ">=5.20,<6"},
        parameters=("implementation", "attention_wrapper", "allow_all_kernels"),
    ),
)


def build_sdpa(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``sdpa_attention_forward``."""
    from importlib import import_module

    import torch

    home = import_module(MODULE)

    def sdpa_attention_forward(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        if (
            attention_mask is not None
            and home._is_torch_npu_available
            and attention_mask.dtype is not torch.bool
            and (site.everywhere or site.in_force())
            and site.takes(None)
        ):
            # The original keeps the values of a position bias, and adds nothing to one that comes
            # without a mask and is not causal.
            if position_bias is not None:
                attention_mask = position_bias + attention_mask
            position_bias, attention_mask, is_causal = attention_mask, None, False
        return original(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout,
            scaling,
            is_causal,
            position_bias,
            cache,
            **kwargs,
        )

    return sdpa_attention_forward


def build_flash(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``lazy_import_flash_attention``.

    The original keeps what it found in its module, for every model and beyond our being there; what
    is returned here is exchanged on the way out instead.
    """
    from importlib import import_module

    ours: list[Any] = []

    def exchanged(functions: Any, processing: Any) -> Any:
        """The same results, with functions that know windows and softcaps."""
        if not ours:
            dense, varlen = _flash_functions(site, *functions[:2])
            # It reads from the signature which keywords may be passed.
            process = import_module(FLASH)._lazy_define_process_function(varlen)
            ours.extend((dense, varlen, process))
        return (ours[0], ours[1], *functions[2:]), (ours[2], *processing[1:])

    def lazy_import_flash_attention(
        implementation: str | None,
        attention_wrapper: Callable[..., Any] | None = None,
        allow_all_kernels: bool = False,
    ) -> Any:
        found = original(implementation, attention_wrapper, allow_all_kernels)
        if (site.everywhere or site.in_force()) and _is_for_npus(found[0][0]):
            return exchanged(*found)
        return found

    return lazy_import_flash_attention


def _is_for_npus(function: Any) -> bool:
    return getattr(function, "__module__", "") == "transformers.integrations.npu_flash_attention"


def _flash_functions(site: Site, npu_flash: Any, npu_flash_varlen: Any) -> tuple[Any, Any]:
    """flash-attention's two functions; a call with neither window nor softcap goes to the given."""
    import torch

    from mindiesd.ops import attention, varlen
    from mindiesd.ops.backends import backend_of
    from mindiesd.ops.masks import BOTTOM_RIGHT_CAUSAL, Band, attention_mask

    def forward_only(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, causal: bool, reason: str | None
    ) -> None:
        if dropout_p:
            raise ParametersInvalid("dropout_p", dropout_p, "0.0 with a window or a softcap")
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise ParametersInvalid(
                "q, k or v", "one that requires grad", "no gradients with a window or a softcap"
            )
        if causal and _aligned_top_left():
            raise ParametersInvalid(
                "NPU_FA2_SPARSE_MODE", 2, "3 (the default) with a window or a softcap"
            )
        if reason is not None:
            raise ParametersInvalid("q, k or v", reason, "what mindiesd.attention_forward takes")
        site.takes(None)

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Any:
        if tuple(window_size) == (-1, -1) and not softcap:
            return npu_flash(q, k, v, dropout_p, softmax_scale, causal)
        reason = attention.refusal(q, k, v, None, False, True, False)
        forward_only(q, k, v, dropout_p, causal, reason)
        left, right = window_size
        if causal:
            right = BOTTOM_RIGHT_CAUSAL[1]
        band = Band.window(left, right, q.shape[1], k.shape[1])
        if softcap:
            mask = attention_mask(None, False, band)
            return backend_of(q).attention_composed(q, k, v, mask, softmax_scale, False, softcap)
        return attention.attend(q, k, v, None, softmax_scale, False, band, False)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: Any = None,
        max_seqlen_k: Any = None,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Any:
        if tuple(window_size) == (-1, -1) and not softcap:
            return npu_flash_varlen(
                q,
                k,
                v,
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_k,
                dropout_p,
                softmax_scale,
                causal,
            )
        forward_only(q, k, v, dropout_p, causal, None)
        return varlen.attention_forward_varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
        )

    return flash_attn_func, flash_attn_varlen_func


def _aligned_top_left() -> bool:
    from transformers.integrations.npu_flash_attention import SPARSE_MODE

    return bool(SPARSE_MODE == 2)
