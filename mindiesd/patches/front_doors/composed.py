"""Attention composed of PyTorch operators, for what no fused kernel computes.

    S = cap(scale * Q Kᵀ) + bias - slope * |i + Sk - Sq - j|, over the kept keys
    out = dropout(softmax(S)) V,   lse = log Σ exp(S)

Kernels return no log-sum-exp, cap nothing, drop nothing out and, but for a few, have no gradient.
Such calls are composed of differentiable operators in float32 or better, a block of queries at a
time, so that the whole score matrix exists only where a gradient needs it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mindiesd.ops.masks import Band
from mindiesd.patches import law

CAPPED = "computed natively: no kernel caps scores"
DROPPED = "computed natively: dropout"
GRADIENTS = "computed natively: " + law.GRADIENTS
WANTS_LSE = "computed natively: the log-sum-exp is asked for"

# Scores that exist at one time: 64 MiB in float32.
_BLOCK = 1 << 24


class Rules(NamedTuple):
    """What is done to the scores of one call.

    Attributes:
        scale: factor on the scores; None is ``D ** -0.5``.
        left: keys before the bottom-right diagonal that are seen; -1 for all.
        right: the same after it.
        softcap: c > 0 caps each score s to c * tanh(s / c).
        slopes: [N] or [B, N], ALiBi; or None.
        dropout_p: probability with which a weight is dropped.
        lse: whether the log-sum-exp is asked for.
    """

    scale: float | None = None
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    slopes: Tensor | None = None
    dropout_p: float = 0.0
    lse: bool = False


class Result(NamedTuple):
    """What one call gives.

    Attributes:
        out: [B, Sq, N, Dv] contiguous, or [T, N, Dv].
        lse: [B, N, Sq] or [N, T], float32, -inf for rows without a key; None if not asked for.
        weights: [B, N, Sq, Sk], the softmax, negative where it was dropped; None without dropout.
    """

    out: Tensor
    lse: Tensor | None = None
    weights: Tensor | None = None


def unfused(rules: Rules, *tensors: Tensor | None) -> str | None:
    """Why a call has to be composed; None if a kernel computes it."""
    if rules.softcap > 0.0:
        return CAPPED
    if rules.dropout_p > 0.0:
        return DROPPED
    if rules.lse:
        return WANTS_LSE
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return GRADIENTS
    return None


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    mask: Tensor | None = None,
    band: Band | None = None,
) -> Result:
    """Attention of differentiable operators, in float32 or better, rounded once.

    Args:
        q: as for :func:`dense`, and so are the others.
        k: likewise.
        v: likewise.
        rules: likewise.
        mask: likewise.
        band: likewise; the rules' window is applied besides.
    """
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    if rules.left >= 0 or rules.right >= 0:
        window = Band.window(rules.left, rules.right, queries, keys)
        band = window if band is None else band.intersect(window)
    band = (band or Band()).within(queries, keys)
    differentiable = unfused(rules._replace(softcap=0.0, dropout_p=0.0, lse=False), q, k, v, mask)
    block = queries
    if differentiable is None and rules.dropout_p == 0.0 and not torch.compiler.is_compiling():
        block = max(1, _BLOCK // max(1, batch * heads * keys))
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    key = k.transpose(1, 2).to(wide).contiguous()
    value = v.transpose(1, 2).to(wide).contiguous()
    parts = []
    for first in range(0, max(queries, 1), max(block, 1)):
        last = min(first + block, queries)
        # The keys that some query of this block may see.
        begin = 0 if band.lower is None else min(max(0, first + band.lower), keys)
        end = keys if band.upper is None else max(min(keys, last + band.upper), begin)
        parts.append(
            _block(
                q[:, first:last].transpose(1, 2).to(wide),
                key[:, :, begin:end],
                value[:, :, begin:end],
                rules,
                _part(mask, first, last, begin, end),
                _moved(band, first, begin),
                begin - first - (keys - queries),
            )
        )
    out = torch.cat([part.out for part in parts], 2) if len(parts) > 1 else parts[0].out
    lse = None
    if rules.lse:
        every = [part.lse for part in parts if part.lse is not None]
        lse = (torch.cat(every, 2) if len(every) > 1 else every[0]).detach().float()
    weights = parts[0].weights
    return Result(
        out.transpose(1, 2).to(q.dtype).contiguous(),
        lse,
        None if weights is None else weights.detach().to(q.dtype),
    )


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rules: Rules,
    mask: Tensor | None,
    band: Band,
    offset: int,
) -> Result:
    """Attention of some queries to some keys, all [B, N, S, D] and wide.

    ``offset`` is what to add to ``j - i`` to get the distance from the bottom-right diagonal.
    """
    batch, heads, queries, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    factor = rules.scale if rules.scale is not None else dim**-0.5 if dim else 1.0
    # Query heads that share a key head are rows of one matrix product.
    rows = heads // kv_heads * queries if kv_heads else 0
    grouped = (query * factor).reshape(batch * kv_heads, rows, dim)
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    # bmm, whose gradient is the same everywhere; that of matmul is torch_npu's own.
    scores = torch.bmm(grouped, key.transpose(1, 2)).view(batch, heads, queries, keys)
    if rules.softcap > 0.0:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    steps = None
    if rules.slopes is not None or band != Band():
        steps = (
            torch.arange(keys, device=query.device)
            - torch.arange(queries, device=query.device)[:, None]
        )
    if rules.slopes is not None and steps is not None:
        slopes = rules.slopes.detach().to(scores.dtype).expand(batch, heads)[:, :, None, None]
        scores = scores - slopes * (steps + offset).abs()
    keep = None
    if mask is not None:
        if mask.dtype is torch.bool:
            keep = mask
        else:
            scores = scores + mask
    if steps is not None and band.lower is not None:
        inside = steps >= band.lower
        keep = inside if keep is None else keep & inside
    if steps is not None and band.upper is not None:
        inside = steps <= band.upper
        keep = inside if keep is None else keep & inside
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)

    if keys:
        top = scores.detach().amax(-1, keepdim=True)
        top = top.masked_fill(top == -math.inf, 0.0)
    else:
        top = scores.new_zeros(batch, heads, queries, 1)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    # Nothing is divided by zero, in the gradient neither.
    weights = weights / total.masked_fill(empty, 1.0)
    lse = None
    if rules.lse:
        lse = (top + total.log()).squeeze(-1)
    signed = None
    if rules.dropout_p > 0.0:
        stays = torch.empty_like(weights).bernoulli_(1.0 - rules.dropout_p).bool()
        signed = torch.where(stays, weights, -weights)
        weights = weights * stays / (1.0 - rules.dropout_p)
    out = torch.bmm(weights.reshape(batch * kv_heads, rows, keys), value)
    return Result(out.view(batch, heads, queries, value.shape[-1]), lse, signed)


def _part(mask: Tensor | None, first: int, last: int, begin: int, end: int) -> Tensor | None:
    """The rows and columns of a mask that may be broadcast over either."""
    if mask is None:
        return None
    if mask.shape[-2] != 1:
        mask = mask[..., first:last, :]
    return mask if mask.shape[-1] == 1 else mask[..., begin:end]


def _moved(band: Band, first: int, begin: int) -> Band:
    """A band, seen from query ``first`` and key ``begin``."""
    by = first - begin
    lower, upper = band
    return Band(None if lower is None else lower + by, None if upper is None else upper + by)
