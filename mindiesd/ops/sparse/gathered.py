"""Block-sparse attention by dense kernels: rows of blocks that keep equally many keys go together.

For every device, and for what its own block-sparse kernel does not take. The time falls with the
number of kept blocks, no score matrix is built that a dense kernel would not build, and only some
rows are gathered at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindiesd.ops.attention import attend
from mindiesd.ops.masks import Band
from mindiesd.ops.sparse.layout import operands
from mindiesd.ops.sparse.selection import BLOCK, Selection

# Bytes of keys and values that are gathered at a time.
_AT_ONCE = 64 << 20


def attention(
    query: Tensor, key: Tensor, value: Tensor, selection: Selection, scale: float, head_first: bool
) -> Tensor:
    """Attention over the selected blocks.

    Args:
        query: [B, N, Sq, D], or [B, Sq, N, D] unless ``head_first``.
        key: [B, Nkv, Skv, D] likewise.
        value: [B, Nkv, Skv, Dv] likewise.
        selection: which blocks.
        scale: factor on the scores.
        head_first: whether heads come before the sequence.

    Returns:
        Attention in the query's layout and dtype.
    """
    out, (q, k, v, result) = operands(query, key, value, head_first)
    heads, queries = q.shape[1:3]
    keys, shared = k.shape[2], heads // k.shape[1]
    keep = selection.keep
    order_q = _order(selection.order_q, queries, q.device)
    order_k = _order(selection.order_k, keys, k.device)

    rows_left, keys_left = queries % BLOCK, keys % BLOCK
    counts = keep.sum(-1) * BLOCK
    if keys_left:
        counts -= keep[..., -1] * (BLOCK - keys_left)
    # Rows alike in the number of queries, of keys, and of keys before their own block: one shape.
    kind = counts * 2
    if rows_left:
        kind[..., -1] += 1
    own = _before_own(selection, queries, keys) if selection.causal else None
    if own is not None:
        kind = kind * (keys + BLOCK + 1) + own
    for value_of in torch.unique(kind).tolist():
        members = (kind == value_of).nonzero()
        offset = None
        if own is not None:
            value_of, offset = divmod(value_of, keys + BLOCK + 1)
        length, ragged = divmod(value_of, 2)
        width = rows_left if ragged else BLOCK
        size = length * (k.shape[-1] + v.shape[-1]) * k.element_size()
        at_once = max(1, _AT_ONCE // max(1, size))
        for start in range(0, members.shape[0], at_once):
            b, n, row = members[start : start + at_once].unbind(-1)
            # As many entries in each row, so the flat list of kept blocks is a matrix of tokens.
            columns = keep[b, n, row].nonzero()[:, -1:]
            places = (columns * BLOCK + torch.arange(BLOCK, device=k.device)).view(-1)
            if keys_left:
                places = places[places < keys]
            tokens = order_k[places].view(-1, length)
            mine = row[:, None] * BLOCK + torch.arange(width, device=q.device)
            mine = order_q[mine.view(-1)].view(-1, width)
            b, n = b[:, None], n[:, None]
            rows = q[b, n, mine][:, None]
            packed = k[b, n // shared, tokens][:, None], v[b, n // shared, tokens][:, None]
            band = None
            if offset is not None and offset <= keys:
                band = Band(None, offset)
            part = attend(rows, *packed, scale=scale, band=band)
            result[b, n, mine] = part[:, 0]
    return out


def _order(order: Tensor | None, length: int, device: torch.device) -> Tensor:
    return torch.arange(length, device=device) if order is None else order


def _before_own(selection: Selection, queries: int, keys: int) -> Tensor:
    """[B, N, nq]: the kept keys before a row's own block; keys + BLOCK where that is not kept.

    A band of that offset is the causal flag: all blocks before the own one are seen whole.
    """
    rows, columns = selection.keep.shape[-2:]
    own = torch.arange(rows, device=selection.keep.device).clamp(max=columns - 1)
    index = own.expand(selection.keep.shape[:-1])[..., None]
    has = selection.keep.gather(-1, index)[..., 0]
    has &= torch.arange(rows, device=has.device) < columns
    before = (selection.keep.sum(-1) - 1) * BLOCK
    return torch.where(has, before, keys + BLOCK)
