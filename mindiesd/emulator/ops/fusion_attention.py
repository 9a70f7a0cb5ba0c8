"""``npu_fusion_attention``, ``_v2`` and ``_v3`` (aclnnFlashAttentionScore and its varlen forms).

Limits: op-plugin docs/zh/custom_APIs/torch_npu/torch_npu-npu_fusion_attention.md and the CANN page
of aclnnFlashAttentionScore.

- q, k, v of one dtype out of float16, bfloat16, float32; layouts BSH SBH BSND BNSD TND;
- D of q and k equal and at most 768, D of v no larger; 1 to 256 heads, N a multiple of Nkv;
- atten_mask bool or uint8, 1 = masked out, exactly [B,N,Sq,Skv], [B,1,Sq,Skv], [1,1,Sq,Skv] or
  [Sq,Skv]; TND: [max Sq, max Skv]; compressed for the modes 2, 3, 4, 6 (see ``mask``);
- rows that are all masked give 0 only with inner_precise=2, or by themselves for mode 3 with
  Sq > Skv; otherwise they come out as the mean of v;
- pse [B,N,Sq,Skv], [1,N,Sq,Skv] or [B,N,1,Skv] in q's dtype: softmax(scale * (q k^T + pse));
  v2: pse_type 0 adds it after the scale, 2 and 3 build -slope * |j - i| (3: its root);
- TND: actual_seq_qlen and actual_seq_kvlen are cumulative, without a leading 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator.ops import soc
from mindiesd.emulator.ops.check import (
    FLOATS,
    INT_MAX,
    Table,
    not_emulated,
    refuse,
    require,
    require_dtype,
)
from mindiesd.emulator.ops.layout import from_bnsd, heads_of, to_bnsd
from mindiesd.emulator.ops.mask import masked_out
from mindiesd.emulator.ops.softmax import attend

_LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")
_STAT = 8  # the statistics repeat each number this often, one block of 32 bytes


class FusionCall:
    """One checked call, with q, k, v as [B, N, S, D]."""

    def __init__(
        self, operator: str, q: Tensor, k: Tensor, v: Tensor, heads: int, layout: str
    ) -> None:
        """Check the arguments that all versions share."""
        self.operator = operator
        soc.refuse_310p(operator)
        layout = self.layout = layout.upper()  # torch_npu: case-insensitive
        require(layout in _LAYOUTS, operator, f"input_layout {layout!r} is not one of {_LAYOUTS}")
        for name, tensor in (("query", q), ("key", k), ("value", v)):
            require_dtype(operator, name, tensor, FLOATS)
        require(
            q.dtype == k.dtype == v.dtype,
            operator,
            f"query, key and value must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}",
        )
        require(1 <= heads <= 256, operator, f"head_num must be 1..256, got {heads}")
        self.q = to_bnsd(operator, "query", q, layout, heads)
        dim = self.q.shape[3]
        kv_heads = heads_of(k, layout, dim)
        require(kv_heads > 0, operator, f"key {tuple(k.shape)} does not hold heads of {dim}")
        self.k = to_bnsd(operator, "key", k, layout, kv_heads)
        self.v = to_bnsd(operator, "value", v, layout, kv_heads)
        dv = self.v.shape[3]
        require(
            self.k.shape[3] == dim,
            operator,
            f"query and key must have one head_dim, got {dim} and {self.k.shape[3]}",
        )
        require(1 <= dim <= 768, operator, f"head_dim must be 1..768, got {dim}")
        require(dv <= dim, operator, f"head_dim of value, {dv}, exceeds that of key, {dim}")
        require(
            self.k.shape[:3] == self.v.shape[:3],
            operator,
            f"key {tuple(k.shape)} and value {tuple(v.shape)} differ in more than head_dim",
        )
        require(
            self.k.shape[0] == self.q.shape[0],
            operator,
            f"batch of query, {self.q.shape[0]}, is not that of key, {self.k.shape[0]}",
        )
        require(
            heads % kv_heads == 0, operator, f"{heads} heads are no multiple of {kv_heads} kv heads"
        )
        self.batch, self.heads, self.sq = self.q.shape[:3]
        self.skv = self.k.shape[2]
        require(
            min(self.batch, self.sq, self.skv) > 0 and max(self.sq, self.skv) <= 1 << 20,
            operator,
            f"sequence lengths must be 1..1M, got {self.sq} and {self.skv}",
        )
        require(self.batch <= 2 << 20, operator, f"batch must be at most 2M, got {self.batch}")


def check_common(operator: str, padding: Tensor | None, keep_prob: float, precise: int) -> None:
    """Raise for padding masks, dropout and unknown precisions."""
    require(padding is None, operator, "padding_mask is not supported")
    require(0.0 < keep_prob <= 1.0, operator, f"keep_prob must lie in (0, 1], got {keep_prob}")
    if keep_prob < 1.0:
        raise not_emulated(operator, "keep_prob < 1 (dropout)")
    require(precise in (0, 1, 2), operator, f"inner_precise must be 0, 1 or 2, got {precise}")


def check_mask(call: FusionCall, mask: Tensor | None, mode: int, sq: int, skv: int) -> None:
    """Raise unless ``mask`` has a dtype and, if it is a full one, a shape of the operator's."""
    if mask is None:
        return
    require_dtype(call.operator, "atten_mask", mask, (torch.bool, torch.uint8))
    if mode not in (0, 1, 5):
        return  # compressed: its shape is checked with its values
    shape = tuple(mask.shape)
    if call.layout == "TND":
        allowed: set[tuple[int, ...]] = {(sq, skv)}
    else:
        b, n = call.batch, call.heads
        allowed = {(b, n, sq, skv), (b, 1, sq, skv), (1, 1, sq, skv), (sq, skv)}
    require(
        shape in allowed,
        call.operator,
        f"get unsupported atten_mask shape {shape}; supported: {sorted(allowed, key=len)}",
    )


