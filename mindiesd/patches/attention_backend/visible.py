"""Which keys a query sees under flash-attention's causal flags, windows and padding masks."""

from __future__ import annotations

import torch
from torch import Tensor

from mindiesd.ops.masks import Band

Window = tuple[int, int]
"""(left, right): keys kept before and after the diagonal; -1 is unlimited."""

EVERYTHING: Window = (-1, -1)


def padding_mask(attn_mask: Tensor) -> Tensor:
    """A bool mask in any of the shapes the variable-length backends take, as [B, N, Sq, Skv].

    Args:
        attn_mask: bool, [Skv], [B, Skv], [B, Sq, Skv] or [B, N, Sq, Skv], each dimension but the
            last perhaps 1.
    """
    if attn_mask.dim() == 1:
        return attn_mask[None, None, None]
    if attn_mask.dim() == 2:
        return attn_mask[:, None, None]
    return attn_mask[:, None] if attn_mask.dim() == 3 else attn_mask


def visible(mask: Tensor | None, window: Window, queries: int, keys: Tensor) -> Tensor:
    """The keys each query sees, as a bool tensor [B, N, Sq, Skv], dimensions perhaps 1.

    It always has four dimensions: diffusers takes one of two for a mask of keys by batch where the
    numbers happen to fit.

    Key number p of the L keys that a sequence has, counted without the masked ones, is seen by
    query i when ``i + L - Sq - left <= p <= i + L - Sq + right``: the last query is level with the
    last key, as in ``flash_attn_varlen_func``.

    Args:
        mask: bool [B, N, Sq, Skv], dimensions but the last perhaps 1; or None.
        window: see :data:`Window`.
        queries: query length.
        keys: [B, Skv, Nkv, D], for its length and device.
    """
    if mask is None:
        length = keys.shape[1]
        return Band.window(*window, queries, length).matrix(queries, length, keys.device)[
            None, None
        ]
    present = mask.expand(-1, -1, -1, keys.shape[1]).amax((1, 2), keepdim=True)
    position = present.cumsum(-1) - 1
    rows = torch.arange(queries, device=keys.device)[:, None]
    middle = rows + present.sum(-1, keepdim=True) - queries
    left, right = window
    if left >= 0:
        mask = mask & (position >= middle - left)
    if right >= 0:
        mask = mask & (position <= middle + right)
    return mask
