"""Rotary position embedding.

    out = x * cos + rot(x) * sin

``rotated_half``: rot(x) = [-x₂, x₁] with x = [x₁, x₂] cut in the middle. ``rotated_interleaved``:
rot(x) = (-x₁, x₀, -x₃, x₂, …). Source: Su et al., *RoFormer* (arXiv 2104.09864); the same numbers
as ``diffusers.models.embeddings.apply_rotary_emb`` with real tables.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.backends import backend_of, native

MODES = ("rotated_half", "rotated_interleaved")


def rotary_position_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotated_mode: str = "rotated_half",
    head_first: bool = False,
    fused: bool = True,
) -> Tensor:
    """Rotate the pairs of a query or key by its position.

    Computed in float32 (float64 if a tensor is), whatever the tables' dtype, and rounded once.

    Args:
        x: [B, S, N, D], [B, N, S, D] or [S, B, N, D]; floating, D even.
        cos: [S, D], or four dimensions that broadcast to x: [1, 1, S, D], [1, S, 1, D] or
            [S, 1, 1, D], and any with the batch of x. [S, B, N, D] inputs need four.
        sin: the same shape.
        rotated_mode: ``"rotated_half"`` or ``"rotated_interleaved"``.
        head_first: what two-dimensional tables mean: False is [B, S, N, D], True is [B, N, S, D].
        fused: True uses the best kernel of the device; False composes it of elementary ones.

    Returns:
        Shape and dtype of x.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    interleaved = rotated_mode == "rotated_interleaved"
    try:
        if (
            fused is not True
            or (head_first is not True and head_first is not False)
            or not (interleaved or rotated_mode == "rotated_half")
            or not _fit(x, cos, sin, head_first)
        ):
            # Slower, and exact about what is wrong; it may also find that nothing is.
            cos, sin = _checked(x, cos, sin, rotated_mode, head_first, fused)
        elif not head_first and cos.dim() == 2:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        if x.is_cpu or not fused:
            return native.rotate(x, cos, sin, interleaved)
        return backend_of(x).rotate(x, cos, sin, interleaved)
    except RuntimeError:
        # Sparse tensors only show when touched.
        _checked(x, cos, sin, rotated_mode, head_first, fused)
        raise


_FLOATING = frozenset(checks.FLOATING)


def _fit(x: Any, cos: Any, sin: Any, head_first: bool) -> bool:
    """Whether the tensors of a call are as they usually are, which is nearly always enough."""
    if not (isinstance(x, Tensor) and isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        return False
    if x.is_nested or cos.is_nested or sin.is_nested:
        return False
    shape, table = x.shape, cos.shape
    if len(shape) != 4 or shape[3] % 2 or sin.shape != table:
        return False
    if not (x.dtype in _FLOATING and cos.dtype in _FLOATING and sin.dtype in _FLOATING):
        return False
    if x.is_cpu:
        if not (cos.is_cpu and sin.is_cpu):
            return False
    else:
        device = x.device
        if cos.device != device or sin.device != device:
            return False
    first, second, third, dim = shape
    if len(table) == 2:
        return table[1] == dim and table[0] == (third if head_first else second)
    return (
        len(table) == 4
        and table[3] == dim
        and (table[0] == 1 or table[0] == first)
        and (table[1] == 1 or table[1] == second)
        and (table[2] == 1 or table[2] == third)
    )


def _checked(
    x: Tensor, cos: Tensor, sin: Tensor, rotated_mode: str, head_first: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    """Every rule of a call, each with its own message; the tables in four dimensions."""
    checks.tensor("x", x, 4)
    checks.choice("rotated_mode", rotated_mode, MODES)
    checks.boolean("head_first", head_first)
    checks.boolean("fused", fused)
    if x.shape[-1] % 2:
        raise ParametersInvalid("x", checks.describe(x), "an even last dimension")
    tables = _table("cos", cos, x, head_first), _table("sin", sin, x, head_first)
    if cos.shape != sin.shape:
        raise ParametersInvalid("sin", checks.describe(sin), f"the shape of cos, {[*cos.shape]}")
    return tables


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The rotation of arguments known to be right.

    Args:
        x: [..., D], D even.
        cos: broadcastable to x.
        sin: broadcastable to x.
        interleaved: neighbouring pairs instead of halves.
    """
    return backend_of(x).rotate(x, cos, sin, interleaved)


def _table(name: str, table: Tensor, x: Tensor, head_first: bool) -> Tensor:
    """A table as four dimensions that broadcast to x."""
    checks.tensor(name, table, (2, 4))
    checks.same_device(name, table, "x", x)
    if table.dim() == 2:
        sequence, layout = (2, "[B, N, S, D]") if head_first else (1, "[B, S, N, D]")
        expected = (x.shape[sequence], x.shape[3])
        if table.shape != expected:
            raise ParametersInvalid(
                name,
                checks.describe(table),
                f"[S, D] = {list(expected)} with head_first={head_first}, where x is {layout}; "
                "an x of [S, B, N, D] needs a table [S, 1, 1, D]",
            )
        return table[None, None] if head_first else table[None, :, None]
    fits = all(size in (1, whole) for size, whole in zip(table.shape[:3], x.shape[:3], strict=True))
    if not fits or table.shape[3] != x.shape[3]:
        raise ParametersInvalid(
            name,
            checks.describe(table),
            f"[1, 1, S, D], [1, S, 1, D] or [S, 1, 1, D] that broadcasts to x, {[*x.shape]}",
        )
    return table
