"""``ada_bsa``: blocks chosen by a strided estimate of the attention itself.

1. *Estimate.* Eight consecutive tokens are a group. With Q̃_g the queries of group g in reverse and
   K̃_h the keys of group h, ``<Q̃_g, K̃_h>`` sums an antidiagonal of the 8 x 8 scores, which every
   vertical or slanted line of large scores crosses. ``P = softmax over h of scale / 8 * Q̃ K̃ᵀ``, and
   the score of a block is the sum of P over its groups.
2. *Selection*, per row of blocks: the sink (the first key block) and the recent one (the last that
   the row may see) where they are to be kept, then the others by descending score, until the share
   ``cdf_threshold`` of the row's total is reached or ``ceil(n * (1 - sparsity))`` blocks are kept.
   n counts the blocks the row may see: with a causal flag, those up to its own. At least half of
   that number goes by score, so that in a short sequence the sink and the recent one are not all.

Sources: XAttention, arXiv 2503.16428 (the estimate).

A row of P costs as much for a long sequence as for its neighbours, and neighbours agree: from
:data:`LONG` tokens on, four of the sixteen groups of a query block are estimated instead of all,
and the estimate costs 1.6 % of dense attention instead of 6.25 %.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mindiesd.ops.sparse import compiled
from mindiesd.ops.sparse.selection import BLOCK, STRIDE, Selection, blocks_of, kept
from mindiesd.ops.sparse.workers import WORKERS

GROUPS = BLOCK // STRIDE
# From this many keys on, every fourth query group stands for four.
LONG = 4096
_SAMPLED = tuple(range(1, GROUPS, 4))
# Query groups and key groups in one matrix product.
_ROWS, _COLUMNS = 128, 256


def select(
    query: Tensor,
    key: Tensor,
    scale: float,
    causal: bool,
    keep_sink: bool,
    keep_recent: bool,
    cdf_threshold: float,
    sparsity: float,
) -> Selection:
    """The blocks that ada_bsa keeps.

    Args:
        query: [B, N, Sq, D].
        key: [B, Nkv, Skv, D]; N is a multiple of Nkv.
        scale: factor on the scores.
        causal: query i sees the keys j <= i.
        keep_sink: always keep the first key block.
        keep_recent: always keep the last key block that the query block may see.
        cdf_threshold: share of the estimated attention that is enough, in [0, 1].
        sparsity: share of the key blocks to drop.
    """
    scores = estimate(query, key, scale, causal)
    return Selection(
        choose(scores, causal, keep_sink, keep_recent, cdf_threshold, sparsity), causal=causal
    )


def choose(
    scores: Tensor,
    causal: bool,
    keep_sink: bool,
    keep_recent: bool,
    cdf_threshold: float,
    sparsity: float,
) -> Tensor:
    """The selection of step 2: bool of the scores' shape.

    Args:
        scores: [B, N, nq, nk], not negative.
        causal: as for :func:`select`, and so are the others.
        keep_sink: likewise.
        keep_recent: likewise.
        cdf_threshold: likewise.
        sparsity: likewise.
    """
    rows, columns = scores.shape[-2:]
    seen = [min(row + 1, columns) if causal else columns for row in range(rows)]
    counts = {count: kept(count, sparsity) for count in set(seen)}
    device = scores.device
    last = torch.tensor(seen, device=device)[:, None] - 1
    most = torch.tensor([counts[count] for count in seen], device=device)[:, None]
    places = torch.arange(columns, device=device)
    forced = torch.zeros(rows, columns, dtype=torch.bool, device=device)
    if keep_sink:
        forced[:, :1] = True
    if keep_recent:
        forced |= places == last
    most = torch.maximum(most, forced.sum(-1, keepdim=True) + (most + 1) // 2)
    unseen = places > last
    ranked = scores.masked_fill(forced, math.inf).masked_fill(unseen, -math.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    taken = places < most
    if cdf_threshold < 1:
        mass = scores.masked_fill(unseen, 0.0).gather(-1, order)
        before = mass.cumsum(-1) - mass
        enough = cdf_threshold * mass.sum(-1, keepdim=True)
        taken = taken & ((before < enough) | (places == 0))
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep.scatter_(-1, order, taken.expand_as(order))
    return (keep | forced) & ~unseen


def estimate(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """The estimated attention between blocks, step 1.

    Args:
        query: [B, N, Sq, D].
        key: [B, Nkv, Skv, D].
        scale: factor on the scores.
        causal: a query group sees the key groups up to its own.

    Returns:
        [B, N, ceil(Sq / 128), ceil(Skv / 128)], float32 or better; each row of blocks that are
        whole sums up to the number of query groups looked at.
    """
    batch, heads, queries, _ = query.shape
    shared = heads // key.shape[1]
    groups = -(-queries // STRIDE)
    chosen = torch.arange(groups, device=query.device)
    if key.shape[2] >= LONG and queries >= BLOCK:
        sampled = torch.zeros(GROUPS, dtype=torch.bool, device="cpu")
        sampled[list(_SAMPLED)] = True
        wanted = sampled.repeat(blocks_of(queries))[:groups]
        # The last block may be too short to hold a sampled group.
        wanted[-1] |= groups % GROUPS == 1
        chosen = wanted.nonzero()[:, 0].to(query.device)
    if query.is_cpu and compiled.fits(query, key):
        return compiled.estimate(query, key, chosen, scale, causal)
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    shape = (batch, heads, blocks_of(queries), blocks_of(key.shape[2]))
    out = torch.zeros(shape, dtype=wide, device=query.device)

    # A task has blocks of its own: two would add to the same place.
    def add(task: tuple[int, int, Tensor]) -> None:
        b, n, some = task
        part = _rows(query[b, n], key[b, n // shared], some, scale, causal, wide)
        out[b, n].index_add_(0, some // GROUPS, part)

    parts = torch.split(chosen, _ROWS)
    WORKERS.each(((b, n, part) for b in range(batch) for n in range(heads) for part in parts), add)
    return out


def _rows(
    query: Tensor, key: Tensor, groups: Tensor, scale: float, causal: bool, wide: torch.dtype
) -> Tensor:
    """The block scores [len(groups), nk] of some query groups of one head."""
    rows, dim, width = groups.shape[0], query.shape[-1], STRIDE * query.shape[-1]
    backwards = torch.arange(STRIDE - 1, -1, -1, device=query.device)
    tokens = groups[:, None] * STRIDE + backwards
    short = query.shape[0] % STRIDE
    picked = query.index_select(0, tokens.clamp_(max=query.shape[0] - 1).view(-1)).to(wide)
    picked = picked.view(rows, STRIDE, dim)
    if short:
        # A last group of fewer tokens is filled up with zeros.
        outside = groups[:, None] * STRIDE + backwards >= query.shape[0]
        picked = picked.masked_fill(outside[..., None], 0.0)
    picked = picked.view(rows, width).mul_(scale / STRIDE)

    count = -(-key.shape[0] // STRIDE)
    whole = key.shape[0] // STRIDE
    scores = picked.new_zeros(rows, blocks_of(key.shape[0]) * GROUPS)
    for start in range(0, whole, _COLUMNS):
        stop = min(start + _COLUMNS, whole)
        part = key[start * STRIDE : stop * STRIDE].to(wide).reshape(-1, width)
        torch.mm(picked, part.t(), out=scores[:, start:stop])
    if whole != count:
        part = torch.nn.functional.pad(
            key[whole * STRIDE :].to(wide).reshape(-1), (0, -key.shape[0] % STRIDE * dim)
        )
        scores[:, whole] = picked @ part
    if causal:
        later = torch.arange(count, device=groups.device) > groups[:, None]
        scores[:, :count].masked_fill_(later, -math.inf)
    scores[:, :count] = torch.softmax(scores[:, :count], -1)
    return scores.view(rows, -1, GROUPS).sum(-1)