def _slopes(call: FusionCall, pse: Tensor, kind: int, q_start: int, kv_start: int) -> Tensor:
    """The bias of pse_type 2 and 3: -slope * |j + kv_start - i - q_start|, 3 with its root."""
    n, b = call.heads, call.batch
    require_dtype(call.operator, "pse", pse, (torch.float32,))
    require(
        tuple(pse.shape) in {(n,), (b, n)},
        call.operator,
        f"pse_type {kind} needs slopes [N] or [B, N], got {tuple(pse.shape)}",
    )
    require(call.sq == call.skv, call.operator, f"pse_type {kind} needs Sq == Skv")
    i, j = torch.arange(call.sq), torch.arange(call.skv)
    distance = (j[None, :] + kv_start - i[:, None] - q_start).abs().float()
    if kind == 3:
        distance = distance.sqrt()
    return -pse.reshape(-1, n, 1, 1) * distance


def bias_of(
    call: FusionCall, pse: Tensor | None, kind: int, mode: int, q_start: int = 0, kv_start: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """What is added before and after the scale."""
    if pse is None:
        return None, None
    operator = call.operator
    require(kind in (0, 1, 2, 3), operator, f"pse_type must be 0..3, got {kind}")
    if call.layout == "TND":
        raise not_emulated(operator, "pse in layout TND")
    if kind in (2, 3):
        return None, _slopes(call, pse, kind, q_start, kv_start)
    require(
        pse.dtype == call.q.dtype,
        operator,
        f"pse must have query's dtype {call.q.dtype}, got {pse.dtype}",
    )
    b, n, sq, skv = call.batch, call.heads, call.sq, call.skv
    shape = tuple(pse.shape)
    compressed = {(b, n, 1024, skv), (1, n, 1024, skv)}
    if shape in compressed and sq != 1024 and sq == skv and sq > 1024 and mode in (0, 2, 3):
        raise not_emulated(operator, "a compressed (alibi) pse")
    allowed = {(b, n, sq, skv), (1, n, sq, skv), (b, n, 1, skv)}
    require(
        shape in allowed,
        operator,
        f"get unsupported pse shape {shape}; supported: {sorted(allowed)}",
    )
    return (pse, None) if kind == 1 else (None, pse)


def _lengths(call: FusionCall, name: str, ends: Sequence[int] | None, total: int) -> list[int]:
    """The sequence lengths behind a list of cumulative ends."""
    require(
        ends is not None and len(ends) > 0,
        call.operator,
        f"layout TND needs {name} (cumulative, without a leading 0)",
    )
    assert ends is not None
    numbers = [int(end) for end in ends]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()  # trailing zeros are to be ignored
    require(len(numbers) <= 2048, call.operator, f"{name} has more than 2048 sequences")
    require(
        all(a <= b for a, b in pairwise(numbers)) and numbers[0] >= 0,
        call.operator,
        f"{name} must be cumulative, got {numbers[:8]}",
    )
    require(
        numbers[-1] == total,
        call.operator,
        f"{name} ends at {numbers[-1]}, but T is {total}",
    )
    return [b - a for a, b in zip([0, *numbers], numbers, strict=False)]


class _Result:
    __slots__ = ("maximum", "out", "total")

    def __init__(self, out: Tensor, maximum: Tensor, total: Tensor) -> None:
        self.out, self.maximum, self.total = out, maximum, total


def _dense(
    call: FusionCall,
    mask: Tensor | None,
    mode: int,
    pre: int,
    post: int,
    precise: int,
    prefix: Sequence[int] | None,
    scale: float,
    bias: tuple[Tensor | None, Tensor | None],
    sink: Tensor | None,
) -> _Result:
    check_mask(call, mask, mode, call.sq, call.skv)
    masked = masked_out(call.operator, mask, mode, pre, post, call.sq, call.skv, call.batch, prefix)
    done = attend(
        call.q,
        call.k,
        call.v,
        scale,
        before=bias[0],
        after=bias[1],
        masked=masked,
        zero_empty_rows=precise == 2 or (mode == 3 and call.sq > call.skv),
        sink=sink,
    )
    return _Result(done.out, done.maximum, done.total)


def _varlen(
    call: FusionCall,
    mask: Tensor | None,
    mode: int,
    pre: int,
    post: int,
    precise: int,
    lengths: tuple[list[int], list[int]],
    scale: float,
    sink: Tensor | None,
) -> _Result:
    q_lengths, kv_lengths = lengths
    require(
        len(q_lengths) == len(kv_lengths),
        call.operator,
        f"{len(q_lengths)} query sequences, but {len(kv_lengths)} of key",
    )
    require(mode not in (5, 6), call.operator, f"sparse_mode {mode} does not go with TND")
    check_mask(call, mask, mode, max(q_lengths), max(kv_lengths))
    shape = call.q.shape[:3]
    where = call.q.device
    out = torch.zeros((*shape, call.v.shape[3]), device=where)
    maximum, total = torch.zeros(shape, device=where), torch.zeros(shape, device=where)
    q_at = kv_at = 0
    for sq, skv in zip(q_lengths, kv_lengths, strict=True):
        q, kv = slice(q_at, q_at + sq), slice(kv_at, kv_at + skv)
        q_at, kv_at = q.stop, kv.stop
        if sq == 0 or skv == 0:
            continue  # no keys: the output stays 0
        part = mask
        if mask is not None and mode in (0, 1) and not mask.is_meta:
            part = mask[:sq, :skv]
            empty = bool(part.bool().all(-1).any())
            require(not empty, call.operator, "atten_mask leaves a row of layout TND without a key")
        masked = masked_out(call.operator, part, mode, pre, post, sq, skv, 1)
        done = attend(
            call.q[:, :, q],
            call.k[:, :, kv],
            call.v[:, :, kv],
            scale,
            masked=masked,
            zero_empty_rows=precise == 2 or (mode == 3 and sq > skv),
            sink=sink,
        )
        out[:, :, q], maximum[:, :, q], total[:, :, q] = done.out, done.maximum, done.total
    return _Result(out, maximum, total)


def _statistic(call: FusionCall, value: Tensor, softmax_layout: str) -> Tensor:
    """[B,N,S,8]; TND: [T,N,8], whose memory is ordered N-T unless softmax_layout is "TND"."""
    if call.layout != "TND":
        return value.unsqueeze(-1).expand(*value.shape, _STAT)
    order = value.squeeze(0)
    if softmax_layout == "TND":
        return order.t().unsqueeze(-1).expand(-1, -1, _STAT)
    heads, tokens = order.shape
    return order.unsqueeze(-1).expand(-1, -1, _STAT).reshape(tokens, heads, _STAT)


def _attention(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None,
    pse_type: int,
    padding_mask: Tensor | None,
    atten_mask: Tensor | None,
    scale: float,
    keep_prob: float,
    pre: int,
    post: int,
    inner_precise: int,
    prefix: Sequence[int] | None,
    q_ends: Sequence[int] | None,
    kv_ends: Sequence[int] | None,
    sparse_mode: int,
    softmax_layout: str,
    sink: Tensor | None,
    starts: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_common(operator, padding_mask, keep_prob, inner_precise)
    # The ranges are those that torch_npu's host code checks; 7 and 8 are v2's alone, 5 is not.
    modes = (0, 1, 2, 3, 4, 6, 7, 8) if operator.endswith("_v2") else range(7)
    require(sparse_mode in modes, operator, f"sparse_mode {sparse_mode} is not supported")
    if sparse_mode > 6:
        raise not_emulated(operator, f"sparse_mode {sparse_mode}")
    call = FusionCall(operator, query, key, value, head_num, input_layout)
    if sink is not None:
        require_dtype(operator, "sink", sink, (torch.float32,))
        require(tuple(sink.shape) == (head_num,), operator, "sink must have shape [N]")
    bias = bias_of(call, pse, pse_type, sparse_mode, *starts)
    mode = sparse_mode if atten_mask is not None else 0
    input_layout = call.layout
    if input_layout == "TND":
        lengths = (
            _lengths(call, "actual_seq_qlen", q_ends, call.sq),
            _lengths(call, "actual_seq_kvlen", kv_ends, call.skv),
        )
        done = _varlen(call, atten_mask, mode, pre, post, inner_precise, lengths, scale, sink)
    else:
        done = _dense(call, atten_mask, mode, pre, post, inner_precise, prefix, scale, bias, sink)
    return (
        from_bnsd(done.out, input_layout).to(query.dtype),
        _statistic(call, done.maximum, softmax_layout),
        _statistic(call, done.total, softmax_layout),
        query.new_empty((0,)),
    )


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = INT_MAX,
    next_tockens: int = INT_MAX,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Any, ...]:
    """v1: softmax(scale * (q k^T + pse)) v."""
    operator = "npu_fusion_attention"
    if dropout_mask is not None:
        raise not_emulated(operator, "dropout_mask")
    done = _attention(
        operator,
        query,
        key,
        value,
        head_num,
        input_layout,
        pse=pse,
        pse_type=1,
        padding_mask=padding_mask,
        atten_mask=atten_mask,
        scale=scale,
        keep_prob=keep_prob,
        pre=pre_tockens,
        post=next_tockens,
        inner_precise=inner_precise,
        prefix=prefix,
        q_ends=actual_seq_qlen,
        kv_ends=actual_seq_kvlen,
        sparse_mode=sparse_mode,
        softmax_layout=softmax_layout,
        sink=sink,
    )
    return (*done, 0, 0, 0)


def npu_fusion_attention_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = INT_MAX,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Sequence[int] | None = None,
    kv_start_idx: Sequence[int] | None = None,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Any, ...]:
    """v2: as v1, with four kinds of pse."""
    operator = "npu_fusion_attention_v2"
    for name, given in (
        ("query_rope", query_rope),
        ("key_rope", key_rope),
        ("dropout_mask", dropout_mask),
    ):
        if given is not None:
            raise not_emulated(operator, name)
    starts = (q_start_idx[0] if q_start_idx else 0, kv_start_idx[0] if kv_start_idx else 0)
    done = _attention(
        operator,
        query,
        key,
        value,
        head_num,
        input_layout,
        pse=pse,
        pse_type=pse_type,
        padding_mask=padding_mask,
        atten_mask=atten_mask,
        scale=scale,
        keep_prob=keep_prob,
        pre=pre_tokens,
        post=next_tokens,
        inner_precise=inner_precise,
        prefix=prefix,
        q_ends=actual_seq_qlen,
        kv_ends=actual_seq_kvlen,
        sparse_mode=sparse_mode,
        softmax_layout=softmax_layout,
        sink=sink,
        starts=starts,
    )
    return (*done, 0, 0, 0)


