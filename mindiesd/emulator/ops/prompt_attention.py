"""``npu_prompt_flash_attention`` (PFA): softmax(scale_value * q k^T + pse_shift) v, inference only.

Limits: op-plugin torch_npu-npu_prompt_flash_attention.md and aclnnPromptFlashAttentionV3.

- A2, A3: float16, bfloat16; 310P: float16 only, no pse, no lengths, no GQA, sparse_mode 0,
  next_tokens 0 or INT_MAX, B <= 128, S <= 65535; the 950 refuses the operator;
- inputs contiguous; layouts BSH BSND BNSD BNSD_BSND; D <= 512 (all of q, k, v), N <= 256,
  N / Nkv <= 64; BSH and BSND need N * D < 65535; B <= 128 when D is not a multiple of 32 bytes;
- atten_mask bool, int8 or uint8, contiguous, 1 = masked out: [Sq,Skv], [B|1,Sq,Skv] or
  [B|1,1,Sq,Skv], never per head; modes 2 to 4 take the 2048 x 2048 mask; a mask in mode 0 is
  joined by the band of pre_tokens and next_tokens, **whose default is 0: causal**;
- rows that are all masked are not supported and come out as the mean of v;
- pse_shift [B|1,N,Sq,Skv]; lengths are per batch.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from mindiesd.emulator.ops.softmax import Attended, attend

_LAYOUTS = ("BSH", "BSND", "BNSD", "BNSD_BSND")
_MASKS = (torch.bool, torch.int8, torch.uint8)


def require_contiguous(operator: str, **tensors: Tensor | None) -> None:
    """Raise for the first argument that is not contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None:
            require(tensor.is_contiguous(), operator, f"{name} must be contiguous")


def check_shift(operator: str, shift: Tensor | None, q: Tensor, skv: int) -> None:
    """Raise unless pse_shift is [B|1, N, Sq, Skv] in q's dtype."""
    if shift is None:
        return
    batch, heads, sq = q.shape[:3]
    require(shift.dtype == q.dtype, operator, f"pse_shift must be {q.dtype}, got {shift.dtype}")
    allowed = {(batch, heads, sq, skv), (1, heads, sq, skv)}
    require(
        tuple(shift.shape) in allowed,
        operator,
        f"get unsupported pse_shift shape {tuple(shift.shape)}; supported: {sorted(allowed)}",
    )


def per_batch(
    operator: str, name: str, lengths: Sequence[int] | None, batch: int, most: int
) -> list[int] | None:
    """The lengths of the sequences, one per batch, checked."""
    if lengths is None:
        return None
    numbers = [int(number) for number in lengths]
    require(len(numbers) == batch, operator, f"{name} has {len(numbers)} numbers for batch {batch}")
    require(
        all(0 <= number <= most for number in numbers),
        operator,
        f"{name} {numbers[:8]} must lie in 0..{most}",
    )
    return numbers


def attend_lengths(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    mode: int,
    pre: int,
    post: int,
    shift: Tensor | None,
    lengths: tuple[list[int] | None, list[int] | None],
    zero_empty_rows: bool,
    leading: int,
) -> Attended:
    """Attention with one length per batch; positions beyond a length are neither read nor written.

    They come out as 0, as the kernel initialises them.
    """
    batch, heads, sq, _ = q.shape
    skv = k.shape[2]

    def whole(rows: int, columns: int, given: Tensor | None, count: int) -> Tensor | None:
        if given is not None and mode in (0, 1):
            given = given[..., :rows, :columns]
            if given.dim() == 3:
                given = given[:, None]
        return masked_out(operator, given, mode, pre, post, rows, columns, count, leading=leading)

    if lengths[0] is None and lengths[1] is None:
        masked = whole(sq, skv, mask, batch)
        return attend(q, k, v, scale, after=shift, masked=masked, zero_empty_rows=zero_empty_rows)
    q_lengths = lengths[0] or [sq] * batch
    kv_lengths = lengths[1] or [skv] * batch
    where = q.device
    out = torch.zeros(batch, heads, sq, v.shape[3], device=where)
    maximum = torch.full((batch, heads, sq), -torch.inf, device=where)
    total = torch.ones(batch, heads, sq, device=where)
    for b, (rows, columns) in enumerate(zip(q_lengths, kv_lengths, strict=True)):
        if not rows or not columns:
            continue
        one = slice(b, b + 1)
        given = mask
        if mask is not None and mode in (0, 1) and mask.dim() > 2 and mask.shape[0] > 1:
            given = mask[one]
        bias = None
        if shift is not None:
            bias = shift[one if shift.shape[0] > 1 else slice(0, 1), :, :rows, :columns]
        done = attend(
            q[one, :, :rows],
            k[one, :, :columns],
            v[one, :, :columns],
            scale,
            after=bias,
            masked=whole(rows, columns, given, 1),
            zero_empty_rows=zero_empty_rows,
        )
        out[one, :, :rows] = done.out
        maximum[one, :, :rows] = done.maximum
        total[one, :, :rows] = done.total
    return Attended(out, maximum, total)


