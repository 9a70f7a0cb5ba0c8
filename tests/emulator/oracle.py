"""The formulas of the npu:: operators in float64, straight from their documentation."""

from __future__ import annotations

import math

import torch


def attention(q, k, v, scale, *, before=None, after=None, keep=None, empty="zero"):
    """softmax(scale * (q k^T + before) + after) v over [B, N, S, D]; keep is True where kept.

    Args:
        empty: what a row without any kept column gives: "zero" or "mean" (of v).
    """
    q, k, v = (t.double().cpu() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bnid,bnjd->bnij", q, k)
    if before is not None:
        scores = scores + before.double().cpu()
    scores = scores * scale
    if after is not None:
        scores = scores + after.double().cpu()
    if keep is None:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool)
    keep = keep.cpu().expand(scores.shape)
    weights = torch.where(keep, (scores - scores.amax(-1, keepdim=True)).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bnij,bnjd->bnid", weights / total.clamp_min(1e-300), v)
    alone = ~keep.any(-1)
    if empty == "mean":
        out = torch.where(alone[..., None], v.mean(2, keepdim=True), out)
    return out


def lse(q, k, scale):
    """log(sum(exp(scale * q k^T))) over [B, N, S, D]."""
    q, k = q.double().cpu(), k.double().cpu()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return torch.logsumexp(torch.einsum("bnid,bnjd->bnij", q, k) * scale, -1)


def top_left(sq, skv):
    """Keep j <= i."""
    return torch.tensor([[j <= i for j in range(skv)] for i in range(sq)])


def bottom_right(sq, skv):
    """Keep j <= i + Skv - Sq."""
    return torch.tensor([[j <= i + skv - sq for j in range(skv)] for i in range(sq)])


def band(sq, skv, pre, post, origin):
    """Keep origin - pre <= j - i <= origin + post."""
    return torch.tensor(
        [[origin - pre <= j - i <= origin + post for j in range(skv)] for i in range(sq)]
    )


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


def rotate_interleave(x):
    out = torch.empty_like(x)
    out[..., 0::2] = -x[..., 1::2]
    out[..., 1::2] = x[..., 0::2]
    return out


def rms(x, eps):
    x = x.double().cpu()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def layer(x, eps):
    x = x.double().cpu()
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
