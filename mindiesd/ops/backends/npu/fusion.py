"""``npu_fusion_attention`` v1, v2 and v3: Atlas A2 and A3; v1 also the 950.

Which of the three: a bias goes to v2, whose ``pse_type=0`` adds it after the scale, as PyTorch
does. A call that is traced or captured goes to v3, the one whose documentation allows that. v1 and
v3 would compute ``scale * (QKᵀ + bias)``: there the query is scaled beforehand, in float32, so that
nothing is divided. Older releases of torch_npu have no v2, for which v1 does, or no v3, for which
nothing does.

Limits (the narrower where the op-plugin and CANN pages differ): float16, bfloat16, float32; D of
query and key at most 512 and that of value no larger; 1 to 256 heads, a multiple of the kv heads;
lengths 1 to 1M; B at most 2M. Rows without a key give 0 with ``inner_precise=2``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mindiesd.ops.backends.npu import forms, inventory, soc
from mindiesd.ops.backends.npu.call import SHARED, Call, within_float32
from mindiesd.ops.masks import AttentionMask

NAME = "npu_fusion_attention"
BIASED, GRAPHS = "npu_fusion_attention_v2", "npu_fusion_attention_v3"
LAYOUTS = ("BNSD", "BSND", "BSH")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_HEADS, MOST_DIM, MOST_LENGTH, MOST_BATCH = 256, 512, 1 << 20, 2 << 20


def refusal(call: Call) -> str | None:
    """Why the kernel is not for this call; None if it is."""
    if call.series not in (soc.A2, soc.A3, soc.A950):
        return "the kernel is not on this series"
    if call.dtype not in DTYPES:
        return "dtype is not float16, bfloat16 or float32"
    if not 1 <= max(call.dim, call.value_dim) <= MOST_DIM or call.dim < 1:
        return "head dimension is not 1 to 512"
    if call.heads > MOST_HEADS:
        return "more than 256 heads"
    if max(call.queries, call.keys) > MOST_LENGTH or call.batch > MOST_BATCH:
        return "sequence longer than 1M or batch larger than 2M"
    if not within_float32(call.scale):
        return "scale is no float32 number"
    if call.bias and call.bias_dtype not in DTYPES:
        return "dtype of the bias"
    if operator(call) == GRAPHS and not inventory.has(GRAPHS):
        return "the installed torch_npu has no version of the kernel for graphs"
    return None


def operator(call: Call) -> str:
    """The version that the call goes to."""
    if call.frozen and call.series != soc.A950:
        return GRAPHS
    if call.bias and call.series != soc.A950 and inventory.has(BIASED):
        return BIASED
    return NAME


def widened(call: Call) -> bool:
    """Whether query, key and value are computed in float32 because half would lose of the bias."""
    if not call.bias or call.dtype is torch.float32:
        return False
    return call.bias_dtype is not call.dtype or operator(call) != BIASED


def _folds(call: Call) -> bool:
    """Whether one bias for all heads is larger, repeated for each, than the three tensors copied.

    The kernel repeats nothing over heads, but it does over batches.
    """
    return (
        call.bias == SHARED
        and call.bias_rows
        and call.keep in ("", SHARED)
        and call.heads == call.kv_heads > 1
        and call.batch * call.heads <= MOST_BATCH
        and call.queries * call.keys
        > 4 * (call.queries * call.dim + call.keys * (call.dim + call.value_dim))
    )


def launch(
    call: Call, layout: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None
) -> Tensor:
    """The attention of query, key and value, in the order that the call says; so is the result."""
    if not _folds(call):
        return _launch(call, layout, query, key, value, mask)
    pairs = call.batch * call.heads
    query, key, value = (
        into(tensor, call, "BNSD", tensor.shape[-1]).flatten(0, 1)[:, None]
        for tensor in (query, key, value)
    )
    folded = call._replace(batch=pairs, heads=1, kv_heads=1, head_first=True, layout="BNSD")
    out = _launch(folded, "BNSD", query, key, value, mask)
    out = out.reshape(call.batch, call.heads, call.queries, call.value_dim)
    return out_of(out, call, "BNSD")


def _launch(
    call: Call, layout: str, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None
) -> Tensor:
    """:func:`launch` as it stands."""
    name = operator(call)
    if name == GRAPHS:
        # Documented for BNSD where graphs are captured.
        layout = "BNSD"
    device, scale = query.device, call.scale
    options: dict[str, Any] = {}
    if widened(call):
        query, key, value = query.float(), key.float(), value.float()
    dtype = query.dtype
    if call.bias:
        assert mask is not None
        if name == BIASED:
            options["pse_type"] = 0
        else:
            query, scale = query * scale, 1.0
        options["pse"], options["atten_mask"] = forms.biased(mask, call, dtype, one_row=True)

    precise = 2 if call.bias else 0
    mode = None if call.keep or call.bias else forms.sparse(call)
    if mode is not None:
        options["atten_mask"] = forms.compressed(device, call.frozen)
        options["sparse_mode"] = mode.mode
        names = ("pre_tokens", "next_tokens")
        if name != BIASED:
            names = ("pre_tockens", "next_tockens")
        options.update(zip(names, (mode.pre, mode.next), strict=True))
        precise = 2 if call.empties_rows() else 0
    elif call.masked and not call.bias:
        options["atten_mask"] = forms.full(mask, call, device)
        precise = 2

    dim = value_dim = call.value_dim
    if dtype is torch.float32:
        # torch_npu itself keeps float32 away from the kernel unless D is a multiple of 4.
        dim = max(call.dim, call.value_dim)
        dim += -dim % 4
        value_dim += -value_dim % 4
    dim = max(call.dim, dim)
    arguments = [
        into(query, call, layout, dim),
        into(key, call, layout, dim),
        into(value, call, layout, value_dim),
    ]
    if call.bias:
        # Without the kernel there would be no copies of strided tensors: they are made in sight.
        arguments = [tensor.contiguous() for tensor in arguments]
    out: Tensor = getattr(torch.ops.npu, name)(
        *arguments, call.heads, layout, scale=scale, inner_precise=precise, **options
    )[0]
    out = out_of(out, call, layout)
    if value_dim != call.value_dim:
        out = out[..., : call.value_dim]
    return out if out.dtype is call.dtype else out.to(call.dtype)


def into(tensor: Tensor, call: Call, layout: str, dim: int) -> Tensor:
    """A tensor of the call in a layout of the kernels, with zeros up to ``dim``; a view if it can.

    Zeros add nothing to a score, and what they add to the output is cut off again.
    """
    if call.head_first != (layout == "BNSD"):
        tensor = tensor.transpose(1, 2)
    extra = dim - tensor.shape[-1]
    if extra:
        tensor = F.pad(tensor, (0, extra))
    return tensor.flatten(2) if layout == "BSH" else tensor


def out_of(tensor: Tensor, call: Call, layout: str) -> Tensor:
    """The opposite of :func:`into`, always a view."""
    if layout == "BSH":
        tensor = tensor.view(*tensor.shape[:2], call.heads, tensor.shape[2] // call.heads)
    return tensor if call.head_first == (layout == "BNSD") else tensor.transpose(1, 2)
