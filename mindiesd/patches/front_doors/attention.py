"""One attention call as the doors mean it: on the fused kernel, or composed where it has none.

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

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.attention import attend, check_dimensions
from mindiesd.ops.masks import Band
from mindiesd.ops.varlen import (
    Lengths,
    alibi,
    attention_forward_varlen,
    lengths_of,
    numbers,
    starts_of,
)
from mindiesd.patches import law
from mindiesd.patches.scope import Site

CAPPED = "computed natively: no kernel caps scores"
DROPPED = "computed natively: dropout"
GRADIENTS = "computed natively: " + law.GRADIENTS
WANTS_LSE = "computed natively: the log-sum-exp is asked for"

_any_autocast = law.context()[2]

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


def dense(
    site: Site,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Rules,
    mask: Tensor | None = None,
    band: Band | None = None,
    head_first: bool = False,
) -> Result:
    """Attention over sequences of one length.

    Args:
        site: where the call is counted.
        q: [B, Sq, N, D], or [B, N, Sq, D] with ``head_first``; so is the result.
        k: [B, Sk, Nkv, D] likewise.
        v: [B, Sk, Nkv, Dv] likewise.
        rules: what is done to the scores.
        mask: bool (True attends) or floating (added), broadcastable to [B, N, Sq, Sk].
        band: further limits on the diagonals.
        head_first: whether heads come before the sequence.
    """
    if _any_autocast() and torch.is_autocast_enabled(q.device.type):
        # It has no say in what these functions compute in.
        with torch.autocast(q.device.type, enabled=False):
            return dense(site, q, k, v, rules, mask, band, head_first)
    sequence, head = (2, 1) if head_first else (1, 2)
    queries, keys = q.shape[sequence], k.shape[sequence]
    if rules.left >= 0 or rules.right >= 0:
        window = Band.window(rules.left, rules.right, queries, keys)
        band = window if band is None else band.intersect(window)
    if site.takes(unfused(rules, q, k, v, mask)):
        if rules.slopes is not None:  # no API has both
            slopes = rules.slopes.detach().expand(q.shape[0], q.shape[head])
            mask = alibi(slopes, queries, keys, q.dtype)
        out = attend(q, k, v, mask, rules.scale, band=band, head_first=head_first)
        return Result(out.contiguous())
    if not head_first:
        return composed(q, k, v, rules, mask, band)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    found = composed(q, k, v, rules, mask, band)
    return found._replace(out=found.out.transpose(1, 2).contiguous())


def packed(
    site: Site,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    rules: Rules,
) -> Result:
    """Attention over packed sequences, in one kernel or composed a sequence at a time.

    Args:
        site: where the call is counted.
        q: [Tq, N, D].
        k: [Tk, Nkv, D].
        v: [Tk, Nkv, Dv].
        cu_seqlens_q: where each query sequence begins, and Tq.
        cu_seqlens_k: the same for keys.
        max_seqlen_q: an upper bound of the query lengths.
        max_seqlen_k: an upper bound of the key lengths.
        rules: what is done to the scores.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    if _any_autocast() and torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            return packed(site, q, k, v, *lengths, rules)
    if site.takes(unfused(rules, q, k, v)):
        slopes = None if rules.slopes is None else rules.slopes.detach()
        out = attention_forward_varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=rules.scale,
            window_size=(rules.left, rules.right),
            alibi_slopes=slopes,
        )
        return Result(out)
    checks.tensor("q", q, 3)
    for name, other in (("k", k), ("v", v)):
        checks.tensor(name, other, 3)
        checks.same_kind(name, other, "q", q)
    check_dimensions(q, k, v, ("q", "k", "v"), sequence=0, head=1)
    starts_q = _host("cu_seqlens_q", cu_seqlens_q)
    starts_k = _host("cu_seqlens_k", cu_seqlens_k)
    batch = len(lengths_of("cu_seqlens_q", starts_q, q.shape[0], max_seqlen_q))
    if len(lengths_of("cu_seqlens_k", starts_k, k.shape[0], max_seqlen_k)) != batch:
        raise ParametersInvalid(
            "cu_seqlens_k", f"{len(starts_k)} entries", f"{batch + 1}, as in cu_seqlens_q"
        )
    check_slopes(rules.slopes, batch, q.shape[1], "q", q)
    parts = []
    for at in range(len(starts_q) - 1):
        rows = slice(starts_q[at], starts_q[at + 1])
        columns = slice(starts_k[at], starts_k[at + 1])
        own = rules
        if rules.slopes is not None and rules.slopes.dim() == 2:
            own = rules._replace(slopes=rules.slopes[at])
        parts.append(
            composed(q[rows].unsqueeze(0), k[columns].unsqueeze(0), v[columns].unsqueeze(0), own)
        )
    if not parts:  # no sequences: the empty tensors of the right shape
        nothing = rules._replace(slopes=None)
        parts = [composed(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), nothing)]
    out = torch.cat([part.out.squeeze(0) for part in parts])
    lse = None
    if rules.lse:
        lse = torch.cat([part.lse.squeeze(0) for part in parts if part.lse is not None], dim=-1)
    weights = None
    if rules.dropout_p > 0.0:
        # As upstream: one square for each sequence, with nothing outside of it.
        shape = [
            max(part.weights.shape[dim] for part in parts if part.weights is not None)
            for dim in (2, 3)
        ]
        weights = q.new_zeros(len(parts), q.shape[1], *shape)
        for at, part in enumerate(parts):
            if part.weights is not None:
                weights[at, :, : part.weights.shape[2], : part.weights.shape[3]] = part.weights[0]
    return Result(out, lse, weights)


