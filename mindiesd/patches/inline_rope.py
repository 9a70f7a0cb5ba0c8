"""Rotary embeddings that models apply inside their attention processors.

Functions defined anew in every call and expressions have no name that could be redirected: the
processors are rewritten from their own source, see :mod:`mindiesd.patches.rewriting`. What is
rotated, and how tables are read and kept, is that of :mod:`mindiesd.patches.rope`.

Left alone: the video autoencoder of MiniMax-H3 (``MiniMaxH3VideoAttnProcessor.__call__``), whose
rotation of a part of the channels is spread over nine statements that share their parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import law
from mindiesd.patches.rewriting.records import builder, records
from mindiesd.patches.rewriting.rules import Expression, Nested, Rewrite
from mindiesd.patches.rope.family import Family
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

    from mindiesd.patches.rope.kept import Sources, Tables

_HERE = "mindiesd.patches.inline_rope"


# Tables as these models pass them, see mindiesd.patches.rope.forms.


def pairs(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
    """cos and sin [1, S, 1, D] of which the cosines of even and the sines of odd channels count."""
    import torch

    from mindiesd.patches.rope import forms, kept

    cos, sin = sources
    if cos.shape != sin.shape or not cos.dim() or cos.shape[-1] % 2:
        return kept.TABLE_SHAPE
    found = forms.full()(x, (cos[..., 0::2], sin[..., 1::2]), fact)
    if isinstance(found, str):
        return found
    return _doubled(torch.stack(found))


def halves(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
    """cos and sin [S, N, D / 2], one number a pair."""
    import torch

    from mindiesd.patches.rope import forms

    found = forms.full()(x, sources, fact)
    return found if isinstance(found, str) else _doubled(torch.stack(found))


def angles(x: Tensor, sources: Sources, fact: Any) -> Tables | str:
    """Angles [B, S, 1, R], one a channel, whose cosines and sines are cast to x's dtype."""
    from mindiesd.patches.rope import forms

    (table,) = sources
    if x.dtype not in forms.HALF_OR_SINGLE or table.dtype not in forms.HALF_OR_SINGLE:
        return law.DTYPE
    if table.device != x.device:
        return forms.TABLE_DEVICE
    return table.cos().to(x.dtype), table.sin().to(x.dtype)


def _doubled(pair: Tensor) -> Tables:
    """cos and sin with every number twice in a row."""
    wide = pair.unsqueeze(-1).expand(*pair.shape, 2).flatten(-2)
    return wide[0], wide[1]


def _family(form: Callable[[Any], Any], **more: Any) -> Family:
    return Family(call="one", form=form, **more)


_WAN = _family(lambda _: pairs, interleaved=True)
_MOCHI = _family(lambda _: halves, interleaved=True)
_COMPLEX = _family(lambda forms: forms.complex_numbers(2), interleaved=True)
_KANDINSKY5 = _family(lambda forms: forms.matrices(casts=False), interleaved=True)
_ERNIE = _family(lambda _: angles, interleaved=False, partial=True)
_HALF = _family(lambda forms: forms.full(model_dtype=True), interleaved=False, dims=0)


def _builder(family: Family, tables: int) -> Callable[[Any, Site], Callable[..., Any]]:
    """The replacement of a function of x and so many tables."""

    def build(original: Any, site: Site) -> Callable[..., Any]:
        from mindiesd.patches.rope.rotation import rotation

        read, turn, _ = rotation(family)

        def rotary(*given: Any, **named: Any) -> Any:
            found: Any = law.UNUSUAL_ARGUMENT
            if len(given) == 1 + tables and not named:
                found = read(given[0], given[1:])
            if site.takes(found if isinstance(found, str) else None):
                return turn(given[0], found)
            return original(*given, **named)

        return rotary

    return build