def _host_list(operator: str, name: str, tensor: Tensor | None) -> list[int] | None:
    if tensor is None:
        return None
    if tensor.dtype != torch.int64:
        raise refuse(operator, f"{name} must be int64, got {tensor.dtype}")
    numbers: list[int] = tensor.tolist()
    return numbers


def npu_fusion_attention_v3(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = INT_MAX,
    next_tockens: int = INT_MAX,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Tensor | None = None,
    actual_seq_kvlen: Tensor | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
) -> tuple[Any, ...]:
    """v3: as v1, with sequence lengths as int64 tensors; what torch_npu's SDPA calls."""
    operator = "npu_fusion_attention_v3"
    if soc.is_950():
        raise refuse(operator, "not supported on Ascend950")
    done = _attention(
        operator,
        query,
        key,
        value,
        head_num,
        input_layout,
        pse=pse,
        pse_type=1,
        padding_mask=padding_mask,
        atten_mask=atten_mask,
        scale=scale,
        keep_prob=keep_prob,
        pre=pre_tockens,
        post=next_tockens,
        inner_precise=inner_precise,
        prefix=prefix,
        q_ends=_host_list(operator, "actual_seq_qlen", actual_seq_qlen),
        kv_ends=_host_list(operator, "actual_seq_kvlen", actual_seq_kvlen),
        sparse_mode=sparse_mode,
        softmax_layout=softmax_layout,
        sink=sink,
    )
    zero = torch.zeros(1, dtype=torch.int64)
    return (*done, zero, zero.clone())


TABLE: Table = {
    "npu_fusion_attention": npu_fusion_attention,
    "npu_fusion_attention_v2": npu_fusion_attention_v2,
    "npu_fusion_attention_v3": npu_fusion_attention_v3,
}
