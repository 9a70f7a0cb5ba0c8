"""The documented layer functions under the name that other libraries import them by.

The layers API documents ``from mindiesd import …``; cache-dit, for one, writes
``from mindiesd.layers import attention_forward``. Both are the same objects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mindiesd

if TYPE_CHECKING:
    from mindiesd import (
        RMSNorm,
        attention_forward,
        attention_forward_varlen,
        fast_layernorm,
        get_activation_layer,
        layernorm_scale_shift,
        rotary_position_embedding,
        sparse_attention,
    )

__all__ = [
    "RMSNorm",
    "attention_forward",
    "attention_forward_varlen",
    "fast_layernorm",
    "get_activation_layer",
    "layernorm_scale_shift",
    "rotary_position_embedding",
    "sparse_attention",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    value = getattr(mindiesd, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
