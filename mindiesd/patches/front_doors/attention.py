"""One attention call as the doors mean it: on the fused kernel, or composed where it has none."""

from __future__ import annotations

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
from mindiesd.patches.front_doors.composed import Result, Rules, composed, unfused
from mindiesd.patches.scope import Site

_any_autocast = law.context()[2]


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
