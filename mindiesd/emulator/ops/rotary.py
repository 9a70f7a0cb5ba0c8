"""Rotary embeddings: ``npu_rotary_mul``, ``npu_apply_rotary_pos_emb``, ``npu_interleave_rope``.

Limits: op-plugin torch_npu-npu_rotary_mul.md, -npu_apply_rotary_pos_emb.md and
-npu_interleave_rope.md.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from mindiesd.emulator.ops import soc
from mindiesd.emulator.ops.check import FLOATS, Table, require, require_dtype

_Patterns: TypeAlias = tuple[tuple[int, ...], ...]

# Table shapes by layout of x, as which axes may be 1 (op-plugin, "r1"): 0 stands for a 1.
_HALF_4D: dict[str, _Patterns] = {
    "11SD, B1SD, BNSD": ((0, 0, 1, 1), (1, 0, 1, 1), (1, 1, 1, 1)),
    "1S1D, BS1D, BSND": ((0, 1, 0, 1), (1, 1, 0, 1), (1, 1, 1, 1)),
    "S11D, SB1D, SBND": ((1, 0, 0, 1), (1, 1, 0, 1), (1, 1, 1, 1)),
}
_HALF_3D: _Patterns = ((1, 0, 1), (1, 1, 1))
_INTERLEAVE_4D: _Patterns = ((0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 1))
_INTERLEAVE_3D: _Patterns = ((1, 0, 1),)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _rotate_interleave(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _matches(table: Tensor, x: Tensor, pattern: tuple[int, ...]) -> bool:
    return all(
        have == (full if kept else 1)
        for have, full, kept in zip(table.shape, x.shape, pattern, strict=True)
    )


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """x * r1 + rot(x) * r2, in x's dtype.

    - x is 3-D (TND) or 4-D, D even and below 896; B, N < 1000 ("interleave": B * N < 1000);
    - half: tables 11SD, B1SD, BNSD, 1S1D, BS1D, BSND, S11D, SB1D, SBND; T1D, TND;
      interleave: 11SD, 1S1D, S11D; T1D; not on the 310P;
    - tables of another dtype are cast **to x's dtype** first (op-plugin), and lose what that loses;
    - ``rotate``, a [D, D] matrix: rot(x) = x @ rotate.
    """
    operator = "npu_rotary_mul"
    require_dtype(operator, "input", input, FLOATS)
    for name, table in (("r1", r1), ("r2", r2)):
        require_dtype(operator, name, table, FLOATS)
    require(r1.shape == r2.shape, operator, f"r1 {tuple(r1.shape)} and r2 {tuple(r2.shape)} differ")
    require(rotary_mode in ("half", "interleave"), operator, f"rotary_mode {rotary_mode!r}")
    require(input.dim() in (3, 4), operator, f"input must be 3-D or 4-D, got {input.dim()}-D")
    require(r1.dim() == input.dim(), operator, f"r1 has {r1.dim()} dimensions, input {input.dim()}")
    dim = input.shape[-1]
    require(0 < dim < 896 and dim % 2 == 0, operator, f"head_dim must be even and < 896, got {dim}")
    if rotary_mode == "half":
        if input.dim() == 4:
            patterns = [pattern for group in _HALF_4D.values() for pattern in group]
        else:
            patterns = list(_HALF_3D)
        small = sorted(input.shape[:-1])[:-1]
        require(
            all(size < 1000 for size in small),
            operator,
            f"B and N must be below 1000, got {tuple(input.shape)}",
        )
    else:
        require(not soc.is_310p(), operator, "rotary_mode interleave is not supported on 310P")
        patterns = list(_INTERLEAVE_4D if input.dim() == 4 else _INTERLEAVE_3D)
    fitting = [pattern for pattern in patterns if _matches(r1, input, pattern)]
    require(
        bool(fitting),
        operator,
        f"r1 {tuple(r1.shape)} does not go with input {tuple(input.shape)} in mode {rotary_mode}",
    )
    if rotary_mode == "interleave":
        rest = 1
        # Every axis of x that the table does not have is one of B and N.
        for size, kept in zip(input.shape, fitting[0], strict=True):
            rest *= 1 if kept else size
        require(rest < 1000, operator, f"B * N must be below 1000, got {rest}")
    x = input.float()
    cos, sin = (table.to(input.dtype).float() for table in (r1, r2))
    if rotate is not None:
        require(tuple(rotate.shape) == (dim, dim), operator, f"rotate must have shape {(dim, dim)}")
        turned = x @ rotate.float()
    else:
        turned = _rotate_half(x) if rotary_mode == "half" else _rotate_interleave(x)
    return (x * cos + turned * sin).to(input.dtype)


def npu_apply_rotary_pos_emb(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: str = "BSND",
    rotary_mode: str = "half",
) -> tuple[Tensor, Tensor]:
    """Rotates q and k **in place** and returns them.

    BSND with tables [B, S, 1, D], or TND with [T, 1, D]; D 64 or 128; one dtype; half only (A2,
    A3).
    """
    operator = "npu_apply_rotary_pos_emb"
    soc.refuse_310p(operator)
    for name, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        require_dtype(operator, name, tensor, FLOATS)
        require(tensor.dtype == query.dtype, operator, f"{name} must be {query.dtype}")
    require(layout in ("BSND", "TND"), operator, f"layout {layout!r} is not BSND or TND")
    require(rotary_mode == "half", operator, f"rotary_mode {rotary_mode!r}: only half on A2 and A3")
    rank = 3 if layout == "TND" else 4
    require(query.dim() == rank and key.dim() == rank, operator, f"q and k must be {rank}-D")
    dim = query.shape[-1]
    require(dim in (64, 128) and key.shape[-1] == dim, operator, f"head_dim 64 or 128, got {dim}")
    table = (*query.shape[:-2], 1, dim)
    require(
        tuple(cos.shape) == table and tuple(sin.shape) == table,
        operator,
        f"cos and sin must have shape {table}, got {tuple(cos.shape)}, {tuple(sin.shape)}",
    )
    require(
        key.shape[:-2] == query.shape[:-2], operator, "query and key must share batch and length"
    )
    for tensor in (query, key):
        x = tensor.float()
        tensor.copy_((x * cos.float() + _rotate_half(x) * sin.float()).to(tensor.dtype))
    return query, key


def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """De-interleaves x, then rotates its halves: the output is in half order. D is 64.

    x [B, N, S, 64]; cos and sin [B, 1, S, 64] or [B, 1, 1, 64]; float16 or bfloat16.
    """
    operator = "npu_interleave_rope"
    soc.refuse_310p(operator)
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        require_dtype(operator, name, tensor, (torch.float16, torch.bfloat16))
        require(tensor.dtype == x.dtype and tensor.dim() == 4, operator, f"{name} must be 4-D")
    require(x.shape[3] == 64, operator, f"head_dim must be 64, got {x.shape[3]}")
    batch, _, length, dim = x.shape
    allowed = {(batch, 1, length, dim), (batch, 1, 1, dim)}
    require(
        tuple(cos.shape) in allowed and cos.shape == sin.shape,
        operator,
        f"cos and sin must have shape {sorted(allowed)}, got {tuple(cos.shape)}",
    )
    halves = torch.cat([x[..., ::2], x[..., 1::2]], -1).float()
    return (halves * cos.float() + _rotate_half(halves) * sin.float()).to(x.dtype)


def npu_rotary_mul_backward(
    grad: Tensor, input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half"
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`npu_rotary_mul` for x and both tables."""
    g, x = grad.float(), input.float()
    sine = g * r2.float().expand_as(g)
    if rotary_mode == "half":
        turned = _rotate_half(x)
        back = -_rotate_half(sine)
    else:
        turned = _rotate_interleave(x)
        back = -_rotate_interleave(sine)
    dx = g * r1.float() + back
    return (
        dx.to(input.dtype),
        (g * x).sum_to_size(r1.shape).to(r1.dtype),
        (g * turned).sum_to_size(r2.shape).to(r2.dtype),
    )


TABLE: Table = {
    "npu_rotary_mul": npu_rotary_mul,
    "npu_rotary_mul_backward": npu_rotary_mul_backward,
    "npu_apply_rotary_pos_emb": npu_apply_rotary_pos_emb,
    "npu_interleave_rope": npu_interleave_rope,
}
