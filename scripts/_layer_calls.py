"""Cases for bench_overhead.py: the layer functions called directly, their kernels no-ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Case = tuple[str, Callable[[], object], Callable[[], object], float]

KERNELS = (
    "attention",
    "attention_composed",
    "rms_norm",
    "layer_norm",
    "layer_norm_scale_shift",
    "rotate",
)


def cases(nothing: Callable[..., Any]) -> list[Case]:
    """What, our call, what it comes to without us, and the goal in microseconds.

    The bare side reads the same attributes of a module and makes the same views: the kernel needs
    them whoever calls it.

    Args:
        nothing: takes anything and does nothing; it stands in for the kernels of the CPU.
    """
    import torch

    import mindiesd

    attention = mindiesd.attention_forward
    rope, fast, shift = (
        mindiesd.rotary_position_embedding,
        mindiesd.fast_layernorm,
        mindiesd.layernorm_scale_shift,
    )
    q = torch.randn(1, 4, 2, 8)
    mask = torch.zeros(1, 1, 4, 4)
    table = torch.randn(4, 8)
    full = table[None, :, None]
    x = torch.randn(1, 4, 8)
    flat = torch.randn(1, 8)
    spread = flat[:, None]
    layer = torch.nn.LayerNorm(8).requires_grad_(False)
    rms = mindiesd.RMSNorm(8).requires_grad_(False)
    forward = mindiesd.RMSNorm.forward
    bare = lambda: nothing(q, q, q)  # noqa: E731
    options: dict[str, dict[str, Any]] = {
        "": {},
        "fused=False": {"fused": False},
        "scale": {"scale": 0.5},
        "head_first": {"head_first": True},
        'opt_mode="runtime"': {"opt_mode": "runtime"},
        'opt_mode="static"': {"opt_mode": "static"},
        'opt_mode="manual"': {"opt_mode": "manual", "op_type": "prompt_flash_attn"},
        "is_causal": {"is_causal": True},
    }
    found: list[Case] = [
        (
            f"attention_forward({name})",
            lambda given=given: attention(q, q, q, **given),  # type: ignore[misc]
            bare,
            3,
        )
        for name, given in options.items()
    ]
    found += [
        (
            "attention_forward(additive mask)",
            lambda: attention(q, q, q, mask),
            lambda: nothing(q, q, q, mask),
            3,
        ),
        (
            "rotary_position_embedding, tables [1,S,1,D]",
            lambda: rope(q, full, full),
            lambda: nothing(q, full, full),
            2,
        ),
        (
            "rotary_position_embedding, tables [S,D]",
            lambda: rope(q, table, table),
            lambda: nothing(q, table.unsqueeze(1), table.unsqueeze(1)),
            2,
        ),
        (
            "RMSNorm.forward",
            lambda: forward(rms, x),
            lambda: nothing(x, rms.weight, rms.variance_epsilon),
            2,
        ),
        (
            "fast_layernorm",
            lambda: fast(layer, x),
            lambda: nothing(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps),
            2,
        ),
        (
            "layernorm_scale_shift, [B,1,H]",
            lambda: shift(layer, x, spread, spread),
            lambda: nothing(x, layer.weight, layer.bias, layer.eps, spread, spread),
            2,
        ),
        (
            "layernorm_scale_shift, [B,H]",
            lambda: shift(layer, x, flat, flat),
            lambda: nothing(
                x, layer.weight, layer.bias, layer.eps, flat.unsqueeze(1), flat.unsqueeze(1)
            ),
            2,
        ),
    ]
    return [(f"{what}, kernel a no-op", *rest) for what, *rest in found]  # type: ignore[misc]
