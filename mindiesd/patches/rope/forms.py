"""The forms in which models keep rotary tables, brought into the one form that kernels take.

Every rotation of pairs (a, b) of channels, a complex product or a 2 x 2 matrix just as well, is

    out = x * cos + rot(x) * sin,    rot: (a, b) -> (-b, a)

with tables as wide as what is rotated, so a form only has to say what stands in them. Each function
gets x, the tensors that the model passes and one more fact, and returns cos and sin with as many
dimensions as x, or why it does not: then the original is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mindiesd.patches import law
from mindiesd.patches.rope.kept import Sources, Tables

FLOAT64 = "the original computes in float64"
TABLE_SHAPE = "tables are not of this input's shape"
TABLE_DEVICE = "tables on another device than the input"

HALF = (torch.bfloat16, torch.float16)
HALF_OR_SINGLE = (torch.float32, *HALF)
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}

Form = Callable[[Tensor, Sources, Any], Tables | str]


def full(
    *at: int | None, moves: bool = False, casts: bool = False, model_dtype: bool = False
) -> Form:
    """cos and sin as they are, with dimensions of 1 inserted.

    Args:
        at: where ``unsqueeze`` inserts them, in turn; None is the fact the call gives.
        moves: the original brings tables to x's device.
        casts: the original brings them to x's dtype.
        model_dtype: the original computes in the dtype of its operands, without a cast, so that
            wider tables would widen the result.
    """

    def form(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
        reason = _unfit(x, sources, moves)
        if reason is not None:
            return reason
        cos, sin = sources
        if cos.shape != sin.shape:
            return TABLE_SHAPE
        if cos.dtype is not sin.dtype or (
            model_dtype and torch.promote_types(x.dtype, cos.dtype) is not x.dtype
        ):
            return law.DTYPE
        for where in at:
            axis = fact if where is None else where
            if not -cos.dim() - 1 <= axis <= cos.dim():
                return TABLE_SHAPE
            cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
        return _placed(x, cos, sin, x.dtype if casts else cos.dtype)

    return form


def complex_numbers(at: int | None, double: bool = False) -> Form:
    """cos + i sin, one number a pair, with a dimension of 1 inserted (None: nowhere).

    Numbers of double precision are used in float32 where x is half precision: the one rounding at
    the end is the same. For float32 the original's float64 arithmetic is finer than ours.

    Args:
        at: where ``unsqueeze`` inserts the dimension.
        double: the original computes in float64 whatever the table is, where the device has it.
    """

    def form(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
        (table,) = sources
        if x.dtype not in HALF_OR_SINGLE or table.dtype not in REAL:
            return law.DTYPE
        fine = table.dtype is torch.complex128 or (double and x.device.type not in ("npu", "mps"))
        if fine and x.dtype is torch.float32:
            return FLOAT64
        if table.device != x.device:
            return TABLE_DEVICE
        pairs = torch.view_as_real(table.resolve_conj().resolve_neg()).to(torch.float32)
        cos, sin = _twice(pairs.movedim(-1, 0))
        if at is not None:
            cos, sin = cos.unsqueeze(at), sin.unsqueeze(at)
        return cos, sin

    return form


def matrices(casts: bool, moves: bool = False) -> Form:
    """One 2 x 2 matrix a pair, [[cos, -sin], [sin, cos]], in the last two dimensions.

    Every element is used for what it is, so that the matrix need not be a rotation.

    Args:
        casts: the original casts the matrices to float32.
        moves: the original brings them to x's device.
    """

    def form(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
        (table,) = sources
        if x.dtype not in HALF_OR_SINGLE or not (
            table.dtype in HALF_OR_SINGLE or (casts and table.dtype is torch.float64)
        ):
            return law.DTYPE
        if table.device != x.device and not moves:
            return TABLE_DEVICE
        if table.dim() < 3 or table.shape[-2:] != (2, 2):
            return TABLE_SHAPE
        if casts:
            table = table.to(torch.float32)
        diagonal = torch.diagonal(table, 0, -2, -1).flatten(-2)
        other = torch.stack((-table[..., 0, 1], table[..., 1, 0]), -1).flatten(-2)
        return _placed(x, diagonal, other, table.dtype)

    return form


def joined(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
    """[B, S, 2 D], cosines and sines side by side, of which every second number is used."""
    reason = _unfit(x, sources, moves=False)
    if reason is not None:
        return reason
    (table,) = sources
    width = x.shape[-1]
    if table.dim() != 3 or table.shape[-1] != 2 * width or width % 2:
        return TABLE_SHAPE
    cos, sin = _twice(torch.stack((table[..., :width:2], table[..., width + 1 :: 2])))
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def split_heads(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
    """cos and sin [B, N, S, D / 2], one table a head, for x [B, S, N * D]: [B, S, N, D] each."""
    reason = _unfit(x, sources, moves=False)
    if reason is not None:
        return reason
    cos, sin = sources
    if cos.shape != sin.shape or cos.dtype is not sin.dtype:
        return TABLE_SHAPE
    if x.dim() != 3 or cos.dim() != 4:
        return TABLE_SHAPE
    batch, heads, length, half = cos.shape
    if x.shape != (batch, length, heads * 2 * half):
        return TABLE_SHAPE
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    return torch.cat((cos, cos), -1).contiguous(), torch.cat((sin, sin), -1).contiguous()


def half_repeated(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
    """cos and sin [B, S, R] with halves that repeat, for neighbouring pairs; model dtype."""
    reason = _unfit(x, sources, moves=False)
    if reason is not None:
        return reason
    cos, sin = sources
    if cos.shape != sin.shape or not -cos.dim() - 1 <= fact <= cos.dim() or not cos.dim():
        return TABLE_SHAPE
    if cos.dtype is not sin.dtype or torch.promote_types(x.dtype, cos.dtype) is not x.dtype:
        return law.DTYPE
    half = cos.shape[-1] // 2
    cos, sin = cos.unsqueeze(fact), sin.unsqueeze(fact)
    cos, sin = _twice(torch.stack((cos[..., :half], sin[..., :half])))
    return cos, sin


def angles(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
    """Angles [S', R] of which the last S count, S being the third dimension of x from the end."""
    reason = _unfit(x, sources, moves=False)
    if reason is not None:
        return reason
    (table,) = sources
    if table.dim() != 2 or x.dim() < 3 or table.shape[0] < x.shape[-3]:
        return TABLE_SHAPE
    table = table[-x.shape[-3] :].float().unsqueeze(1)
    return table.cos(), table.sin()


def three_axes(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
    """Tables of time, height and width and the positions at which to read them.

    Three pairs of cos and sin [P, D / 3], then three tensors of positions [B, S]. x [B, N, S, D] is
    three thirds, each rotated by halves. The tables come out as [B, 1, 3 S, D / 3]: seen as
    [B, N, 3 S, D / 3], x is rotated as a whole.
    """
    tables, positions = sources[:6], sources[6:]
    reason = _unfit(x, tables, moves=False)
    if reason is not None:
        return reason
    if x.dim() != 4 or x.shape[3] % 6:
        return TABLE_SHAPE
    batch, length, third = positions[0].shape[0], x.shape[2], x.shape[3] // 3
    for place in positions:
        if place.device != x.device or place.dtype not in (torch.int64, torch.int32):
            return TABLE_DEVICE if place.device != x.device else law.DTYPE
        if place.shape != (batch, length):
            return TABLE_SHAPE
    dtype = tables[0].dtype
    if any(table.dim() != 2 or table.shape[1] != third for table in tables):
        return TABLE_SHAPE
    if any(table.dtype is not dtype for table in tables):
        return law.DTYPE
    cos, sin = (
        torch.stack(
            [
                torch.embedding(table, place)
                for table, place in zip(tables[first::2], positions, strict=True)
            ],
            2,
        ).view(batch, 1, 3 * length, third)
        for first in (0, 1)
    )
    return cos, sin


def fits(x: Tensor, tables: Tables, partial: bool) -> bool:
    """Whether x keeps its shape when it is rotated by these tables.

    Args:
        x: what is rotated.
        tables: cos and sin of one shape.
        partial: whether they may be narrower than x, whose last channels then stay as they are.
    """
    size, table = x.shape, tables[0].shape
    if len(table) > len(size) or not table:
        return False
    width = table[-1]
    if width % 2 or not (width == size[-1] or (partial and 0 < width < size[-1])):
        return False
    # From the right: the table may lack leading dimensions.
    return all(
        have == 1 or have == whole
        for have, whole in zip(table[-2::-1], size[-2::-1], strict=False)
    )


def _unfit(x: Tensor, sources: Sources, moves: bool) -> str | None:
    """What is wrong with dtypes and devices; None if nothing is."""
    if x.dtype not in HALF_OR_SINGLE:
        return law.DTYPE
    for source in sources:
        if source.dtype not in HALF_OR_SINGLE:
            return law.DTYPE
        if source.device != x.device and not moves:
            return TABLE_DEVICE
    return None


def _placed(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tables:
    return cos.to(x.device, dtype), sin.to(x.device, dtype)


def _twice(halves: Tensor) -> Tables:
    """cos and sin, [2, ..., D / 2], with every number twice in a row; one kernel for both."""
    wide = halves.unsqueeze(-1).expand(*halves.shape, 2).flatten(-2)
    return wide[0], wide[1]
