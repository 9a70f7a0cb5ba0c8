"""Adaptive norms: classes whose forward normalises and modulates, and returns the rest.

    norm(x) * (1 + scale) + shift

What is around that expression, the projection of the conditioning and its order (shift first or
scale first, two to twelve parts), differs from class to class and stays what it is: the forward is
rewritten from its own source (:mod:`mindiesd.patches.rewriting`) with that expression redirected.
Modulations in the forward of a block are in :mod:`mindiesd.patches.modulation`, and so is most of
what they become.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindiesd.patches import composed_attention, conditioning, law, modulation
from mindiesd.patches.registry import Left
from mindiesd.patches.rewriting.records import builder, records, rows
from mindiesd.patches.rewriting.rules import Expression, Statements
from mindiesd.patches.scope import Site

PER_SAMPLE = "more than one scale: the product is one kernel as it is"
OTHER_NORM = "a norm with a bias, or of another class"

_HERE = "mindiesd.patches.ada_norm:"
# As the other kinds, but the row of each sample is made to span its tokens after 1 is added.
INDEXED_NORM_MODULATE = Expression(
    name="norm_modulate",
    spellings=("NORM(X) * (1 + SCALE)[:, None, :] + SHIFT",),
    holes=("NORM", "X", "SCALE", "SHIFT"),
    calls=("X",),
    members=("NORM",),
    build=_HERE + "build_indexed_norm_modulate",
)
INDEXED_MODULATE = Expression(
    name="modulate",
    spellings=("X * (1 + SCALE)[:, None, :] + SHIFT",),
    holes=("X", "SCALE", "SHIFT"),
    calls=("X",),
    build=_HERE + "build_indexed_modulate",
)
NORM_SCALE = Expression(
    name="norm_scale",
    spellings=("NORM(X) * (1 + SCALE)",),
    holes=("NORM", "X", "SCALE"),
    calls=("X",),
    members=("NORM",),
    build=_HERE + "build_norm_scale",
)
INDEXED_NORM_SCALE = Expression(
    name="norm_scale",
    spellings=("NORM(X) * (1 + SCALE)[:, None, :]",),
    holes=("NORM", "X", "SCALE"),
    calls=("X",),
    members=("NORM",),
    build=_HERE + "build_norm_scale",
)
NORM_PRODUCT = Expression(
    name="norm_product",
    spellings=("NORM(X) * SCALE",),
    holes=("NORM", "X", "SCALE"),
    calls=("X",),
    members=("NORM",),
    build=_HERE + "build_norm_product",
)

# Module (of diffusers.models.transformers where it has no dot), class, and how many modulated norms
# it has: with an index after 1 + scale (i), with the result cast (c), plain (n); modulations of
# something else, with an index (j) and without (m); norms that are scaled and not shifted, by
# 1 + scale with an index (t) and without (s), and by a product (p). A function is rewritten once,
# so these are here as well: projections of the SiLU of the conditioning (z), and of one that is
# cast (y), and the attention that one of them writes out (a).
_TABLE = """
diffusers.models.embeddings IPAdapterTimeImageProjectionBlock n2 a1
diffusers.models.normalization AdaLayerNorm n1
diffusers.models.normalization AdaLayerNormZero n1 z1
diffusers.models.normalization AdaLayerNormZeroSingle n1 z1
diffusers.models.normalization SD35AdaLayerNormZeroX m2 z1
diffusers.models.normalization AdaLayerNormContinuous i1 y1
diffusers.models.normalization CogView3PlusAdaLayerNormZeroTextImage n2 z1
diffusers.models.normalization CogVideoXLayerNormZero i2 z1
diffusers.models.normalization LuminaRMSNormZero s1 z1
diffusers.models.normalization LuminaLayerNormContinuous t1 y1
sana_transformer SanaModulatedNorm n1
transformer_bria_fibo2 FinalLayer p1
transformer_chroma ChromaAdaLayerNormZeroPruned n1
transformer_chroma ChromaAdaLayerNormZeroSinglePruned n1
transformer_chroma ChromaAdaLayerNormContinuousPruned i1
transformer_cogview4 CogView4AdaLayerNormZero c2
transformer_cogview4 CogView4AdaLayerNormContinuous i1
transformer_cosmos CosmosAdaLayerNorm m1 z1
transformer_cosmos CosmosAdaLayerNormZero m1 z1
transformer_easyanimate EasyAnimateLayerNormZero n2 z1
transformer_ernie_image ErnieImageAdaLNContinuous n1
transformer_flux3 Flux3AdaLayerNorm n1
transformer_glm_image GlmImageAdaLayerNormZero c2
transformer_glm_image GlmImageAdaLayerNormContinuous i1
transformer_helios HeliosOutputNorm n1
transformer_hunyuan_video HunyuanVideoTokenReplaceAdaLayerNormZero m2 z2
transformer_hunyuan_video HunyuanVideoTokenReplaceAdaLayerNormZeroSingle m2 z2
transformer_ideogram4 Ideogram4FinalLayer p1
transformer_longcat_audio_dit AudioDiTAdaLayerNormZeroFinal j1 m1 z1
transformer_minimax_h3 MiniMaxH3AdaLayerNormOut m1
transformer_mochi MochiRMSNormZero s1 z1
transformer_qwenimage21 QwenImage21AdaLayerNormContinuous s1 y1
transformer_sana_wm T2IFinalLayer m1
transformer_sana_video SanaModulatedNorm n1
transformer_z_image FinalLayer p1
"""

# In the order in which they are looked for.
_KINDS: dict[str, Expression | Statements] = {
    "i": INDEXED_NORM_MODULATE,
    "c": modulation.CAST_NORM_MODULATE,
    "n": modulation.NORM_MODULATE,
    "j": INDEXED_MODULATE,
    "m": modulation.MODULATE,
    "t": INDEXED_NORM_SCALE,
    "s": NORM_SCALE,
    "p": NORM_PRODUCT,
    "a": composed_attention.SPLIT_SCALE,
    "z": conditioning.PROJECTION,
    "y": conditioning.CAST_PROJECTION,
}

_NO_NORM = "projects the conditioning and normalises nothing"
LEFT = tuple(
    Left(target, reason)
    for target, reason in (
        ("diffusers.models.normalization.AdaLayerNormSingle", _NO_NORM),
        ("diffusers.models.transformers.transformer_ltx2.LTX2AdaLayerNormSingle", _NO_NORM),
        (
            "diffusers.models.transformers.transformer_minimax_h3.MiniMaxH3AdaLayerNormModulation",
            _NO_NORM,
        ),
        (
            "diffusers.models.transformers.transformer_sana_wm_refiner.SanaWMLTX2AdaLayerNormSingle",
            _NO_NORM,
        ),
        (
            "diffusers.models.transformers.hunyuan_transformer_2d.AdaLayerNormShift",
            "norm and sum are two kernels, and so are adding the shift to the bias and the norm",
        ),
        (
            "diffusers.models.transformers.transformer_mochi.MochiModulatedRMSNorm",
            "its scale comes as an argument, of its own for each sample; the norm is redirected",
        ),
        (
            "diffusers.models.transformers.transformer_qwenimage21."
            "QwenImage21TransformerBlock._modulate",
            "multiplies what it is given by 1 + scale and shifts nothing: a sum and a product; the "
            "norm before it is redirected",
        ),
        (
            "diffusers.models.attention_processor.SpatialNorm",
            "its scale is an image: a group norm and a product, nothing to fold",
        ),
    )
)


RECORDS, _BY_NAME = records(
    rows(_TABLE, _KINDS, modulation.home, ".forward"),
    family="ada_norm",
    becomes="mindiesd.layernorm_scale_shift",
    why="two kernels instead of four (norm, 1 + scale, mul, add), or three for several samples",
    when="tensors of one half or float32 dtype, norms without hooks, no gradients",
    numerics="fewer roundings than the expressions have",
)
build = builder(_BY_NAME)


def build_indexed_norm_modulate(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``norm(x) * (1 + scale)[:, None, :] + shift``, scale [B, H]."""

    def plain(norm: Any, x: Any, scale: Any, shift: Any) -> Any:
        return original(norm, x, scale[:, 0], shift)

    norm_modulate = modulation.build_norm_modulate(plain, site)

    def indexed_norm_modulate(norm: Any, x: Any, scale: Any, shift: Any) -> Any:
        if getattr(scale, "ndim", 0) == 2:
            return norm_modulate(norm, x, scale[:, None], shift)
        site.takes(law.UNUSUAL_ARGUMENT)
        return original(norm, x, scale, shift)

    return indexed_norm_modulate


