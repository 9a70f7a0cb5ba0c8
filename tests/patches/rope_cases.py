"""Arguments for every redirected rotary function, and what it has to return, in float64.

The references are written from the formulas: a complex product, a 2 x 2 matrix, or the pairs that
``tests.oracles.rope`` turns one by one. Tables hold unrelated numbers in [-1, 1] wherever a
function would notice, so that reading the wrong one of a pair is found out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests import oracles

DIFFUSERS = "diffusers.models.transformers.transformer_"


@dataclass(frozen=True)
class Sizes:
    """The shape of a call: B, S, N and D / 2, and whether tables have the batch of x."""

    batch: int = 2
    length: int = 5
    heads: int = 3
    half: int = 4
    per_batch: bool = True

    @property
    def dim(self) -> int:
        return 2 * self.half

    @property
    def table_batch(self) -> int:
        return self.batch if self.per_batch else 1


@dataclass(frozen=True)
class Case:
    """One function.

    Attributes:
        name: of its record.
        make: sizes, dtype -> the arguments.
        expect: the arguments -> what it returns, a list, in float64.
        inputs: which arguments are rotated.
        exact: dtypes of x for which the call is redirected.
    """

    name: str
    make: Callable[[Sizes, torch.dtype], tuple[Any, ...]]
    expect: Callable[..., list[Tensor]]
    inputs: tuple[int, ...] = (0,)
    exact: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape) * 2 - 1


def bsnd(s: Sizes, dtype: torch.dtype, extra: int = 0) -> Tensor:
    return torch.randn(s.batch, s.length, s.heads, s.dim + extra).to(dtype)


def bnsd(s: Sizes, dtype: torch.dtype, extra: int = 0) -> Tensor:
    return bsnd(s, dtype, extra).transpose(1, 2)


def polar(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.polar(torch.ones(shape, dtype=dtype), torch.randn(shape, dtype=dtype))


def product(x: Tensor, table: Tensor) -> list[Tensor]:
    """Neighbours (a, b) as a + ib, times the table."""
    z = torch.complex(x.double()[..., 0::2], x.double()[..., 1::2]) * table.to(torch.complex128)
    return [torch.stack((z.real, z.imag), -1).flatten(-2)]


def by_matrix(x: Tensor, table: Tensor) -> Tensor:
    """Neighbours (a, b) as a vector, each times its own matrix."""
    pairs = x.double().unflatten(-1, (-1, 2))
    matrix = table.double().expand(*pairs.shape, 2)
    return torch.einsum("...ij,...j->...i", matrix, pairs).flatten(-2)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``oracles.rope`` of the first channels; the others stay."""
    width = cos.shape[-1]
    out = oracles.rope(x[..., :width], cos, sin, interleaved)
    return torch.cat((out, x[..., width:].double()), -1)


def both(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    return lambda xq, xk, *rest: [function(xq, *rest), function(xk, *rest)]


def _split(x: Tensor, freqs: tuple[Tensor, Tensor]) -> list[Tensor]:
    cos, sin = (t.double().transpose(1, 2) for t in freqs)
    batch, length, heads, half = cos.shape
    a, b = x.double().view(batch, length, heads, 2, half).unbind(-2)
    return [torch.cat((a * cos - b * sin, b * cos + a * sin), -1).flatten(2)]


def _joined(x: Tensor, table: Tensor) -> list[Tensor]:
    cos, sin = table.double()[:, :, None].chunk(2, -1)
    a, b = x.double().unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[..., 0::2], sin[..., 1::2]
    return [torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)]


def _angles(x: Tensor, table: Tensor) -> list[Tensor]:
    table = table.double()[-x.shape[1] :, None]
    return [turned(x, table.cos(), table.sin(), False)]


def _thirds(x: Tensor, tables: Any, positions: Any) -> list[Tensor]:
    out = []
    for part, (cos, sin), place in zip(x.chunk(3, -1), tables, positions, strict=True):
        out.append(oracles.rope(part, cos[place][:, None], sin[place][:, None], False))
    return [torch.cat(out, -1)]


