"""Rotary position embedding by ``npu_rotary_mul``.

Limits: x of 3 or 4 dimensions, D even and below 896. ``half``: B and N below 1000, tables that are
1 wherever they are not full in the order of one of the layouts BNSD, BSND, SBND. ``interleave``:
B * N below 1000 and tables [1, 1, S, D], [1, S, 1, D] or [S, 1, 1, D] only; not on the 310P, where
D is also 128 and tables are as narrow in both modes.

Tables that also vary over batches or heads, and wider ones, are brought inside the limits of
``interleave`` by seeing x in another shape (:func:`folded`), which costs nothing where x is
contiguous.

The kernel casts tables to x's dtype: half precision with float32 tables is computed in float32
here, and rounded once. Its documentation assumes sines and cosines, numbers in [-1, 1]; scaled
tables (YaRN) go a little beyond. The kernel multiplies and adds, so they are not looked at, which
would need the device to be waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mindiesd.ops.backends import native
from mindiesd.ops.backends.npu import soc
from mindiesd.ops.backends.npu.call import frozen, turned
from mindiesd.ops.backends.npu.derived import derived

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST = 1000
_WIDEST = 896

# Dimensions of a table that are full (1) or 1 (0), for x in one of the three layouts.
_HALF_4D: dict[tuple[int, ...], str] = {
    (0, 0, 1): "BNSD",
    (1, 0, 1): "BNSD",
    (1, 1, 1): "BNSD",
    (0, 1, 0): "BSND",
    (1, 1, 0): "BSND",
    (1, 0, 0): "SBND",
}
_NARROW_4D = ((0, 0, 1), (0, 1, 0), (1, 0, 0))
_HALF_3D = ((1, 0), (1, 1))
_NARROW_3D = ((1, 0),)


def _patterns(shape: torch.Size, table: torch.Size) -> tuple[int, ...] | None:
    """Which leading dimensions of the table are full; None if it does not broadcast to x."""
    if len(shape) != len(table) or table[-1] != shape[-1]:
        return None
    pattern = []
    for have, full in zip(table[:-1], shape[:-1], strict=True):
        if have != full and have != 1:
            return None
        pattern.append(0 if have == 1 else 1)
    return tuple(pattern)


def refusal(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, series: str) -> str | None:
    """Why ``npu_rotary_mul`` is not for this call; None if it is.

    Args:
        x: what is rotated.
        cos: without dimensions that only repeat.
        sin: likewise.
        interleaved: neighbouring pairs instead of halves.
        series: of the device.
    """
    if series == soc.UNKNOWN:
        return "no table for this series of Ascend"
    if not all(tensor.dtype in _DTYPES for tensor in (x, cos, sin)):
        return "dtype is not float16, bfloat16 or float32"
    if x.numel() == 0:
        return "nothing to rotate"
    if x.dim() not in (3, 4) or cos.shape != sin.shape:
        return "not 3-D or 4-D, or tables of two shapes"
    dim = x.shape[-1]
    if dim % 2 or not 0 < dim < _WIDEST:
        return "head dimension is odd, or not below 896"
    small = series == soc.I310P
    if small and (interleaved or dim != 128 or x.dim() != 4 or x.dtype is torch.bfloat16):
        return "on the 310P: interleaved, not 4-D, D is not 128, or bfloat16"
    pattern = _patterns(x.shape, cos.shape)
    if pattern is None:
        return "tables do not broadcast to x"
    # A dimension of x that is 1 is full and 1 at once, so several patterns may fit.
    fits = [
        candidate
        for candidate in _allowed(x.dim(), interleaved or small)
        if all(
            kept == have or size == 1
            for kept, have, size in zip(candidate, pattern, x.shape[:-1], strict=True)
        )
    ]
    if not fits:
        return "table shape"
    if any(_small_enough(candidate, x.shape, interleaved) for candidate in fits):
        return None
    return "B or N is 1000 or more"


def _allowed(rank: int, narrow: bool) -> tuple[tuple[int, ...], ...]:
    if rank == 3:
        return _NARROW_3D if narrow else _HALF_3D
    return _NARROW_4D if narrow else tuple(_HALF_4D)


def _small_enough(pattern: tuple[int, ...], shape: torch.Size, interleaved: bool) -> bool:
    if interleaved:
        product = 1
        for size, kept in zip(shape[:-1], pattern, strict=True):
            product *= 1 if kept else size
        return product < _MOST
    if len(shape) == 3:
        return shape[1] < _MOST
    layout = _HALF_4D[pattern]
    if pattern == (1, 1, 1):
        # Full tables do not tell the layout: all but the longest dimension have to be small.
        return sorted(shape[:-1])[1] < _MOST
    if pattern == (1, 1, 0):
        # [B, S, 1, D] or [S, B, 1, D].
        return shape[2] < _MOST and min(shape[:2]) < _MOST
    return all(size < _MOST for size, axis in zip(shape, layout, strict=False) if axis in "BN")


def _narrowed(table: Tensor) -> Tensor:
    """The table without dimensions along which it only repeats itself (stride 0)."""
    if 0 in table.stride()[:-1]:
        for axis, (size, stride) in enumerate(
            zip(table.shape[:-1], table.stride()[:-1], strict=True)
        ):
            if stride == 0 and size > 1:
                table = table.narrow(axis, 0, 1)
    return table


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``x * cos + rot(x) * sin`` in float32 or better, rounded once, in x's dtype.

    Args:
        x: [..., D], D even.
        cos: broadcastable to x.
        sin: broadcastable to x.
        interleaved: rotate neighbours (0,1), (2,3), … instead of halves (0,D/2), (1,D/2+1), ….
    """
    while 2 <= cos.dim() < x.dim() and sin.dim() == cos.dim():
        cos, sin = cos[None], sin[None]
    cos, sin = _narrowed(cos), _narrowed(sin)
    series = soc.series()
    # A transposed view is rotated in the order of its memory. The other order may be inside the
    # limits where the first is not, and costs a copy.
    orders: tuple[bool, ...] = (False, True)
    if x.dim() != 4 or cos.dim() != 4 or sin.dim() != 4:
        orders = (False,)
    elif not x.is_contiguous() and turned(x):
        orders = (True, False)
    for swapped in orders:
        tables = (cos.transpose(1, 2), sin.transpose(1, 2)) if swapped else (cos, sin)
        x_in = x.transpose(1, 2) if swapped else x
        shape: tuple[int, ...] | None = x_in.shape
        if refusal(x_in, *tables, interleaved, series) is not None:
            shape = folded(x_in, *tables, interleaved, series)
        if shape is not None:
            out = _launch(x_in, *tables, interleaved, shape)
            return out.transpose(1, 2) if swapped else out
    return native.rotate(x, cos, sin, interleaved)


