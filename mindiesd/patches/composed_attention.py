"""Attention that models write out: a matrix product, a softmax, a matrix product.

    weights = softmax((query * scale) @ (key * scale).transpose(-2, -1))
    out = weights @ value

The statements are rewritten in their functions, see :mod:`mindiesd.patches.rewriting`, and become
one call of a fused kernel. Weights that are made and thrown away are not made:
``nn.MultiheadAttention`` is told that they are not needed where only its first result is taken.

``IPAdapterTimeImageProjectionBlock`` has modulated norms as well and is among the targets of
:mod:`mindiesd.patches.ada_norm`. What is not redirected, and why, is in :data:`LEFT`; besides
that, what ``attn_implementation="eager"`` asks for in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mindiesd.patches import law
from mindiesd.patches.registry import Left
from mindiesd.patches.rewriting.records import builder, records
from mindiesd.patches.rewriting.rules import Expression, Rewrite, Statements
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

_HERE = "mindiesd.patches.composed_attention"

SCALE = "scale that is not a number"
SCORES = "attention scores of its own"
SHAPE = "shapes that are not those of an attention"
MASK_DTYPE = "mask of another dtype than the scores"
MODULE = "not nn.MultiheadAttention itself, or with hooks"
SELF_ATTENTION = "self-attention, which has a kernel of its own"

SPLIT_SCALE = Statements(
    name="attention",
    spellings=(
        "WEIGHT = (QUERY * SCALE) @ (KEY * SCALE).transpose(-2, -1)\n"
        "WEIGHT = torch.softmax(WEIGHT.float(), dim=-1).type(WEIGHT.dtype)\n"
        "OUT = WEIGHT @ VALUE",
        "SCORES = torch.matmul(QUERY * SCALE, KEY.transpose(-1, -2) * SCALE)\n"
        "PROBS = torch.softmax(SCORES, dim=-1)\n"
        "OUT = torch.matmul(PROBS, VALUE)",
    ),
    holes=("QUERY", "KEY", "VALUE", "SCALE"),
    build=f"{_HERE}:build_heads",
    reference=f"{_HERE}:reference_heads",
)
CHANNELS_FIRST = Statements(
    name="attention",
    spellings=(
        'WEIGHT = torch.einsum("bct,bcs->bts", QUERY * SCALE, KEY * SCALE)\n'
        "WEIGHT = torch.softmax(WEIGHT.float(), dim=-1).type(WEIGHT.dtype)\n"
        'OUT = torch.einsum("bts,bcs->bct", WEIGHT, VALUE)',
    ),
    holes=("QUERY", "KEY", "VALUE", "SCALE"),
    build=f"{_HERE}:build_channels_first",
    reference=f"{_HERE}:reference_channels_first",
)
PIXELS = Statements(
    name="attention",
    spellings=(
        "WEIGHT = torch.bmm(QUERY, KEY) * (int(CHANNELS) ** (-0.5))\n"
        "WEIGHT = torch.nn.functional.softmax(WEIGHT, dim=2)\n"
        "VALUE = VALUE.reshape(BATCH, CHANNELS, HEIGHT * WIDTH)\n"
        "WEIGHT = WEIGHT.permute(0, 2, 1).contiguous()\n"
        "OUT = torch.bmm(VALUE, WEIGHT).reshape(BATCH, CHANNELS, HEIGHT, WIDTH)",
    ),
    holes=("QUERY", "KEY", "VALUE", "BATCH", "CHANNELS", "HEIGHT", "WIDTH"),
    build=f"{_HERE}:build_pixels",
    reference=f"{_HERE}:reference_pixels",
)
SCORED = Statements(
    name="attention",
    spellings=(
        "PROBS = ATTN.get_attention_scores(QUERY, KEY, MASK)\nOUT = torch.bmm(PROBS, VALUE)",
    ),
    holes=("QUERY", "KEY", "VALUE", "ATTN", "MASK"),
    build=f"{_HERE}:build_scored",
    reference=f"{_HERE}:reference_scored",
)
POOLED = Expression(
    name="attention",
    spellings=("ATTENTION(PROBE, STATES, STATES)[0]",),
    holes=("ATTENTION", "PROBE", "STATES"),
    members=("ATTENTION",),
    build=f"{_HERE}:build_pooled",
)
POOLED_MASKED = Expression(
    name="attention",
    spellings=("ATTENTION(PROBE, STATES, STATES, attn_mask=MASK)[0]",),
    holes=("ATTENTION", "PROBE", "STATES", "MASK"),
    members=("ATTENTION",),
    build=f"{_HERE}:build_pooled",
)

_TABLE: tuple[tuple[str, str, Statements | Expression, int], ...] = (
    ("unets.unet_1d_blocks", "SelfAttention1d.forward", SPLIT_SCALE, 1),
    ("transformers.consisid_transformer_3d", "PerceiverAttention.forward", SPLIT_SCALE, 1),
    ("transformers.consisid_transformer_3d", "PerceiverCrossAttention.forward", SPLIT_SCALE, 1),
    ("embeddings", "AttentionPooling.forward", CHANNELS_FIRST, 1),
    ("autoencoders.autoencoder_kl_ltx2_audio", "LTX2AudioAttnBlock.forward", PIXELS, 1),
    ("attention_processor", "AttnProcessor.__call__", SCORED, 1),
    ("attention_processor", "CustomDiffusionAttnProcessor.__call__", SCORED, 1),
    ("attention_processor", "AttnAddedKVProcessor.__call__", SCORED, 1),
    ("attention_processor", "SlicedAttnProcessor.__call__", SCORED, 1),
    ("attention_processor", "SlicedAttnAddedKVProcessor.__call__", SCORED, 1),
    ("attention_processor", "IPAdapterAttnProcessor.__call__", SCORED, 3),
)
_ENCODERS = (
    ("siglip", "SiglipMultiheadAttentionPoolingHead.forward", POOLED),
    ("siglip2", "Siglip2MultiheadAttentionPoolingHead.forward", POOLED_MASKED),
)

_PROBABILITIES = "the probabilities themselves are wanted: the pipeline keeps or edits them"
_FLEX = "flex attention: a mask of blocks, which no fused kernel of the device takes"
_OLD = "used only where PyTorch has no scaled_dot_product_attention"
LEFT = tuple(
    Left(target, reason)
    for targets, reason in (
        (
            (
                "diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion."
                "LEDITSCrossAttnProcessor",
                "diffusers.pipelines.ledits_pp.pipeline_leditspp_stable_diffusion_xl."
                "LEDITSCrossAttnProcessor",
                "diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite."
                "pipeline_stable_diffusion_attend_and_excite.AttendExciteAttnProcessor",
                "diffusers.pipelines.deprecated.stable_diffusion_sag."
                "pipeline_stable_diffusion_sag.CrossAttnStoreProcessor",
                "diffusers.pipelines.deprecated.stable_diffusion_variants."
                "pipeline_stable_diffusion_pix2pix_zero.Pix2PixZeroAttnProcessor",
            ),
            _PROBABILITIES,
        ),
        (
            (
                "diffusers.pipelines.deprecated.text_to_video_synthesis."
                "pipeline_text_to_video_zero.CrossFrameAttnProcessor",
                "diffusers.pipelines.deprecated.text_to_video_synthesis."
                "pipeline_text_to_video_zero_sdxl.CrossFrameAttnProcessor",
                "diffusers.pipelines.kolors.text_encoder.CoreAttention",
            ),
            _OLD,
        ),
        (
            ("diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion.LDMBertAttention",),
            "scales heads between the softmax and the values, and hands the probabilities out",
        ),
        (
            (
                "diffusers.models.transformers.transformer_anyflow_far.AnyFlowCausalAttnProcessor",
                "diffusers.models.transformers.transformer_kandinsky6_sr.Kandinsky6SRAttnProcessor",
                "diffusers.models.autoencoders.ltx2_diffusion_decoder."
                "LTX2VideoVaeNeighborhoodAttnProcessor",
            ),
            _FLEX,
        ),
        (
            (
                "diffusers.models.transformers.transformer_kandinsky.nablaT_v2",
                "diffusers.models.transformers.transformer_kandinsky6_sr.nabla_block_mask",
            ),
            "the softmax of block means chooses the blocks of flex attention",
        ),
        (
            ("transformers.models.clap.modeling_clap.ClapAudioSelfAttention",),
            "the audio half, which scores finished audio; hands the probabilities out",
        ),
    )
    for target in targets
)


def _rules() -> Iterator[Rewrite]:
    for module, qualname, kind, count in _TABLE:
        yield Rewrite(module=f"diffusers.models.{module}", qualname=qualname, counts={kind: count})
    for model, qualname, kind in _ENCODERS:
        yield Rewrite(
            module=f"transformers.models.{model}.modeling_{model}",
            qualname=qualname,
            counts={kind: 1},
        )


RECORDS, _BY_NAME = records(
    _rules(),
    family="composed_attention",
    becomes="mindiesd.attention_forward",
    why="one fused kernel instead of two products and a softmax with the weights in memory",
    when="query, key and value of one half or float32 dtype, no gradients, no dropout",
    numerics="scores and softmax in float32 or better",
)
build = builder(_BY_NAME)


# What is attended to, of the operands of each kind.


class Call(NamedTuple):
    """One attention: query [B, N, Sq, D], key [B, N, Skv, D], value [B, N, Skv, Dv]."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float