def _glm(x: Tensor, cos: Tensor, sin: Tensor, axis: int = 1) -> Tensor:
    half = cos.shape[-1] // 2
    z = product(
        x[..., : 2 * half], torch.complex(cos.double(), sin.double())[..., :half].unsqueeze(axis)
    )
    return torch.cat((z[0], x[..., 2 * half :].double()), -1)


def _allegro(s: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    third = 2 * s.half
    x = torch.randn(s.batch, s.length, s.heads, 3 * third).to(dtype).transpose(1, 2)
    tables = tuple((uniform(7, third), uniform(7, third)) for _ in range(3))
    return x, tables, tuple(torch.randint(0, 7, (s.table_batch, s.length)) for _ in range(3))


def _qk(s: Sizes, dtype: torch.dtype, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Query and key, the key with a single head."""
    key = torch.randn(s.batch, s.length, 1, s.dim + extra).to(dtype)
    return bnsd(s, dtype, extra), key.transpose(1, 2)


def _text(extra: int = 0) -> Callable[[Sizes, torch.dtype], tuple[Any, ...]]:
    return lambda s, d: (
        *_qk(s, d, extra),
        uniform(s.table_batch, s.length, s.dim).to(d),
        uniform(s.table_batch, s.length, s.dim).to(d),
    )


def _flat(s: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    width = s.heads * s.dim
    tables = uniform(2, s.table_batch, s.length, width)
    return torch.randn(s.batch, s.length, width).to(dtype), (tables[0], tables[1])


def _heads(s: Sizes, dtype: torch.dtype) -> tuple[Any, ...]:
    tables = uniform(2, s.batch, s.heads, s.length, s.half)
    return torch.randn(s.batch, s.length, s.heads * s.dim).to(dtype), (tables[0], tables[1])


def _tokens(s: Sizes) -> tuple[Tensor, Tensor]:
    return uniform(s.length, s.dim), uniform(s.length, s.dim)


def _cast(x: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """The originals cast their tables to x's dtype: that is part of the formula."""
    return [turned(x, cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None], False)]


HALF = (torch.bfloat16, torch.float16)

_QWEN = (
    (lambda s, d: (bsnd(s, d), polar(s.length, s.half), False)),
    (lambda x, table, real: product(x, table[:, None])),
)
_FLAT = _flat, (lambda x, freqs: [oracles.rope(x, *freqs, True)])
_ANYFLOW = (lambda s, d: (bnsd(s, d), polar(1, 1, s.length, s.half, dtype=torch.float64))), product
_MATRIX = (
    lambda s, d: (bsnd(s, d), uniform(s.table_batch, s.length, 1, s.half, 2, 2)),
    lambda x, table: [by_matrix(x, table)],
)
_STABLE = (lambda s, d: (bsnd(s, d, 4), torch.randn(s.length + 2, s.dim))), _angles

CASES = {
    case.name: case
    for case in (
        *(Case(f"{model}_rope", *_QWEN) for model in ("qwenimage", "qwenimage21", "nucleusmoe")),
        Case("ltx_rope", *_FLAT),
        Case("ltx2_interleaved_rope", *_FLAT),
        Case("sana_wm_refiner_interleaved_rope", *_FLAT),
        Case("ltx2_split_rope", _heads, _split),
        Case("sana_wm_refiner_split_rope", _heads, _split),
        Case("anyflow_rope", *_ANYFLOW, exact=HALF),
        Case("anyflow_far_rope", *_ANYFLOW, exact=HALF),
        Case(
            "sana_wm_rope",
            lambda s, d: (bsnd(s, d).permute(0, 2, 3, 1), polar(1, 1, s.length, s.half)),
            lambda x, table: [product(x.transpose(2, 3), table)[0].transpose(2, 3)],
        ),
        Case(
            "hidream_rope",
            lambda s, d: (
                bsnd(s, d),
                bsnd(s, d),
                uniform(s.table_batch, s.length, 1, s.half, 2, 2),
            ),
            both(by_matrix),
            (0, 1),
        ),
        Case(
            "prx_rope",
            lambda s, d: (bnsd(s, d), uniform(s.table_batch, 1, s.length, s.half, 2, 2)),
            lambda x, table: [by_matrix(x, table)],
        ),
        Case("kandinsky6_rope", *_MATRIX),
        Case("kandinsky6_sr_rope", *_MATRIX),
        Case(
            "helios_rope",
            lambda s, d: (bsnd(s, d), uniform(s.table_batch, s.length, 2 * s.dim)),
            _joined,
        ),
        Case(
            "joyimage_rope",
            lambda s, d: (bsnd(s, d), bsnd(s, d), _tokens(s)),
            both(lambda x, f: oracles.rope(x, f[0][:, None], f[1][:, None], True)),
            (0, 1),
        ),
        Case(
            "joyimage_edit_rope",
            lambda s, d: (
                bsnd(s, d),
                bsnd(s, d),
                tuple(uniform(2, s.table_batch, s.length, s.dim)),
            ),
            both(lambda x, f: oracles.rope(x, f[0][:, :, None], f[1][:, :, None], True)),
            (0, 1),
        ),
        Case(
            "longcat_audio_rope",
            lambda s, d: (bsnd(s, d), tuple(t.to(d) for t in _tokens(s))),
            lambda x, f: [oracles.rope(x, f[0][:, None], f[1][:, None], False)],
        ),
        Case("minimax_h3_rope", lambda s, d: (bsnd(s, d, 4), *_tokens(s)), _cast),
        Case(
            "minimax_music3_rope",
            lambda s, d: (bsnd(s, d, 4), _tokens(s)),
            lambda x, f: _cast(x, *f),
        ),
        Case("stable_audio3_rope", *_STABLE),
        Case("autoencoder_same_rope", *_STABLE),
        Case(
            "anima_rope",
            lambda s, d: (
                bsnd(s, d),
                *(uniform(s.table_batch, s.length, s.dim).to(d) for _ in "cs"),
                2,
            ),
            lambda x, c, s, axis: [oracles.rope(x, c.unsqueeze(axis), s.unsqueeze(axis), False)],
        ),
        Case("allegro_rope", _allegro, _thirds),
        *(
            Case(
                f"{model}_rope",
                _text(),
                both(lambda x, c, s: oracles.rope(x, c[:, None], s[:, None], False)),
                (0, 1),
            )
            for model in (
                "llama",
                "qwen2",
                "qwen3",
                "mistral",
                "ministral",
                "ministral3",
                "smollm3",
                "gemma",
                "gemma2",
                "gemma3",
                "qwen2_vl",
                "qwen2_5_vl",
                "qwen3_vl",
            )
        ),
        Case(
            "phi3_rope",
            _text(extra=4),
            both(lambda x, c, s: turned(x, c[:, None], s[:, None], False)),
            (0, 1),
        ),
        Case("glm_rope", _text(extra=4), both(_glm), (0, 1)),
        Case("glm4_rope", _text(), both(_glm), (0, 1)),
        *(
            Case(
                f"{model}_vision_rope",
                lambda s, d: (*(bsnd(s, d)[0] for _ in "qk"), *_tokens(s)),
                both(lambda x, c, s: oracles.rope(x, c[:, None], s[:, None], False)),
                (0, 1),
            )
            for model in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
        ),
    )
}


def one_a_convention() -> list[str]:
    """The first case of each: the others have the same replacement over a copy of the original."""
    from mindiesd.patches.registry import select

    seen: dict[str, str] = {}
    for record in select("rope"):
        if record.name in CASES:
            seen.setdefault(record.build, record.name)
    return [*seen.values()]