def folded(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, series: str
) -> tuple[int, int, int, int] | None:
    """The shape [B, S, N, D] in which x is inside the limits of ``interleave``; None if in none.

    Neighbouring dimensions along which the tables vary are one sequence to the kernel, and those
    before and after it, along which they do not, its batch and heads. Since pairs are neighbours, a
    last dimension that is too long is cut up in the same way: its parts are further positions.

    Args:
        x: what is rotated.
        cos: without dimensions that only repeat.
        sin: likewise.
        interleaved: neighbouring pairs instead of halves, for which there is no such shape.
        series: of the device.
    """
    if not interleaved or series in (soc.UNKNOWN, soc.I310P) or cos.shape != sin.shape:
        return None
    if not all(tensor.dtype in _DTYPES for tensor in (x, cos, sin)) or x.numel() == 0:
        return None
    pattern = _patterns(x.shape, cos.shape)
    if pattern is None or x.shape[-1] % 2:
        return None
    width = x.shape[-1]
    sizes, varies = [*x.shape[:-1]], [*pattern]
    if width >= _WIDEST:
        fitting = (part for part in range(_WIDEST - 2, 0, -2) if width % part == 0)
        part = next(fitting, 0)
        if not part:
            return None
        sizes.append(width // part)
        varies.append(1)
        width = part
    # Batch, sequence and heads: what stands before, within and after the run of varying dimensions.
    groups, at = [1, 1, 1], 0
    for size, kept in zip(sizes, varies, strict=True):
        if size == 1:
            continue
        if kept:
            if at == 2:
                return None
            at = 1
        elif at == 1:
            at = 2
        groups[at] *= size
    batch, length, heads = groups
    return (batch, length, heads, width) if batch * heads < _MOST else None


def _launch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, shape: tuple[int, ...]
) -> Tensor:
    """The kernel on x seen in a shape in which it is inside the limits."""
    dtype = x.dtype if x.dtype is cos.dtype is sin.dtype else torch.float32
    cos, sin = _in(cos, dtype), _in(sin, dtype)
    seen = x
    if shape != x.shape:
        seen = x.reshape(shape)
        table = (1, shape[1], 1, shape[3])
        cos, sin = cos.reshape(table), sin.reshape(table)
    mode = "interleave" if interleaved else "half"
    # Parts of a larger tensor are copied here: no strides are documented for the kernel.
    out: Tensor = torch.ops.npu.npu_rotary_mul(seen.to(dtype).contiguous(), cos, sin, mode)
    return out.to(x.dtype) if shape == x.shape else out.to(x.dtype).view(x.shape)


def _in(table: Tensor, dtype: torch.dtype) -> Tensor:
    """The table in a dtype and contiguous; kept with it, since every layer asks again."""
    if table.dtype is dtype and table.is_contiguous():
        return table
    return derived(
        frozen(table), table, ("table", dtype), lambda: table.to(dtype, copy=True).contiguous()
    )
