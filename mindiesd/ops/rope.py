"""Rotary position embedding.

    out = x * cos + rot(x) * sin

``rotated_half``: rot(x) = [-x₂, x₁] with x = [x₁, x₂] cut in the middle. ``rotated_interleaved``:
rot(x) = (-x₁, x₀, -x₃, x₂, …). Source: Su et al., *RoFormer* (arXiv 2104.09864); the same numbers
as ``diffusers.models.embeddings.apply_rotary_emb`` with real tables.
"""

from __future__ import annotations

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
    checks.tensor("x", x, 4)
    checks.choice("rotated_mode", rotated_mode, MODES)
    checks.boolean("head_first", head_first)
    checks.boolean("fused", fused)
    if x.shape[-1] % 2:
        raise ParametersInvalid("x", checks.describe(x), "an even last dimension")
    tables = _table("cos", cos, x, head_first), _table("sin", sin, x, head_first)
    if cos.shape != sin.shape:
        raise ParametersInvalid("sin", checks.describe(sin), f"the shape of cos, {[*cos.shape]}")
    interleaved = rotated_mode == "rotated_interleaved"
    if not fused:
        return native.rotate(x, *tables, interleaved)
    return rotate(x, *tables, interleaved)


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