# From operands to a call or a reason, and from a result of the statements to [B, N, Sq, Dv].
Read = Callable[..., Call | str]
Turn = Callable[..., Any]


def heads(query: Tensor, key: Tensor, value: Tensor, scale: Any) -> Call | str:
    """Query [B, N, Sq, D], key and value likewise; query and key are scaled, each."""
    if type(scale) is not float and type(scale) is not int:
        return SCALE
    return Call(query, key, value, None, float(scale) * scale)


def channels_first(query: Tensor, key: Tensor, value: Tensor, scale: Any) -> Call | str:
    """Query [B * N, D, Sq], key and value likewise; query and key are scaled, each."""
    if type(scale) is not float and type(scale) is not int:
        return SCALE
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
        return SHAPE
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return Call(query[:, None], key[:, None], value[:, None], None, float(scale) * scale)


def pixels(
    query: Tensor, key: Tensor, value: Tensor, batch: int, channels: int, height: int, width: int
) -> Call | str:
    """Query [B, H * W, C], key [B, C, H * W], value [B, C, H, W]; scaled by C ** -0.5."""
    if (
        query.dim() != 3
        or key.dim() != 3
        or value.shape != (batch, channels, height, width)
        or query.shape[2] != channels
        or query.shape[1] != height * width
    ):
        return SHAPE
    key, value = key.transpose(1, 2), value.flatten(2).transpose(1, 2)
    return Call(query[:, None], key[:, None], value[:, None], None, int(channels) ** -0.5)


