"""``mindiesd::la``, the vendor's laser attention: Atlas A2 and A3, from the vendor's library only.

Taken only where it is known to be right: float16 (the vendor casts bfloat16 to it, which
overflows), no mask of any kind (the vendor drops masks), D at most 128 (padded with zeros to 128),
as many kv heads as heads, and key lengths that are a multiple of 256, because how the kernel masks
keys that were added as padding is not documented.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindiesd.ops.backends.npu import soc, vendor
from mindiesd.ops.backends.npu.call import Call, within_float32
from mindiesd.ops.backends.npu.forms import INT_MAX
from mindiesd.ops.backends.npu.fusion import into
from mindiesd.ops.masks import AttentionMask

NAME = "mindiesd::la"
LAYOUTS = ("BNSD",)
# Below this length a manual call goes to fused_attn_score, as documented by the vendor; from the
# second on the vendor considers it by itself.
SHORTEST, AUTOMATIC = 2048, 4000


def refusal(call: Call) -> str | None:
    """Why the kernel is not for this call; None if it is."""
    if call.series not in (soc.A2, soc.A3):
        return "the kernel is not on this series"
    if call.frozen:
        return "traced or captured: the kernel has no fake"
    if call.dtype is not torch.float16:
        return "dtype is not float16"
    if call.masked:
        return "any mask: the kernel drops it"
    if not 1 <= call.dim <= 128 or call.value_dim > 128:
        return "head dimension is not 1 to 128"
    if call.heads != call.kv_heads or call.heads > 256:
        return "grouped heads or more than 256"
    if call.keys % 256:
        return "key length is not a multiple of 256"
    if not within_float32(call.scale):
        return "scale is no float32 number"
    if vendor.operator("la") is None:
        return f"no library with the kernel ({vendor.VARIABLE})"
    return None


def launch(
    call: Call, layout: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None
) -> Tensor:
    """The attention of query, key and value, in the order that the call says; so is the result."""
    tensors = [into(tensor, call, layout, 128).contiguous() for tensor in (query, key, value)]
    tensors[0] = F.pad(tensors[0], (0, 0, 0, -call.queries % 256))
    results = vendor.operator("la")(  # type: ignore[misc]
        *tensors,
        scale_value=call.scale,
        head_num=call.heads,
        input_layout=layout,
        pre_tokens=INT_MAX,
        next_tokens=1,
        is_highPrecision=True,
    )
    # Attention and statistics; which comes first is not documented, the shapes tell.
    for out in results:
        if out.shape == tensors[0].shape:
            cut: Tensor = out[:, :, : call.queries, : call.value_dim].to(call.dtype)
            return cut if call.head_first else cut.transpose(1, 2)
    raise RuntimeError(f"{NAME} returned shapes {[tuple(out.shape) for out in results]}")
