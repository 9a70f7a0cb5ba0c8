"""``flash_attn.layers.rotary``: rotary position embedding with half-width tables.

    out = x * cos + rot(x) * sin    over the first R dimensions, the others as they are

with tables of R / 2 columns, in float32 or better, rounded once. Source: flash_attn 2.8.3; Su et
al., *RoFormer* (arXiv 2104.09864); XPos: arXiv 2212.10554.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.backends import native
from mindiesd.ops.rope import rotate


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """[-x₂, x₁] of the halves x = [x₁, x₂], or (-x₁, x₀, -x₃, x₂, …) of neighbours."""
    if not interleaved:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The formula as it stands, in the dtype of its arguments.

    Args:
        x: [B, S, N, D].
        cos: [S, R / 2] or [B, S, R / 2].
        sin: the same shape.
        interleaved: neighbouring pairs instead of halves.
    """
    rotated = cos.shape[-1] * 2
    part = x[..., :rotated]
    cos, sin = (_widened(table, interleaved).unsqueeze(-2) for table in (cos, sin))
    return torch.cat([part * cos + rotate_half(part, interleaved) * sin, x[..., rotated:]], dim=-1)


def apply_rotary_emb(
    x: Any,
    cos: Any,
    sin: Any,
    interleaved: Any = False,
    inplace: Any = False,
    seqlen_offsets: Any = 0,
    cu_seqlens: Any = None,
    max_seqlen: Any = None,
) -> Tensor:
    """Rotate the first dimensions of x by its positions.

    Args:
        x: [B, S, N, D], or packed [T, N, D] with ``cu_seqlens``.
        cos: [positions, R / 2] with R <= D.
        sin: the same shape.
        interleaved: neighbouring pairs instead of halves.
        inplace: whether x itself is changed and returned.
        seqlen_offsets: the position of the first token: an int, or [B] integers.
        cu_seqlens: where each packed sequence begins, and T, [B + 1].
        max_seqlen: any upper bound of the packed lengths; changes nothing.

    Returns:
        Shape and dtype of x.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    checks.tensor("x", x, 4 if cu_seqlens is None else 3)
    for name, table in (("cos", cos), ("sin", sin)):
        checks.tensor(name, table, 2)
        checks.same_device(name, table, "x", x)
    if sin.shape != cos.shape:
        raise ParametersInvalid("sin", checks.describe(sin), f"the shape of cos, {[*cos.shape]}")
    rotated = 2 * cos.shape[1]
    if rotated > x.shape[-1]:
        raise ParametersInvalid(
            "cos", checks.describe(cos), f"at most half the head dimension of x, {x.shape[-1]}"
        )
    interleaved = checks.boolean("interleaved", interleaved)
    rows = _rows(x, cos.shape[0], seqlen_offsets, cu_seqlens)
    cos, sin = (_widened(table[rows], interleaved).unsqueeze(-2) for table in (cos, sin))
    part = x if rotated == x.shape[-1] else x[..., :rotated]
    needs_gradient = torch.is_grad_enabled() and (
        x.requires_grad or cos.requires_grad or sin.requires_grad
    )
    if needs_gradient or x.dim() == 3:
        turned = native.rotate(part, cos, sin, interleaved)
    else:
        # A kernel takes tables of four dimensions.
        cos, sin = (table if table.dim() == 4 else table[None] for table in (cos, sin))
        turned = rotate(part, cos, sin, interleaved)
    if checks.boolean("inplace", inplace):
        part.copy_(turned)
        return x  # type: ignore[no-any-return]
    return turned if part is x else torch.cat([turned, x[..., rotated:]], dim=-1)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Any,
    cos: Any,
    sin: Any,
    cos_k: Any = None,
    sin_k: Any = None,
    interleaved: Any = False,
    seqlen_offsets: Any = 0,
    num_heads_q: Any = None,
) -> Tensor:
    """Rotate the queries and keys of a packed tensor, in place.

    Args:
        qkv: [B, S, 3, N, D], or [B, S, N + 2 Nkv, D] with ``num_heads_q``.
        cos: [positions, R / 2].
        sin: the same shape.
        cos_k: other tables for the keys, or None.
        sin_k: likewise.
        interleaved: neighbouring pairs instead of halves.
        seqlen_offsets: the position of the first token: an int, or [B] integers.
        num_heads_q: N, where heads are packed in one dimension.

    Returns:
        ``qkv`` itself.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    checks.tensor("qkv", qkv, (4, 5))
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ParametersInvalid("qkv", checks.describe(qkv), "3 in dimension 2")
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        if num_heads_q is None:
            raise ParametersInvalid("num_heads_q", None, "the number of query heads in qkv")
        heads = checks.integer("num_heads_q", num_heads_q, 1)
        rest = qkv.shape[2] - heads
        if rest < 2 or rest % 2:
            raise ParametersInvalid(
                "num_heads_q", num_heads_q, f"what leaves pairs of {qkv.shape[2]} heads"
            )
        q, k = qkv[:, :, :heads], qkv[:, :, heads : heads + rest // 2]
    options = {"interleaved": interleaved, "inplace": True, "seqlen_offsets": seqlen_offsets}
    apply_rotary_emb(q, cos, sin, **options)
    apply_rotary_emb(k, cos if cos_k is None else cos_k, sin if sin_k is None else sin_k, **options)
    return qkv  # type: ignore[no-any-return]


def apply_rotary_emb_kv_(
    kv: Any, cos: Any, sin: Any, interleaved: Any = False, seqlen_offsets: Any = 0
) -> Tensor:
    """Rotate the keys of a packed tensor [B, S, 2, Nkv, D], in place, and return it.

    Args:
        kv: keys and values.
        cos: [positions, R / 2].
        sin: the same shape.
        interleaved: neighbouring pairs instead of halves.
        seqlen_offsets: the position of the first token: an int, or [B] integers.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    checks.tensor("kv", kv, 5)
    if kv.shape[2] != 2:
        raise ParametersInvalid("kv", checks.describe(kv), "2 in dimension 2")
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv  # type: ignore[no-any-return]


class RotaryEmbedding(torch.nn.Module):
    """Tables for :func:`apply_rotary_emb_qkv_` and their application; XPos with ``scale_base``.

    The tables are computed in float32, whatever the model was cast to, and kept until a longer
    sequence, another device or another dtype comes.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
    ) -> None:
        """Describe the embedding.

        Args:
            dim: R, how many dimensions are rotated.
            base: of the frequencies ``base ** (-2 i / R)``.
            interleaved: neighbouring pairs instead of halves.
            scale_base: of XPos; None is none.
            device: where the frequencies are kept.
        """
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        scale = None
        if scale_base is not None:
            steps = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
            scale = (steps + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._tables: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def _frequencies(self, device: Any) -> Tensor:
        steps = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / (self.base ** (steps / self.dim))

    def _update(self, length: int, device: torch.device, dtype: torch.dtype) -> None:
        """Make the tables for ``length`` positions, unless those at hand do."""
        if self._tables is not None:
            cos = self._tables[0]
            fits = cos.shape[0] >= length and cos.device == device and cos.dtype is dtype
            if fits and not (self.training and cos.is_inference()):
                return
        frequencies: Any = self.inv_freq
        if frequencies.dtype is not torch.float32 or frequencies.device != device:
            frequencies = self._frequencies(device)
        positions = torch.arange(length, device=device, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos(), angles.sin()
        if self.scale_base is None:
            self._tables = (cos.to(dtype), sin.to(dtype), cos.to(dtype), sin.to(dtype))
            return
        scale: Any = self.scale
        power = (positions - length // 2) / self.scale_base
        grown = scale.to(device=device, dtype=torch.float32) ** power[:, None]
        self._tables = (
            (cos * grown).to(dtype),
            (sin * grown).to(dtype),
            (cos / grown).to(dtype),
            (sin / grown).to(dtype),
        )

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Any:
        """Rotate in place.

        Args:
            qkv: [B, S, 3, N, D] or [B, S, N + 2 Nkv, D]; the queries [B, S, N, D] where ``kv`` is.
            kv: [B, S, 2, Nkv, D] or None.
            seqlen_offset: the position of the first token: an int, or [B] integers.
            max_seqlen: how many positions the tables shall have; needed with a tensor of offsets.
            num_heads_q: N, where heads are packed in one dimension.

        Returns:
            ``qkv``, or ``(qkv, kv)``.
        """
        if max_seqlen is not None:
            self._update(max_seqlen, qkv.device, qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update(qkv.shape[1] + seqlen_offset, qkv.device, qkv.dtype)
        if self._tables is None:
            raise ParametersInvalid("max_seqlen", None, "given with a tensor of offsets")
        cos, sin, cos_k, sin_k = self._tables
        options = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, num_heads_q=num_heads_q, **options
            )
        q = apply_rotary_emb(qkv, cos, sin, inplace=True, **options)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, **options)


def _widened(table: Tensor, interleaved: bool) -> Tensor:
    """A table of R / 2 columns with one column for each of R dimensions."""
    if interleaved:
        return table.repeat_interleave(2, dim=-1)
    return torch.cat((table, table), dim=-1)


def _rows(x: Tensor, positions: int, offsets: Any, cu_seqlens: Any) -> Any:
    """Which rows of the tables the tokens of x take: a slice, or an index [B, S] or [T].

    Raises:
        ParametersInvalid: an offset or a length is wrong, or beyond the tables.
    """
    if isinstance(offsets, Tensor):
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if offsets.shape != (batch,) or offsets.dtype not in (torch.int32, torch.int64):
            raise ParametersInvalid(
                "seqlen_offsets", checks.describe(offsets), f"an int or integers [{batch}]"
            )
    else:
        offsets = checks.integer("seqlen_offsets", offsets, 0)
    if cu_seqlens is None:
        if not isinstance(offsets, Tensor):
            if offsets + x.shape[1] > positions:
                raise ParametersInvalid(
                    "cos", f"{positions} positions", f"{offsets + x.shape[1]}, offset and length"
                )
            return slice(offsets, offsets + x.shape[1])
        rows = offsets[:, None] + torch.arange(x.shape[1], device=x.device)
    else:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1:
            raise ParametersInvalid("cu_seqlens", checks.describe(cu_seqlens), "integers [B + 1]")
        starts: list[int] = cu_seqlens.tolist()
        lengths = [end - begin for begin, end in pairwise(starts)]
        if starts[0] != 0 or starts[-1] != x.shape[0] or min(lengths, default=0) < 0:
            raise ParametersInvalid(
                "cu_seqlens", f"{starts}", f"numbers that rise from 0 to {x.shape[0]}"
            )
        first: list[int] = offsets.tolist() if isinstance(offsets, Tensor) else [offsets]
        if len(first) == 1:
            first = first * len(lengths)
        rows = torch.tensor(
            [at + step for at, n in zip(first, lengths, strict=True) for step in range(n)],
            device=x.device,
            dtype=torch.int64,
        )
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= positions):
        raise ParametersInvalid(
            "seqlen_offsets", f"positions up to {int(rows.max())}", f"below the tables' {positions}"
        )
    return rows