def _host(name: str, cu_seqlens: Lengths) -> list[int]:
    starts = starts_of(name, cu_seqlens)
    return starts if isinstance(starts, list) else numbers(starts)


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


def rules_of(
    softmax_scale: object,
    causal: object,
    window_size: object,
    softcap: object = 0.0,
    alibi_slopes: object = None,
    dropout_p: object = 0.0,
    lse: object = False,
    lse_name: str = "return_attn_probs",
) -> Rules:
    """The checked arguments that every function of flash_attn has.

    Raises:
        ParametersInvalid: one of them is wrong.
    """
    left, right = -1, -1
    if window_size.__class__ is not tuple or window_size != (-1, -1):
        left, right = _window(window_size)
    if causal is not False and checks.boolean("causal", causal):
        right = 0
    slopes = None
    if alibi_slopes is not None:
        slopes = checks.tensor("alibi_slopes", alibi_slopes, (1, 2))
    p, cap = 0.0, 0.0
    if dropout_p.__class__ is not float or dropout_p != 0.0:
        p = checks.real("dropout_p", dropout_p, 0.0, 1.0)
        if p == 1.0:
            raise ParametersInvalid("dropout_p", dropout_p, "a probability below 1")
    if softcap.__class__ is not float or softcap != 0.0:
        cap = max(0.0, float(checks.real("softcap", softcap)))
    if lse is not False:
        checks.boolean(lse_name, lse)
    scale = None if softmax_scale is None else checks.real("softmax_scale", softmax_scale)
    return Rules(scale, left, right, cap, slopes, p, bool(lse))


def _window(window_size: object) -> tuple[int, int]:
    """(left, right), each -1 where it is unlimited, which any negative number says."""
    allowed = "a pair of ints (left, right), -1 for unlimited"
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise ParametersInvalid("window_size", checks.describe(window_size), allowed)
    for side in window_size:
        if not isinstance(side, int) or isinstance(side, bool):
            raise ParametersInvalid("window_size", checks.describe(window_size), allowed)
    return max(-1, window_size[0]), max(-1, window_size[1])


def check_slopes(slopes: Tensor | None, batch: int, heads: int, name: str, q: Tensor) -> None:
    """ALiBi slopes fit the batch and heads of a call, and are on its device."""
    if slopes is None:
        return
    checks.same_device("alibi_slopes", slopes, name, q)
    if slopes.shape not in ((heads,), (batch, heads)):
        raise ParametersInvalid(
            "alibi_slopes",
            checks.describe(slopes),
            f"shape [N] = [{heads}] or [B, N] = [{batch}, {heads}]",
        )