def scored(query: Tensor, key: Tensor, value: Tensor, attn: Any, mask: Any) -> Call | str:
    """Query [B * N, Sq, D], key and value likewise; mask broadcastable to the scores, added."""
    import torch

    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
        return SHAPE
    if type(attn.scale) is not float and type(attn.scale) is not int:
        return SCALE
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            return law.NOT_A_TENSOR
        if mask.dtype is not (torch.float32 if attn.upcast_attention else query.dtype):
            return MASK_DTYPE
        if mask.dim() == 3:
            mask = mask[:, None]
    return Call(query[:, None], key[:, None], value[:, None], mask, float(attn.scale))


def _as_they_are(out: Tensor, *_: Any) -> Tensor:
    return out


def _with_one_head(out: Tensor, *_: Any) -> Tensor:
    return out[:, None]


def _without_heads(out: Tensor, *_: Any) -> Tensor:
    return out[:, 0]


def _with_channels_last(out: Tensor, *_: Any) -> Tensor:
    return out.flatten(2).transpose(1, 2)[:, None]


def _with_channels_first(out: Tensor, *_: Any) -> Tensor:
    return out[:, 0].transpose(1, 2)


def _as_image(out: Tensor, _: Any, __: Any, value: Tensor) -> Tensor:
    return out[:, 0].transpose(1, 2).reshape(value.shape)


# Replacements.


def _without_keys(out: Tensor, largest: Tensor) -> Tensor:
    """``out`` with NaN in the rows that see no key, as a softmax over nothing gives.

    Where a kernel gives zeros, whoever writes attention out gets NaN, and may look for it. It costs
    three launches where there is a mask, and the mask cannot be asked without waiting for the
    device.

    Args:
        out: [..., Sq, Dv].
        largest: the largest element of each row of the mask, broadcastable to [..., Sq, 1]: minus
            infinity where all of them are. Zero times a number is zero, times infinity NaN.
    """
    return out + (largest * 0).to(out.dtype)


