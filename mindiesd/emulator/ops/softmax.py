"""The attention itself: computed in float32, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

# Scores held at a time; larger calls go by batch, head and rows.
_SCORES = 1 << 24


class Attended:
    """What one attention gives: the output and the statistics of the softmax.

    Attributes:
        out: [B, N, Sq, Dv], float32.
        maximum: [B, N, Sq], the largest score of the row.
        total: [B, N, Sq], the sum of exp(score - maximum).
    """

    __slots__ = ("maximum", "out", "total")

    def __init__(self, out: Tensor, maximum: Tensor, total: Tensor) -> None:
        """Hold the three tensors."""
        self.out = out
        self.maximum = maximum
        self.total = total

    @property
    def lse(self) -> Tensor:
        """log(sum(exp(scores)))."""
        return self.maximum + self.total.log()


def _rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    before: Tensor | None,
    after: Tensor | None,
    masked: Tensor | None,
    zero_empty_rows: bool,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = q @ k.transpose(-1, -2)
    if before is not None:
        # A score that is not finite gives NaN on the device (llama.cpp-omni #89).
        bias = before.float()
        scores = (scores + bias) * scale
        scores = scores.masked_fill(~bias.isfinite().all(-1, keepdim=True), torch.nan)
    else:
        scores = scores * scale
    if after is not None:
        bias = after.float()
        scores = (scores + bias).masked_fill(~bias.isfinite().all(-1, keepdim=True), torch.nan)
    if masked is not None:
        # A large negative number, not -inf: a row that is all masked comes out as the mean of v.
        scores = scores.masked_fill(masked, torch.finfo(torch.float32).min)
    maximum = scores.amax(-1, keepdim=True)
    if sink is not None:
        maximum = torch.maximum(maximum, sink)
    weights = (scores - maximum).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - maximum).exp()
    out = (weights @ v) / total
    if zero_empty_rows and masked is not None:
        out = out.masked_fill(masked.expand(scores.shape).all(-1, keepdim=True), 0.0)
    return out, maximum.squeeze(-1), total.squeeze(-1)


def _part(tensor: Tensor | None, b: int, n: slice, rows: slice) -> Tensor | None:
    """The part of a broadcastable [B, N, Sq, Skv] tensor that one chunk needs."""
    if tensor is None:
        return None
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    picked = tensor[b if tensor.shape[0] > 1 else 0]
    if picked.shape[0] > 1:
        picked = picked[n]
    return picked[:, rows] if picked.shape[1] > 1 else picked


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    before: Tensor | None = None,
    after: Tensor | None = None,
    masked: Tensor | None = None,
    zero_empty_rows: bool = False,
    sink: Tensor | None = None,
) -> Attended:
    """softmax(scale * (q k^T + before) + after) v over [B, N, S, D] tensors, in float32.

    Args:
        q: [B, N, Sq, D].
        k: [B, Nkv, Skv, D]; N is a multiple of Nkv.
        v: [B, Nkv, Skv, Dv].
        scale: of the scores.
        before: bias added before the scale.
        after: bias added after the scale.
        masked: True where a score is masked out.
        zero_empty_rows: a row that is all masked gives 0, else the mean of v.
        sink: [N], one more logit per head that has no value.
    """
    batch, heads, sq, _ = q.shape
    skv = k.shape[2]
    group = heads // k.shape[1]
    out = q.new_empty((batch, heads, sq, v.shape[3]), dtype=torch.float32)
    maximum = q.new_empty((batch, heads, sq), dtype=torch.float32)
    total = q.new_empty((batch, heads, sq), dtype=torch.float32)
    if q.is_meta:
        return Attended(out, maximum, total)
    many = max(1, min(heads, _SCORES // max(sq * skv, 1)))
    step = sq if many > 1 else max(1, min(sq, _SCORES // max(skv, 1)))
    for b in range(batch):
        for first in range(0, heads, many):
            n = slice(first, min(first + many, heads))
            of = torch.arange(n.start, n.stop) // group
            kf, vf = k[b, of].float(), v[b, of].float()
            for start in range(0, sq, max(step, 1)):
                rows = slice(start, min(start + step, sq))
                out[b, n, rows], maximum[b, n, rows], total[b, n, rows] = _rows(
                    q[b, n, rows].float(),
                    kf,
                    vf,
                    scale,
                    _part(before, b, n, rows),
                    _part(after, b, n, rows),
                    _part(masked, b, n, rows),
                    zero_empty_rows,
                    None if sink is None else sink[n].float()[:, None, None],
                )
    return Attended(out, maximum, total)
