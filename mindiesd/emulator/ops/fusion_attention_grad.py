"""Gradients of the fusion attentions: ``npu_fusion_attention_grad`` and ``_grad_v3``.

With P = softmax(scale * (q k^T + pse)): dV = P^T dO, dS = P * (dO V^T - sum(dO * O)),
dQ = scale * dS K, dK = scale * dS^T Q, dpse = scale * dS. Layout TND is not emulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mindiesd.emulator.ops.check import INT_MAX, Table, not_emulated, require_absent
from mindiesd.emulator.ops.fusion_attention import FusionCall, bias_of, check_common, check_mask
from mindiesd.emulator.ops.layout import from_bnsd, to_bnsd
from mindiesd.emulator.ops.mask import masked_out


def _gradients(
    operator: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dy: Tensor,
    head_num: int,
    layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale_value: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = INT_MAX,
    next_tockens: int = INT_MAX,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    sparse_mode: int = 0,
    sink: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    require_absent(operator, sink=sink)
    if layout.upper() == "TND":
        raise not_emulated(operator, "layout TND")
    check_common(operator, padding_mask, keep_prob, inner_precise)
    call = FusionCall(operator, query, key, value, head_num, layout)
    before, _ = bias_of(call, pse, 1, sparse_mode)
    mode = sparse_mode if atten_mask is not None else 0
    check_mask(call, atten_mask, mode, call.sq, call.skv)
    masked = masked_out(
        operator,
        atten_mask,
        mode,
        pre_tockens,
        next_tockens,
        call.sq,
        call.skv,
        call.batch,
        prefix,
    )
    group = call.heads // call.k.shape[1]
    q = call.q.float()
    k, v = (tensor.float().repeat_interleave(group, 1) for tensor in (call.k, call.v))
    scores = q @ k.transpose(-1, -2)
    if before is not None:
        scores = scores + before.float()
    scores = scores * scale_value
    if masked is not None:
        scores = scores.masked_fill(masked, torch.finfo(torch.float32).min)
    weights = scores.softmax(-1)
    if masked is not None and (inner_precise == 2 or (mode == 3 and call.sq > call.skv)):
        weights = weights.masked_fill(masked.expand(weights.shape).all(-1, keepdim=True), 0.0)
    grad = to_bnsd(operator, "dy", dy, call.layout, head_num).float()
    d_weights = grad @ v.transpose(-1, -2)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True))
    if masked is not None:
        d_scores = d_scores.masked_fill(masked, 0.0)
    d_scores = d_scores * scale_value

    def fold(tensor: Tensor) -> Tensor:
        return torch.unflatten(tensor, 1, (-1, group)).sum(2)

    def out(tensor: Tensor) -> Tensor:
        return from_bnsd(tensor, call.layout).to(query.dtype)

    d_pse = torch.empty(0, dtype=query.dtype)
    if pse is not None:
        d_pse = d_scores.sum_to_size(pse.shape).to(pse.dtype)
    return (
        out(d_scores @ k),
        out(fold(d_scores.transpose(-1, -2) @ q)),
        out(fold(weights.transpose(-1, -2) @ grad)),
        d_pse,
        torch.empty(0, dtype=torch.float32),
    )


def npu_fusion_attention_grad(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Gradients for query, key, value, pse and (not emulated) sink."""
    return _gradients("npu_fusion_attention_grad", *args, **kwargs)


def npu_fusion_attention_grad_v3(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Gradients for query, key, value, pse and (not emulated) sink."""
    return _gradients("npu_fusion_attention_grad_v3", *args, **kwargs)


TABLE: Table = {
    "npu_fusion_attention_grad": npu_fusion_attention_grad,
    "npu_fusion_attention_grad_v3": npu_fusion_attention_grad_v3,
}
