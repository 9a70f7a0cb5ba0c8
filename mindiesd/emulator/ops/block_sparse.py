"""``npu_block_sparse_attention`` (BSA): attention over the blocks that a mask chooses.

Limits: op-plugin torch_npu-npu_block_sparse_attention.md.

- A2 and A3 (the CANN page adds the 950, with inner_precise 4); float16 and bfloat16; D 64 or 128;
- layouts TND and BNSD; N a multiple of Nkv, and num_key_value_heads must say so;
- block_sparse_mask int8 [B, N, ceil(Sq/bx), ceil(Skv/by)], **1 = compute**;
  block_shape [bx > 0, by a multiple of 128]; S need not divide;
- scale_value defaults to 0: every block then weighs the same;
- inner_precise 0 (float32 softmax) or 1 (float16 only, may overflow); bfloat16 needs 0;
- the lengths are per batch, both or neither, and TND needs both;
- the log-sum-exp [B,N,Sq,1] (TND [T,N,1]) holds numbers only with softmax_lse_flag=1, else NaN.

What a row without any block gives is not documented: here it is NaN, so that it is seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindiesd.emulator.ops import soc
from mindiesd.emulator.ops.check import HALF, Table, require, require_dtype
from mindiesd.emulator.ops.layout import from_bnsd, heads_of, to_bnsd
from mindiesd.emulator.ops.softmax import attend

_LAYOUTS = ("TND", "BNSD")
_NAME = "npu_block_sparse_attention"


def _lengths(name: str, given: Sequence[int] | None, batch: int, most: int) -> list[int]:
    if given is None:
        return [most] * batch
    numbers = [int(number) for number in given]
    require(min(numbers, default=0) >= 0, _NAME, f"{name} {numbers[:8]} must not be negative")
    return numbers


def npu_block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_sparse_mask: Tensor,
    block_shape: Sequence[int],
    *,
    q_input_layout: str = "TND",
    kv_input_layout: str = "TND",
    num_key_value_heads: int = 1,
    scale_value: float = 0.0,
    inner_precise: int = 1,
    actual_seq_lengths: Sequence[int] | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    softmax_lse_flag: int | None = 0,
) -> tuple[Tensor, Tensor]:
    """softmax(scale_value * q k^T) v over the chosen blocks."""
    soc.refuse_310p(_NAME)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_dtype(_NAME, name, tensor, HALF)
    require(query.dtype == key.dtype == value.dtype, _NAME, "q, k, v must have one dtype")
    require(
        q_input_layout in _LAYOUTS and kv_input_layout in _LAYOUTS,
        _NAME,
        f"layouts {q_input_layout!r}, {kv_input_layout!r} must be out of {_LAYOUTS}",
    )
    require(q_input_layout == kv_input_layout, _NAME, "q and kv must have one layout")
    varlen = q_input_layout == "TND"
    heads = heads_of(query, q_input_layout, 0)
    require(heads > 0 and num_key_value_heads > 0, _NAME, "head numbers must be positive")
    q = to_bnsd(_NAME, "query", query, q_input_layout, heads)
    k = to_bnsd(_NAME, "key", key, kv_input_layout, num_key_value_heads)
    v = to_bnsd(_NAME, "value", value, kv_input_layout, num_key_value_heads)
    dim = q.shape[3]
    require(dim in (64, 128), _NAME, f"head_dim must be 64 or 128, got {dim}")
    require(k.shape == v.shape and k.shape[3] == dim, _NAME, "k and v must match q's head_dim")
    require(heads % num_key_value_heads == 0, _NAME, f"{heads} heads, {num_key_value_heads} of kv")
    if soc.is_950():
        require(inner_precise == 4, _NAME, "inner_precise must be 4 on Ascend950")
    else:
        require(inner_precise in (0, 1), _NAME, f"inner_precise must be 0 or 1: {inner_precise}")
        require(
            inner_precise == 0 or query.dtype == torch.float16,
            _NAME,
            "inner_precise 1 takes float16 only",
        )
    require(
        (actual_seq_lengths is None) == (actual_seq_lengths_kv is None),
        _NAME,
        "actual_seq_lengths and actual_seq_lengths_kv come both or not at all",
    )
    require(
        len(block_shape) == 2
        and block_shape[0] > 0
        and block_shape[1] > 0
        and block_shape[1] % 128 == 0,
        _NAME,
        f"block_shape must be [bx > 0, by a multiple of 128], got {list(block_shape)}",
    )
    if varlen:
        require(actual_seq_lengths is not None, _NAME, "layout TND needs both lengths")
        assert actual_seq_lengths is not None
        batch = len(actual_seq_lengths)
    else:
        batch = q.shape[0]
        require(k.shape[0] == batch, _NAME, f"batch of key, {k.shape[0]}, is not {batch}")
    q_lengths = _lengths("actual_seq_lengths", actual_seq_lengths, batch, q.shape[2])
    kv_lengths = _lengths("actual_seq_lengths_kv", actual_seq_lengths_kv, batch, k.shape[2])
    require(
        len(q_lengths) == batch and len(kv_lengths) == batch,
        _NAME,
        f"the lengths must have one number per batch ({batch})",
    )
    if varlen:
        require(
            sum(q_lengths) == q.shape[2] and sum(kv_lengths) == k.shape[2],
            _NAME,
            "the lengths are per batch (not cumulative) and must add up to T",
        )
    else:
        require(
            max(q_lengths) <= q.shape[2] and max(kv_lengths) <= k.shape[2],
            _NAME,
            "the lengths exceed S",
        )
    bx, by = block_shape
    most_q = max(q_lengths) if varlen else q.shape[2]
    most_kv = max(kv_lengths) if varlen else k.shape[2]
    expected = (batch, heads, -(-most_q // bx), -(-most_kv // by))
    require_dtype(_NAME, "block_sparse_mask", block_sparse_mask, (torch.int8,))
    require(
        tuple(block_sparse_mask.shape) == expected,
        _NAME,
        f"block_sparse_mask must have shape {expected}, got {tuple(block_sparse_mask.shape)}",
    )
    require(
        bool(((block_sparse_mask == 0) | (block_sparse_mask == 1)).all()),
        _NAME,
        "block_sparse_mask holds values other than 0 and 1",
    )
    out = torch.zeros(q.shape)
    lse = torch.full((*q.shape[:3], 1), torch.nan)
    q_at = kv_at = 0
    for b, (sq, skv) in enumerate(zip(q_lengths, kv_lengths, strict=True)):
        one = slice(0, 1) if varlen else slice(b, b + 1)
        rows, columns = slice(q_at, q_at + sq), slice(kv_at, kv_at + skv)
        if varlen:
            q_at, kv_at = rows.stop, columns.stop
        if not sq or not skv:
            continue
        blocks = block_sparse_mask[b] == 0
        # Widen one axis at a time: the whole mask is only ever one batch's.
        masked = blocks.repeat_interleave(bx, 1)[:, :sq].repeat_interleave(by, 2)[:, :, :skv]
        empty = masked.all(-1)[None]
        done = attend(
            q[one, :, rows],
            k[one, :, columns],
            v[one, :, columns],
            scale_value,
            masked=masked[None],
        )
        out[one, :, rows] = done.out.masked_fill(empty[..., None], torch.nan)
        if softmax_lse_flag == 1:
            lse[one, :, rows] = done.lse.masked_fill(empty, torch.nan).unsqueeze(-1)
    return (
        from_bnsd(out, q_input_layout).to(query.dtype),
        from_bnsd(lse, "TND") if varlen else lse,
    )


TABLE: Table = {_NAME: npu_block_sparse_attention}