def _fused(original: Any, site: Site, read: Read, back: Turn) -> Callable[..., Any]:
    """The replacement of statements whose operands ``read`` understands."""
    from mindiesd.ops import attention

    unfit = law.unfit_for_kernels()

    def refusal(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
        reason = None if mask is None else unfit(query, key, mask)
        return attention.refusal(query, key, value, mask) if reason is None else reason

    def fused(query: Any, key: Any, value: Any, *more: Any) -> Any:
        found: Call | str | None = unfit(query, key, value)
        if found is None:
            found = read(query, key, value, *more)
        if isinstance(found, Call):
            if site.takes(refusal(*found[:4])):
                out = attention.attend(*found)
                if found.mask is not None:
                    out = _without_keys(out, found.mask.amax(-1, keepdim=True))
                return back(out, query, key, value)
        else:
            site.takes(found)
        return original(query, key, value, *more)

    return fused


def build_heads(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of attention of heads [B, N, S, D]."""
    return _fused(original, site, heads, _as_they_are)


def build_channels_first(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of attention of heads [B * N, D, S]."""
    return _fused(original, site, channels_first, _with_channels_first)


def build_pixels(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of attention of the pixels of images [B, C, H, W]."""
    return _fused(original, site, pixels, _as_image)


# Fingerprints of the methods get_attention_scores that compute
# softmax(scale * query @ key.T + mask), upcast or not.
_SCORES = ("14edfe37ff6e4e7e",)


def build_scored(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``attn.get_attention_scores(query, key, mask)`` times the value.

    Raises:
        SourceUnknown: the method is not the known one.
    """
    from diffusers.models import attention, attention_processor

    from mindiesd.patches.rewriting import pattern
    from mindiesd.patches.rewriting.source import SourceUnknown, read

    known = []
    for owner in (attention_processor.Attention, getattr(attention, "AttentionModuleMixin", None)):
        method = getattr(owner, "get_attention_scores", None)
        if method is not None and pattern.fingerprint(read(method).tree) in _SCORES:
            known.append(method)
    if not known:
        raise SourceUnknown("get_attention_scores: another source than the known")

    def own(query: Tensor, key: Tensor, value: Tensor, attn: Any, mask: Any) -> Call | str:
        method = getattr(type(attn), "get_attention_scores", None)
        if not any(method is one for one in known) or "get_attention_scores" in attn.__dict__:
            return SCORES
        return scored(query, key, value, attn, mask)

    return _fused(original, site, own, _without_heads)


def build_pooled(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``attention(probe, states, states)[0]``."""
    from torch.nn import MultiheadAttention

    from mindiesd.patches import modulation

    unfit, hooked = law.unfit_for_kernels(), modulation._hook_finder()
    grad_enabled, _, _ = law.context()

    def refusal(attention: Any, probe: Any, states: Any, mask: Any) -> str | None:
        if type(attention) is not MultiheadAttention or hooked(attention):
            return MODULE
        if probe is states:
            return SELF_ATTENTION
        if attention.training and attention.dropout:
            return law.DROPOUT
        if grad_enabled() and any(weight.requires_grad for weight in attention.parameters()):
            return law.GRADIENTS
        if mask is None:
            return unfit(probe, states, states)
        return unfit(probe, states, mask) or (None if mask.dtype is probe.dtype else MASK_DTYPE)

    def pooled(attention: Any, probe: Any, states: Any, *given: Any) -> Any:
        # What it replaces takes a mask, or none.
        (mask,) = given or (None,)
        if site.takes(refusal(attention, probe, states, mask)):
            return attention(probe, states, states, attn_mask=mask, need_weights=False)[0]
        return original(attention, probe, states, *given)

    return pooled


# References.


def _reference(read: Read, into: Turn) -> Callable[..., tuple[Tensor, Turn]]:
    """What ``verify=N`` compares with, from the formula; see :mod:`mindiesd.patches.sdpa`."""

    def reference(*operands: Any) -> tuple[Tensor, Turn]:
        from mindiesd.patches import sdpa

        found = read(*operands)
        if isinstance(found, str):
            raise ValueError(found)
        query, key, value, mask, scale = found
        exact, rows = sdpa.reference(query, key, value, mask, scale=scale)
        return exact, lambda whole: rows(into(whole))

    return reference


reference_heads = _reference(heads, _as_they_are)
reference_channels_first = _reference(channels_first, _with_channels_last)
reference_pixels = _reference(pixels, _with_channels_last)
reference_scored = _reference(scored, _with_one_head)
