"""``npu_prompt_flash_attention``: Atlas A2, A3, and the only attention kernel of the 310P.

Limits: float16 and bfloat16 (310P: float16); contiguous; one D for query, key and value, at most
512; 1 to 256 heads, at most 64 to a kv head (310P: one); B at most 65536, 128 unless D is a
multiple of 16 or on the 310P; N * D below 65535 in BSND and BSH; masks shared by the heads, with a
key in each row; no bias here. The 950 refuses the kernel.

op-plugin runs it in high performance, which accumulates float16 in float16, unless 10 is added to
``sparse_mode``. bfloat16 does not read that switch, and the 310P has only mode 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindiesd.ops.backends.npu import forms, soc
from mindiesd.ops.backends.npu.call import HEADS, Call, within_float32
from mindiesd.ops.backends.npu.fusion import into, out_of
from mindiesd.ops.masks import AttentionMask

NAME = "npu_prompt_flash_attention"
LAYOUTS = ("BNSD", "BSND", "BSH")
HIGH_PRECISION = 10


def refusal(call: Call) -> str | None:
    """Why the kernel is not for this call; None if it is."""
    if call.series not in (soc.A2, soc.A3, soc.I310P):
        return "the kernel is not on this series"
    small = call.series == soc.I310P
    if call.dtype is not torch.float16 and (small or call.dtype is not torch.bfloat16):
        return "dtype is not float16" if small else "dtype is not float16 or bfloat16"
    dim = max(call.dim, call.value_dim)
    if not 1 <= dim <= 512 or call.dim < 1:
        return "head dimension is not 1 to 512"
    if call.heads > 256:
        return "more than 256 heads"
    if not small and call.heads > 64 * call.kv_heads:
        return "more than 64 heads to a kv head"
    if call.batch > (128 if small or dim % 16 else 65536):
        return "batch too large"
    if max(call.queries, call.keys) > (65535 if small else 1 << 20):
        return "sequence too long"
    if not within_float32(call.scale):
        return "scale is no float32 number"
    if call.bias:
        return "an additive mask"
    if call.keep == HEADS and call.heads > 1:
        return "a mask for each head"
    return None


def layout_of(call: Call, layout: str) -> str:
    """The layout to hand over: BSND and BSH only where N * D is small enough."""
    wide = call.heads * max(call.dim, call.value_dim) >= 65535
    return "BNSD" if wide and layout != "BNSD" else layout


def launch(
    call: Call, layout: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None
) -> Tensor:
    """The attention of query, key and value, in the order that the call says; so is the result."""
    small = call.series == soc.I310P
    options: dict[str, Any] = {"next_tokens": forms.INT_MAX, "sparse_mode": 0}
    empty: Tensor | None = None
    # One query row: that the modes have no effect there is documented of the sibling kernel.
    plain = not (call.keep or small or call.empties_rows() or call.queries == 1)
    mode = forms.sparse(call) if plain else None
    if mode is not None:
        options["atten_mask"] = forms.compressed(query.device, call.frozen)
        options.update(sparse_mode=mode.mode, pre_tokens=mode.pre, next_tokens=mode.next)
    elif call.masked:
        options["atten_mask"], empty = forms.opened(mask, call, query.device)
    if call.dtype is torch.float16 and not small:
        options["sparse_mode"] += HIGH_PRECISION
    kv_heads = call.kv_heads
    if small and kv_heads != call.heads:
        axis = 1 if call.head_first else 2
        key, value = (t.repeat_interleave(call.heads // kv_heads, axis) for t in (key, value))
        kv_heads = call.heads
    dim = max(call.dim, call.value_dim)
    tensors = [into(tensor, call, layout, dim).contiguous() for tensor in (query, key, value)]
    out: Tensor = torch.ops.npu.npu_prompt_flash_attention(
        *tensors,
        num_heads=call.heads,
        # 0 says as many as heads, which is all that the 310P knows.
        num_key_value_heads=0 if kv_heads == call.heads else kv_heads,
        scale_value=call.scale,
        input_layout=layout,
        **options,
    )
    out = out_of(out, call, layout)
    if dim != call.value_dim:
        out = out[..., : call.value_dim]
    if empty is None:
        return out
    return out.masked_fill(empty if call.head_first else empty.transpose(1, 2), 0.0)
