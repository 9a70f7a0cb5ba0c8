"""transformers' attention functions, where they are wrong on an Ascend NPU.

``sdpa_attention_forward`` reads every mask that is not bool as "zero attends" there, which loses
the values of a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches.registry import Patch
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

MODULE = "transformers.integrations.sdpa_attention"

RECORDS = (
    Patch(
        name="transformers_sdpa",
        family="attention_backend",
        module=MODULE,
        attribute="sdpa_attention_forward",
        after="transformers.modeling_utils",
        becomes="mindiesd.attention_forward",
        build="mindiesd.patches.attention_backend.encoders:build_sdpa",
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
