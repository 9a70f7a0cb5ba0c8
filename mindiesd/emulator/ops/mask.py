"""What ``atten_mask``, ``sparse_mode`` and the token windows of the attention operators mean.

1 or True in ``atten_mask`` means *masked out*. Rows are i, columns j (op-plugin,
npu_fusion_attention.md, "sparse_mode"):

== ================ ============================== =============================================
0  default          full mask                      mask, and the band i - pre <= j <= i + next
1  allMask          full mask                      mask alone
2  leftUpCausal     2048 x 2048 upper triangle     j <= i
3  rightDownCausal  2048 x 2048 upper triangle     j <= i + Skv - Sq
4  band             2048 x 2048 upper triangle     -pre <= j - i - (Skv - Sq) <= next
5  prefix           full mask                      as 3, or j < prefix[b]
6  prefix           3072 x 2048 compressed         as 5
== ================ ============================== =============================================

``atten_mask=None`` makes the mode and the windows ineffective: full attention. The compressed masks
are compared with what they must be, because the device would silently use another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindiesd.emulator.ops.check import INT_MAX, require

_SIDE = 2048


def is_upper_triangle(mask: Tensor) -> bool:
    """Whether ``mask`` is ``triu(ones, diagonal=1)``; one without values is taken for it."""
    if mask.is_meta:
        return True
    ones = torch.ones(mask.shape[-2:], dtype=torch.bool)
    return torch.equal(mask.bool().reshape(ones.shape), ones.triu(1))


def require_compressed(operator: str, mask: Tensor, mode: int, leading: int = 0) -> None:
    """Raise unless ``mask`` is the 2048 x 2048 mask of the modes 2, 3 and 4.

    Args:
        operator: for the error.
        mask: the argument.
        mode: for the error.
        leading: how many dimensions of 1 may stand in front.
    """
    shape = tuple(mask.shape)
    fits = shape[-2:] == (_SIDE, _SIDE) and len(shape) <= 2 + leading and set(shape[:-2]) <= {1}
    require(
        fits,
        operator,
        f"get unsupported atten_mask shape {shape}: sparse_mode {mode} needs ({_SIDE}, {_SIDE})",
    )
    require(
        is_upper_triangle(mask),
        operator,
        f"the compressed atten_mask of sparse_mode {mode} must be triu(ones, diagonal=1)",
    )


def band(
    sq: int, skv: int, pre: int, post: int, origin: int = 0, forbid_more: Tensor | None = None
) -> Tensor | None:
    """True where ``j`` lies outside ``i + origin - pre .. i + origin + post``; None if nowhere."""
    if pre >= INT_MAX and post >= INT_MAX:
        return forbid_more
    distance = torch.arange(skv)[None, :] - torch.arange(sq)[:, None] - origin
    out = (distance < -pre) | (distance > post)
    return out if forbid_more is None else out | forbid_more


def _prefix(operator: str, prefix: Sequence[int] | None, batch: int, sq: int, skv: int) -> Tensor:
    require(prefix is not None, operator, "sparse_mode 5 and 6 need prefix")
    assert prefix is not None
    require(
        len(prefix) == batch and batch <= 32,
        operator,
        f"prefix must have one number per batch, at most 32; got {len(prefix)} for {batch}",
    )
    least = max(skv - sq, 0)
    require(
        all(least <= number <= skv for number in prefix),
        operator,
        f"prefix {list(prefix)} must lie in {least}..{skv}",
    )
    causal = torch.ones(sq, skv, dtype=torch.bool).triu(skv - sq + 1)
    late = torch.arange(skv)[None, :] >= torch.tensor(list(prefix))[:, None]
    return (causal[None] & late[:, None, :])[:, None]


def masked_out(
    operator: str,
    mask: Tensor | None,
    mode: int,
    pre: int,
    post: int,
    sq: int,
    skv: int,
    batch: int,
    prefix: Sequence[int] | None = None,
    leading: int = 0,
) -> Tensor | None:
    """Which scores are masked out: bool, broadcastable to [B, N, Sq, Skv], or None for none.

    A full mask must already have a shape that the operator allows. Of a mask without values nothing
    but its presence is told.
    """
    if mask is None:
        return None
    if mask.is_meta and mode < 2:
        return mask.bool()
    if mode == 0:
        return band(sq, skv, pre, post, forbid_more=mask.bool())
    if mode == 1:
        return mask.bool()
    if mode in (2, 3, 4):
        require_compressed(operator, mask, mode, leading)
        if mask.is_meta:
            return mask
        if mode == 4:
            return band(sq, skv, pre, post, origin=skv - sq)
        return torch.ones(sq, skv, dtype=torch.bool).triu((skv - sq if mode == 3 else 0) + 1)
    if mode in (5, 6):
        rule = _prefix(operator, prefix, batch, sq, skv)
        if mode == 5:
            given = mask.bool().expand(batch, mask.shape[1] if mask.dim() == 4 else 1, sq, skv)
            require(
                torch.equal(given, rule.expand_as(given)),
                operator,
                "the atten_mask of sparse_mode 5 does not agree with prefix",
            )
        else:
            right = torch.zeros(1024, _SIDE, dtype=torch.bool)
            right[:, 1024:] = True
            whole = torch.cat([torch.ones(_SIDE, _SIDE, dtype=torch.bool).triu(1), right])
            require(
                mask.shape == whole.shape and torch.equal(mask.bool(), whole),
                operator,
                f"get unsupported atten_mask {tuple(mask.shape)}: sparse_mode 6 needs the "
                "(3072, 2048) compressed mask",
            )
        return rule
    require(False, operator, f"sparse_mode {mode} is not supported")
    return None
