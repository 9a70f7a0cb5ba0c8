"""``npu_fused_infer_attention_score``: Atlas A2 and A3, inference only.

Limits: float16 and bfloat16; contiguous; one D for query, key and value, at most 512 and a multiple
of 16; 1 to 256 heads, at most 64 to a kv head; masks and biases shared by the heads or biases per
head, after the scale. ``inner_precise`` 0 is high precision, 2 the same with rows without a key
giving 0. With one query row the modes have no effect, and a mask was seen ignored beyond 512
columns in the field, so neither is used there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mindiesd.ops.backends.npu import forms, soc
from mindiesd.ops.backends.npu.call import HEADS, Call, within_float32
from mindiesd.ops.backends.npu.fusion import into, out_of
from mindiesd.ops.masks import AttentionMask

NAME = "npu_fused_infer_attention_score"
LAYOUTS = ("BNSD", "BSND", "BSH")
HALF = (torch.float16, torch.bfloat16)
MOST_LENGTH, MOST_BATCH = 1 << 20, 65536


def refusal(call: Call) -> str | None:
    """Why the kernel is not for this call; None if it is."""
    if call.series not in (soc.A2, soc.A3):
        return "the kernel is not on this series"
    if call.dtype not in HALF:
        return "dtype is not float16 or bfloat16"
    if not 1 <= max(call.dim, call.value_dim) <= 512 or call.dim < 1:
        return "head dimension is not 1 to 512"
    if call.heads > 256:
        return "more than 256 heads"
    if call.heads > 64 * call.kv_heads:
        return "more than 64 heads to a kv head"
    if max(call.queries, call.keys) > MOST_LENGTH or call.batch > MOST_BATCH:
        return "sequence or batch too long"
    if not within_float32(call.scale):
        return "scale is no float32 number"
    if call.masked and call.queries == 1:
        return "a mask with one query row"
    if HEADS in (call.keep, call.bias) and call.heads > 1:
        return "a mask for each head"
    if call.bias and call.bias_dtype is not call.dtype:
        return "a bias of another dtype"
    return None


def launch(
    call: Call, layout: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None
) -> Tensor:
    """The attention of query, key and value, in the order that the call says; so is the result."""
    options: dict[str, Any] = {}
    precise = 0
    mode = None if call.keep or call.bias else forms.sparse(call)
    if mode is not None:
        options["atten_mask"] = forms.compressed(query.device, call.frozen)
        options.update(sparse_mode=mode.mode, pre_tokens=mode.pre, next_tokens=mode.next)
        precise = 2 if call.empties_rows() else 0
    elif call.bias:
        assert mask is not None
        both = forms.biased(mask, call, call.dtype, one_row=False)
        options["pse_shift"], options["atten_mask"] = both
        precise = 2
    elif call.masked:
        options["atten_mask"] = forms.full(mask, call, query.device)
        precise = 2
    dim = max(call.dim, call.value_dim)
    dim += -dim % 16
    tensors = [into(tensor, call, layout, dim).contiguous() for tensor in (query, key, value)]
    out: Tensor = torch.ops.npu.npu_fused_infer_attention_score(
        *tensors,
        num_heads=call.heads,
        # 0 says as many as heads.
        num_key_value_heads=0 if call.kv_heads == call.heads else call.kv_heads,
        scale=call.scale,
        input_layout=layout,
        inner_precise=precise,
        **options,
    )[0]
    out = out_of(out, call, layout)
    return out if dim == call.value_dim else out[..., : call.value_dim]
