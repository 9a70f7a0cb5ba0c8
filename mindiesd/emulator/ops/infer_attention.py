"""``npu_fused_infer_attention_score`` and ``_v2`` (FIA): softmax(scale * q k^T + pse_shift) v.

Limits: op-plugin torch_npu-npu_fused_infer_attention_score(_v2).md.

- A2 and A3; float16 and bfloat16; contiguous inputs; D <= 512 and a multiple of 16; N <= 256,
  equal to the head number given; N / Nkv <= 64;
- layouts BSH BSND BNSD, BNSD_BSND (Sq > 1), BNSD_NBSD (1 < Sq <= 16), BSND_NBSD, BSH_NBSD, TND,
  TND_NTD, NTD_TND, left of "_" the input's and right of it the output's; TND: D is 64, 128 or 192
  and both lists of lengths are needed, cumulative;
- inner_precise 0 to 3: bit 1 makes rows that are all masked give 0 (otherwise the mean of v);
- atten_mask 1 = masked out, [B|1,Sq,Skv] or [B|1,1,Sq,Skv]; [Sq,Skv] when Sq > 1, [B,Skv] when
  Sq = 1; modes 2 to 4 take the 2048 x 2048 mask; the mode has no effect when Sq = 1;
- pse_shift [B|1,N,Sq,Skv]; other lengths are per batch;
- the second result is the log-sum-exp [B,N,Sq,1] (TND [T,N,1]) in float32, empty unless asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator.ops import soc
from mindiesd.emulator.ops.check import (
    HALF,
    INT_MAX,
    Table,
    not_emulated,
    refuse,
    require,
    require_absent,
    require_dtype,
)
from mindiesd.emulator.ops.layout import from_bnsd, to_bnsd
from mindiesd.emulator.ops.mask import masked_out
from mindiesd.emulator.ops.prompt_attention import (
    attend_lengths,
    check_shift,
    per_batch,
    require_contiguous,
)
from mindiesd.emulator.ops.softmax import Attended, attend

_OUTPUT = {
    "BSH": "BSH",
    "BSND": "BSND",
    "BNSD": "BNSD",
    "TND": "TND",
    "BNSD_BSND": "BSND",
    "BNSD_NBSD": "NBSD",
    "BSND_NBSD": "NBSD",
    "BSH_NBSD": "NBSD",
    "TND_NTD": "NTD",
    "NTD_TND": "TND",
}
_MASKS = (torch.bool, torch.int8, torch.uint8)


def _check_mask(
    operator: str, mask: Tensor, mode: int, batch: int, sq: int, skv: int, plain: bool
) -> Tensor:
    """The mask of modes 0 and 1 with a shape that broadcasts against [B, N, Sq, Skv]."""
    require_dtype(operator, "atten_mask", mask, _MASKS)
    if mode not in (0, 1):
        return mask
    shape = tuple(mask.shape)
    shapes = {(b, *one, sq, skv) for b in (batch, 1) for one in ((), (1,))}
    if plain and sq > 1:
        shapes.add((sq, skv))
    if plain and sq == 1:
        shapes.add((batch, skv))
    require(
        shape in shapes,
        operator,
        f"get unsupported atten_mask shape {shape}; supported: {sorted(shapes, key=len)}",
    )
    return mask[:, None, :] if sq == 1 and shape == (batch, skv) else mask


def _cumulative(operator: str, name: str, ends: Sequence[int] | None, total: int) -> list[slice]:
    require(bool(ends), operator, f"layout TND needs {name} (cumulative)")
    assert ends is not None
    numbers = [int(end) for end in ends]
    require(len(numbers) <= 4096, operator, f"{name} has more than 4096 sequences")
    require(
        all(a <= b for a, b in zip([0, *numbers], numbers, strict=False)) and numbers[-1] == total,
        operator,
        f"{name} must be cumulative and end at T={total}, got {numbers[:8]}",
    )
    return [slice(a, b) for a, b in zip([0, *numbers], numbers, strict=False)]


def _varlen(
    operator: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    scale: float,
    mask: Tensor | None,
    mode: int,
    pre: int,
    post: int,
    q_ends: Sequence[int] | None,
    kv_ends: Sequence[int] | None,
    zero_empty_rows: bool,
) -> Attended:
    q, k, v = qkv
    rows = _cumulative(operator, "actual_seq_lengths", q_ends, q.shape[2])
    columns = _cumulative(operator, "actual_seq_lengths_kv", kv_ends, k.shape[2])
    require(len(rows) == len(columns), operator, "one length of query and of key per sequence")
    if mask is not None and mode in (0, 1):
        raise not_emulated(operator, f"atten_mask and sparse_mode {mode} in layout TND")
    where = q.device
    out = torch.zeros((*q.shape[:3], v.shape[3]), device=where)
    maximum = torch.full(q.shape[:3], -torch.inf, device=where)
    total = torch.ones(q.shape[:3], device=where)
    for row, column in zip(rows, columns, strict=True):
        sq, skv = row.stop - row.start, column.stop - column.start
        if not sq or not skv:
            continue
        masked = masked_out(operator, mask, mode, pre, post, sq, skv, 1)
        done = attend(
            q[:, :, row],
            k[:, :, column],
            v[:, :, column],
            scale,
            masked=masked,
            zero_empty_rows=zero_empty_rows,
        )
        out[:, :, row] = done.out
        maximum[:, :, row], total[:, :, row] = done.maximum, done.total
    return Attended(out, maximum, total)


def _infer(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    shift: Tensor | None,
    mask: Tensor | None,
    q_lengths: Sequence[int] | None,
    kv_lengths: Sequence[int] | None,
    heads: int,
    kv_heads: int,
    scale: float,
    pre: int,
    post: int,
    input_layout: str,
    mode: int,
    inner_precise: int,
    lse: bool,
) -> tuple[Tensor, Tensor]:
    soc.refuse_310p(operator)
    if soc.is_950():
        raise refuse(operator, "the table of the operator names A2 and A3 only")
    require(input_layout in _OUTPUT, operator, f"input_layout {input_layout!r} is not supported")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype == torch.int8:
            raise not_emulated(operator, "int8 inputs")
        require_dtype(operator, name, tensor, HALF)
    require(query.dtype == key.dtype == value.dtype, operator, "q, k, v must have one dtype")
    require_contiguous(
        operator, query=query, key=key, value=value, atten_mask=mask, pse_shift=shift
    )
    layout = input_layout.partition("_")[0]
    kv_heads = kv_heads or heads
    require(0 < heads <= 256, operator, f"the head number must be 1..256, got {heads}")
    require(
        heads % kv_heads == 0 and heads // kv_heads <= 64,
        operator,
        f"{heads} heads must be 1..64 times the {kv_heads} kv heads",
    )
    q = to_bnsd(operator, "query", query, layout, heads)
    k = to_bnsd(operator, "key", key, layout, kv_heads)
    v = to_bnsd(operator, "value", value, layout, kv_heads)
    batch, _, sq, dim = q.shape
    skv = k.shape[2]
    require(k.shape == v.shape, operator, "key and value must have one shape")
    require(k.shape[0] == batch, operator, f"batch of key, {k.shape[0]}, is not {batch}")
    require(k.shape[3] == dim, operator, f"head_dim of key, {k.shape[3]}, is not {dim}")
    require(
        0 < dim <= 512 and dim % 16 == 0,
        operator,
        f"head_dim must be a multiple of 16 and at most 512, got {dim}",
    )
    require(inner_precise in (0, 1, 2, 3), operator, f"inner_precise {inner_precise} is not 0..3")
    require(0 <= mode <= 4, operator, f"sparse_mode {mode} is not supported")
    varlen = layout in ("TND", "NTD")
    if varlen:
        require(dim in (64, 128, 192), operator, f"TND takes head_dim 64, 128, 192, got {dim}")
    elif input_layout == "BNSD_BSND":
        require(sq > 1, operator, "layout BNSD_BSND needs Sq > 1")
    elif input_layout == "BNSD_NBSD":
        require(1 < sq <= 16, operator, "layout BNSD_NBSD needs 1 < Sq <= 16")
    zero = inner_precise >= 2
    check_shift(operator, shift, q, skv)
    if varlen:
        if shift is not None:
            raise not_emulated(operator, "pse_shift in layout TND")
        if mask is not None:
            require_dtype(operator, "atten_mask", mask, _MASKS)
        done = _varlen(
            operator, (q, k, v), scale, mask, mode, pre, post, q_lengths, kv_lengths, zero
        )
    else:
        if sq == 1 and mode > 1:
            mode, mask = 0, None  # one query row: the mode has no effect
        if mask is not None:
            plain = input_layout in ("BSH", "BSND", "BNSD")
            mask = _check_mask(operator, mask, mode, batch, sq, skv, plain)
        lengths = (
            per_batch(operator, "actual_seq_lengths", q_lengths, batch, sq),
            per_batch(operator, "actual_seq_lengths_kv", kv_lengths, batch, skv),
        )
        done = attend_lengths(
            operator, q, k, v, scale, mask, mode, pre, post, shift, lengths, zero, leading=2
        )
    out = from_bnsd(done.out, _OUTPUT[input_layout]).to(query.dtype)
    if not lse:
        return out, out.new_empty(0, dtype=torch.float32)
    values = done.lse.unsqueeze(-1)
    return out, from_bnsd(values, "TND") if varlen else values


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = INT_MAX,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """v1; quantised, paged and rope forms are not emulated."""
    operator = "npu_fused_infer_attention_score"
    require_absent(operator, **others)
    return _infer(
        operator,
        query,
        key,
        value,
        shift=pse_shift,
        mask=atten_mask,
        q_lengths=actual_seq_lengths,
        kv_lengths=actual_seq_lengths_kv,
        heads=num_heads,
        kv_heads=num_key_value_heads,
        scale=scale,
        pre=pre_tokens,
        post=next_tokens,
        input_layout=input_layout,
        mode=sparse_mode,
        inner_precise=inner_precise,
        lse=softmax_lse_flag,
    )


def npu_fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = INT_MAX,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    query_quant_mode: int = 0,
    key_quant_mode: int = 0,
    value_quant_mode: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """v2: v1 under other names; quantised, paged and rope forms are not emulated."""
    operator = "npu_fused_infer_attention_score_v2"
    require_absent(operator, **others)
    return _infer(
        operator,
        query,
        key,
        value,
        shift=pse_shift,
        mask=atten_mask,
        q_lengths=actual_seq_qlen,
        kv_lengths=actual_seq_kvlen,
        heads=num_query_heads,
        kv_heads=num_key_value_heads,
        scale=softmax_scale,
        pre=pre_tokens,
        post=next_tokens,
        input_layout=input_layout,
        mode=sparse_mode,
        inner_precise=inner_precise,
        lse=return_softmax_lse,
    )


TABLE: Table = {
    "npu_fused_infer_attention_score": npu_fused_infer_attention_score,
    "npu_fused_infer_attention_score_v2": npu_fused_infer_attention_score_v2,
}