build_pairs = _builder(_WAN, 2)
build_halves = _builder(_MOCHI, 2)
build_complex = _builder(_COMPLEX, 1)
build_angles = _builder(_ERNIE, 1)
build_rotate_half = _builder(_HALF, 2)


def build_bfloat16(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of a rotation in float32 that is always rounded to bfloat16."""
    import torch

    from mindiesd.patches.rope.rotation import rotation

    read, turn, _ = rotation(_KANDINSKY5)

    def rotary(*given: Any, **named: Any) -> Any:
        found: Any = law.UNUSUAL_ARGUMENT
        if len(given) == 2 and not named:
            x, table = given
            if isinstance(x, torch.Tensor) and x.dtype is torch.float16:
                x = x.float()  # or it would be rounded twice
            found = read(x, (table,))
        if site.takes(found if isinstance(found, str) else None):
            return turn(x, found).to(torch.bfloat16)
        return original(*given, **named)

    return rotary


def _nested(name: str, fingerprint: str, build: str) -> Nested:
    return Nested(name=name, prints=(fingerprint,), build=f"{_HERE}:{build}")


WAN = _nested("apply_rotary_emb", "95abf850bbfdcf16", "build_pairs")
MOCHI = _nested("apply_rotary_emb", "de0db71bf6302dee", "build_halves")
Z_IMAGE = _nested("apply_rotary_emb", "7aa77bb693939cee", "build_complex")
BRIA_FIBO2 = _nested("apply_rotary_emb", "851f32eff09dc842", "build_complex")
KANDINSKY5 = _nested("apply_rotary", "c5fed9a4c7e4e2a8", "build_bfloat16")
ERNIE = _nested("apply_rotary_emb", "ce4cb8ec6f3ce4c4", "build_angles")
HALF = Expression(
    name="rotary",
    spellings=("X * COS + _rotate_half(X) * SIN",),
    holes=("X", "COS", "SIN"),
    build=f"{_HERE}:build_rotate_half",
)

_TABLE: tuple[tuple[str, str, Nested | Expression, int], ...] = (
    ("transformers.transformer_wan", "WanAttnProcessor", WAN, 1),
    ("transformers.transformer_wan_animate", "WanAttnProcessor", WAN, 1),
    ("transformers.transformer_chronoedit", "WanAttnProcessor", WAN, 1),
    ("transformers.transformer_skyreels_v2", "SkyReelsV2AttnProcessor", WAN, 1),
    ("transformers.transformer_sana_video", "SanaLinearAttnProcessor3_0", WAN, 1),
    ("attention_processor", "MochiAttnProcessor2_0", MOCHI, 1),
    ("transformers.transformer_z_image", "ZSingleStreamAttnProcessor", Z_IMAGE, 1),
    ("controlnets.controlnet_z_image", "ZSingleStreamAttnProcessor", Z_IMAGE, 1),
    ("transformers.transformer_bria_fibo2", "BriaFibo2AttnProcessor", BRIA_FIBO2, 1),
    ("transformers.transformer_kandinsky", "Kandinsky5AttnProcessor", KANDINSKY5, 1),
    ("transformers.transformer_ernie_image", "ErnieImageSingleStreamAttnProcessor", ERNIE, 1),
    ("transformers.transformer_ideogram4", "Ideogram4AttnProcessor", HALF, 2),
    ("transformers.transformer_cosmos3", "Cosmos3AttnProcessor", HALF, 5),
)

RECORDS, _BY_NAME = records(
    (
        Rewrite(
            module=f"diffusers.models.{module}",
            qualname=f"{processor}.__call__",
            counts={kind: count},
        )
        for module, processor, kind, count in _TABLE
    ),
    family="inline_rope",
    becomes="mindiesd.rotary_position_embedding",
    why="one npu_rotary_mul kernel instead of slices, products, sums and copies into slices",
    when="input and tables of half or float32 dtype, tables that broadcast to it, no gradients",
    numerics="float32 inside and one rounding",
)
build = builder(_BY_NAME)