def build_indexed_modulate(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``x * (1 + scale)[:, None, :] + shift``, scale [B, H]."""

    def plain(x: Any, scale: Any, shift: Any) -> Any:
        return original(x, scale[:, 0], shift)

    modulate = modulation.build_modulate(plain, site)

    def indexed_modulate(x: Any, scale: Any, shift: Any) -> Any:
        if getattr(scale, "ndim", 0) == 2:
            return modulate(x, scale[:, None], shift)
        site.takes(law.UNUSUAL_ARGUMENT)
        return original(x, scale, shift)

    return indexed_modulate


def build_norm_scale(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``norm(x) * (1 + scale)``, also with an index after the parenthesis."""
    return _build_scaled(original, site, centred=True)


def build_norm_product(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``norm(x) * scale``."""
    return _build_scaled(original, site, centred=False)


def _build_scaled(original: Any, site: Site, centred: bool) -> Callable[..., Any]:
    import torch
    from diffusers.models.normalization import FP32LayerNorm, RMSNorm
    from torch.nn import LayerNorm

    from mindiesd.ops import ada_norm

    layer_norms = (LayerNorm, FP32LayerNorm)
    rms_norms = (RMSNorm, torch.nn.RMSNorm) if hasattr(torch.nn, "RMSNorm") else (RMSNorm,)
    default_eps = torch.finfo(torch.float32).eps
    unlike, hooked = modulation._unlike(), modulation._hook_finder()

    def refusal(norm: Any, x: Any, scale: Any) -> str | None:
        reason = unlike(x, scale, scale)
        if reason is not None:
            return reason
        kind = type(norm)
        if kind not in layer_norms and kind not in rms_norms:
            return OTHER_NORM
        if getattr(norm, "bias", None) is not None:
            return OTHER_NORM
        if hooked(norm):
            return modulation.HOOKED
        hidden = x.shape[-1] if x.dim() else 0
        weight = norm.weight
        if weight is not None:
            if weight.shape != (hidden,):
                return law.NOT_LAST_DIM
            reason = unlike(x, weight, weight)
            if reason is not None:
                return reason
        elif kind is not RMSNorm and tuple(norm.normalized_shape) != (hidden,):
            return law.NOT_LAST_DIM
        if scale.dim() < 2 or scale.dim() > x.dim() or scale.shape[-1] != hidden:
            return modulation.SHAPE
        return None if scale.numel() == hidden else PER_SAMPLE

    def norm_scale(norm: Any, x: Any, scale: Any) -> Any:
        if site.takes(refusal(norm, x, scale)):
            scale = scale.reshape(-1)
            if type(norm) in rms_norms:
                eps = default_eps if norm.eps is None else norm.eps
                return ada_norm.rms_norm_scale(x, norm.weight, eps, scale, centred)
            return ada_norm.layer_norm_scale(x, norm.weight, norm.eps, scale, centred)
        return original(norm, x, scale)

    return norm_scale