def _check_310p(
    operator: str,
    q: Tensor,
    shift: Tensor | None,
    lengths: bool,
    heads: tuple[int, int],
    mode: int,
    post: int,
) -> None:
    require(q.dtype == torch.float16, operator, f"Ascend310P takes float16 only, got {q.dtype}")
    require(shift is None, operator, "pse_shift is not supported on Ascend310P")
    require(not lengths, operator, "actual_seq_lengths are not supported on Ascend310P")
    require(heads[0] == heads[1], operator, "GQA is not supported on Ascend310P")
    require(mode == 0, operator, f"sparse_mode {mode} is not supported on Ascend310P")
    require(post in (0, INT_MAX), operator, "next_tokens must be 0 or INT_MAX on Ascend310P")
    require(q.shape[0] <= 128 and q.shape[2] <= 65535, operator, "B <= 128 and S <= 65535")


def npu_prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    pse_shift: Tensor | None = None,
    actual_seq_lengths: Sequence[int] | None = None,
    deq_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    deq_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    num_heads: int = 1,
    scale_value: float = 1.0,
    pre_tokens: int = INT_MAX,
    next_tokens: int = 0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    sparse_mode: int = 0,
) -> Tensor:
    """softmax(scale_value * q k^T + pse_shift) v."""
    operator = "npu_prompt_flash_attention"
    if soc.is_950():
        raise refuse(operator, "no longer supported on Ascend950")
    require_absent(
        operator,
        padding_mask=padding_mask,
        deq_scale1=deq_scale1,
        quant_scale1=quant_scale1,
        deq_scale2=deq_scale2,
        quant_scale2=quant_scale2,
        quant_offset2=quant_offset2,
    )
    if input_layout in ("TND", "NTD_TND", "NSD", "SH"):
        raise not_emulated(operator, f"layout {input_layout}")
    require(input_layout in _LAYOUTS, operator, f"input_layout {input_layout!r}: {_LAYOUTS}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dtype == torch.int8:
            raise not_emulated(operator, "int8 inputs")
        require_dtype(operator, name, tensor, HALF)
    require(query.dtype == key.dtype == value.dtype, operator, "q, k, v must have one dtype")
    require_contiguous(
        operator, query=query, key=key, value=value, atten_mask=atten_mask, pse_shift=pse_shift
    )
    layout, _, out_layout = input_layout.partition("_")
    kv_heads = num_key_value_heads or num_heads
    require(0 < num_heads <= 256, operator, f"num_heads must be 1..256, got {num_heads}")
    require(
        num_heads % kv_heads == 0 and num_heads // kv_heads <= 64,
        operator,
        f"num_heads {num_heads} must be 1..64 times num_key_value_heads {kv_heads}",
    )
    q = to_bnsd(operator, "query", query, layout, num_heads)
    k = to_bnsd(operator, "key", key, layout, kv_heads)
    v = to_bnsd(operator, "value", value, layout, kv_heads)
    batch, _, sq, dim = q.shape
    skv = k.shape[2]
    require(k.shape == v.shape, operator, "key and value must have one shape")
    require(k.shape[0] == batch, operator, f"batch of key, {k.shape[0]}, is not {batch}")
    require(k.shape[3] == dim, operator, f"head_dim of key, {k.shape[3]}, is not {dim}")
    require(1 <= dim <= 512, operator, f"head_dim must be 1..512, got {dim}")
    require(sq <= 20 << 20, operator, f"S must be at most 20M, got {sq}")
    require(batch <= (128 if dim % 16 else 65536), operator, f"batch {batch} is too large")
    if layout in ("BSH", "BSND"):
        require(num_heads * dim < 65535, operator, f"N * D must be < 65535 in layout {layout}")
    given_lengths = actual_seq_lengths is not None or actual_seq_lengths_kv is not None
    if soc.is_310p():
        heads = (num_heads, kv_heads)
        _check_310p(operator, q, pse_shift, given_lengths, heads, sparse_mode, next_tokens)
    # Modes 10 to 14 are 0 to 4 computed in high precision (op-plugin).
    mode = sparse_mode - 10 if 10 <= sparse_mode <= 14 else sparse_mode
    require(0 <= mode <= 4, operator, f"sparse_mode {sparse_mode} is not supported")
    if atten_mask is not None:
        require_dtype(operator, "atten_mask", atten_mask, _MASKS)
        if mode in (0, 1):
            shapes = {(sq, skv)} | {(b, *one, sq, skv) for b in (batch, 1) for one in ((), (1,))}
            require(
                tuple(atten_mask.shape) in shapes,
                operator,
                f"get unsupported atten_mask shape {tuple(atten_mask.shape)}; "
                f"supported: {sorted(shapes, key=len)}",
            )
    check_shift(operator, pse_shift, q, skv)
    lengths = (
        per_batch(operator, "actual_seq_lengths", actual_seq_lengths, batch, sq),
        per_batch(operator, "actual_seq_lengths_kv", actual_seq_lengths_kv, batch, skv),
    )
    if skv == 0:
        out = torch.zeros(q.shape, device=q.device)
    else:
        out = attend_lengths(
            operator,
            q,
            k,
            v,
            scale_value,
            atten_mask,
            mode,
            pre_tokens,
            next_tokens,
            pse_shift,
            lengths,
            zero_empty_rows=False,
            leading=2,
        ).out
    return from_bnsd(out, out_layout or layout).to(query.dtype)


TABLE: Table = {"npu_prompt_flash_attention": npu_prompt_flash_attention}
