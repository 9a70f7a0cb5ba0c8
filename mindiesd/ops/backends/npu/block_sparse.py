"""``npu_block_sparse_attention`` (BSA): Atlas A2 and A3.

Limits (op-plugin page): float16 and bfloat16; D 64 or 128, the same for values; layouts BNSD and
TND; a mask of int8 blocks, 1 where computed, of 128 keys; no causal flag. Narrower head dimensions
are filled with zeros, which add nothing to a score. What the kernel does not take goes through
:mod:`mindiesd.ops.sparse.gathered`, that is through the dense kernels of this backend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mindiesd.ops.backends.npu import inventory, soc
from mindiesd.ops.backends.npu.call import within_float32
from mindiesd.ops.sparse import gathered
from mindiesd.ops.sparse.selection import BLOCK, Selection

NAME = "npu_block_sparse_attention"
DTYPES = (torch.float16, torch.bfloat16)
_DIMS = (64, 128)


def refusal(
    query: Tensor, value: Tensor, selection: Selection, scale: float, series: str
) -> str | None:
    """Why the kernel is not for this call; None if it is.

    Args:
        query: any layout whose last dimension is the head dimension.
        value: likewise.
        selection: which blocks.
        scale: factor on the scores.
        series: of the device, as in :mod:`.soc`.
    """
    if series not in (soc.A2, soc.A3):
        return "the kernel is not on this series"
    if not inventory.has(NAME):
        return "the installed torch_npu does not have the kernel"
    if query.dtype not in DTYPES:
        return "dtype is not float16 or bfloat16"
    if not 1 <= max(query.shape[-1], value.shape[-1]) <= _DIMS[-1]:
        return "head dimension is larger than 128"
    if selection.causal:
        return "causal"
    return None if within_float32(scale) else "scale is no float32 number"


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Selection,
    scale: float,
    head_first: bool,
    inner_precise: int,
) -> Tensor:
    """Attention over the selected blocks.

    Args:
        query: [B, N, Sq, D], or [B, Sq, N, D] unless ``head_first``.
        key: [B, Nkv, Skv, D] likewise.
        value: [B, Nkv, Skv, Dv] likewise.
        selection: which blocks.
        scale: factor on the scores.
        head_first: whether heads come before the sequence.
        inner_precise: 0, or 1 for float16 sums, which the kernel has for float16 only.

    Returns:
        Attention in the query's layout and dtype.
    """
    if refusal(query, value, selection, scale, soc.series()) is not None:
        return gathered.attention(query, key, value, selection, scale, head_first)
    if not head_first:
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    value_dim = value.shape[-1]
    widest = max(query.shape[-1], value_dim)
    dim = next(size for size in _DIMS if widest <= size)
    out: Tensor = torch.ops.npu.npu_block_sparse_attention(
        _ready(query, selection.order_q, dim),
        _ready(key, selection.order_k, dim),
        _ready(value, selection.order_k, dim),
        selection.keep.to(torch.int8),
        [BLOCK, BLOCK],
        q_input_layout="BNSD",
        kv_input_layout="BNSD",
        num_key_value_heads=key.shape[1],
        scale_value=scale,
        inner_precise=inner_precise if query.dtype is torch.float16 else 0,
    )[0]
    out = out[..., :value_dim]
    if selection.order_q is not None:
        back = torch.empty_like(selection.order_q)
        back[selection.order_q] = torch.arange(back.shape[0], device=back.device)
        out = out.index_select(2, back)
    return out if head_first else out.transpose(1, 2)


def _ready(tensor: Tensor, order: Tensor | None, dim: int) -> Tensor:
    """[B, N, S, D] in blocked order, contiguous, with zeros up to ``dim``."""
    if order is not None:
        tensor = tensor.index_select(2, order)
    if tensor.shape[-1] != dim:
        tensor = F.pad(tensor, (0, dim - tensor.shape[-1]))
    return tensor.contiguous()
