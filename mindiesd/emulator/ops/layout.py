"""Attention layouts: how heads, positions and batches lie in a tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from mindiesd.emulator.ops.check import require

RANK = {"BSH": 3, "SBH": 3, "BSND": 4, "BNSD": 4, "NBSD": 4, "TND": 3, "NTD": 3}


def to_bnsd(operator: str, name: str, tensor: Tensor, layout: str, heads: int) -> Tensor:
    """``tensor`` as [B, N, S, D], a view; TND becomes one batch, [1, N, T, D].

    Args:
        operator: for the error.
        name: of the argument, for the error.
        tensor: the argument.
        layout: one of :data:`RANK`.
        heads: N, which only BSH and SBH need; the others must agree with it.
    """
    rank = RANK[layout]
    require(
        tensor.dim() == rank,
        operator,
        f"{name} must have {rank} dimensions in layout {layout}, got {tensor.dim()}",
    )
    if layout in ("BSH", "SBH"):
        width = tensor.shape[2]
        require(heads > 0, operator, f"head number must be positive, got {heads}")
        require(width % heads == 0, operator, f"{name}: H={width} is not a multiple of N={heads}")
        split = torch.unflatten(tensor, 2, (heads, width // heads))
        return split.permute(0, 2, 1, 3) if layout == "BSH" else split.permute(1, 2, 0, 3)
    if layout == "BSND":
        result = tensor.permute(0, 2, 1, 3)
    elif layout == "BNSD":
        result = tensor
    elif layout == "NBSD":
        result = tensor.permute(1, 0, 2, 3)
    elif layout == "TND":
        result = tensor.permute(1, 0, 2).unsqueeze(0)
    else:
        result = tensor.unsqueeze(0)
    require(
        result.shape[1] == heads,
        operator,
        f"{name} has {result.shape[1]} heads in layout {layout}, but the head number says {heads}",
    )
    return result


def from_bnsd(tensor: Tensor, layout: str) -> Tensor:
    """The opposite of :func:`to_bnsd`."""
    if layout == "BSH":
        return tensor.permute(0, 2, 1, 3).flatten(2)
    if layout == "SBH":
        return tensor.permute(2, 0, 1, 3).flatten(2)
    if layout == "BSND":
        return tensor.permute(0, 2, 1, 3)
    if layout == "BNSD":
        return tensor
    if layout == "NBSD":
        return tensor.permute(1, 0, 2, 3)
    if layout == "TND":
        return tensor.squeeze(0).permute(1, 0, 2)
    return tensor.squeeze(0)


def heads_of(tensor: Tensor, layout: str, head_dim: int) -> int:
    """N of ``tensor``: read off, or for BSH and SBH computed from the head dimension."""
    axis = {"BSND": 2, "BNSD": 1, "NBSD": 0, "TND": 1, "NTD": 0}.get(layout)
    if axis is None:
        return int(tensor.shape[2]) // max(head_dim, 1)
    return int(tensor.shape[axis]) if tensor.dim() > axis else 0
