"""Modulations and gates written out in the forward of a block: no function of their own to patch.

    norm(x) * (1 + scale) + shift        x + gate * y

The functions are rewritten from their own source, see :mod:`mindiesd.patches.rewriting`; this
module holds what is looked for, what it becomes, and where.

Left alone, because nothing is gained or it would not be as accurate: products without a shift
(``norm(x) * scale``), gates of a dtype that half-precision activations are promoted to, and gates
in only one branch of a condition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import law
from mindiesd.patches.rewriting.records import builder, records, rows
from mindiesd.patches.rewriting.rules import Expression
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

HOOKED = "norm with hooks, or with a forward of its own"
DEVICES = "operands on several devices"
SHAPE = "scale or shift does not span the last dimension"

# Elements; 1 is added to all of a projection where that costs no more than a launch.
_LARGEST_PROJECTION = 1 << 20

NORM_MODULATE = Expression(
    name="norm_modulate",
    spellings=(
        "NORM(X) * (1 + SCALE) + SHIFT",
        "NORM(X) * (SCALE + 1.0) + SHIFT",
        "(1 + SCALE) * NORM(X) + SHIFT",
        "(1.0 + SCALE) * NORM(X) + SHIFT",
    ),
    holes=("NORM", "X", "SCALE", "SHIFT"),
    calls=("X",),
    members=("NORM",),
    joins=("NORM(X)",),
    build="mindiesd.patches.modulation:build_norm_modulate",
)
CAST_NORM_MODULATE = Expression(
    name="norm_modulate",
    spellings=("NORM(X).to(dtype=DTYPE) * (1 + SCALE) + SHIFT",),
    holes=("NORM", "X", "DTYPE", "SCALE", "SHIFT"),
    calls=("X",),
    members=("NORM",),
    joins=("NORM(X).to(dtype=DTYPE)",),
    build="mindiesd.patches.modulation:build_cast_norm_modulate",
)
MODULATE = Expression(
    name="modulate",
    spellings=(
        "X * (1 + SCALE) + SHIFT",
        "X * (1.0 + SCALE) + SHIFT",
        "X * (SCALE + 1.0) + SHIFT",
        "(1 + SCALE) * X + SHIFT",
    ),
    holes=("X", "SCALE", "SHIFT"),
    calls=("X",),
    build="mindiesd.patches.modulation:build_modulate",
)
GATE = Expression(
    name="gated_residual",
    spellings=("X + Y * GATE", "Y * GATE + X"),
    holes=("X", "Y", "GATE"),
    calls=("X", "Y", "GATE"),
    joins=("GATE * Y",),
    build="mindiesd.patches.modulation:build_gated_residual",
)

# Module (of diffusers.models.transformers where it has no dot, else of diffusers.models), function,
# and how many modulated norms (n), other modulations (m) and gated residuals (g) it has.
_TABLE = """
diffusers.models.attention JointTransformerBlock.forward n2 g5
diffusers.models.attention BasicTransformerBlock.forward n2 m1
ace_step_transformer AceStepTransformerBlock.forward n2 g2
ace_step_transformer AceStepTransformer1DModel.forward n1
auraflow_transformer_2d AuraFlowPreFinalBlock.forward g1
auraflow_transformer_2d AuraFlowSingleTransformerBlock.forward n1 g2
auraflow_transformer_2d AuraFlowJointTransformerBlock.forward n2 g4
cogvideox_transformer_3d CogVideoXBlock.forward g4
consisid_transformer_3d ConsisIDBlock.forward g4
dit_transformer_2d DiTTransformer2DModel.forward n1
latte_transformer_3d LatteTransformer3DModel.forward n1
lumina_nextdit2d LuminaNextDiTBlock.forward g3
pixart_transformer_2d PixArtTransformer2DModel.forward m1
sana_transformer SanaTransformerBlock.forward n2 g2
t5_film_transformer T5FiLMLayer.forward m1
transformer_2d Transformer2DModel._get_output_for_patched_inputs n2
transformer_2d_dreamlite BasicTransformerBlockDreamLite.forward n2 m1
transformer_allegro AllegroTransformerBlock.forward n2 g1
transformer_allegro AllegroTransformer3DModel.forward n1
transformer_anyflow AnyFlowTransformerBlock.forward n2 g2
transformer_anyflow AnyFlowTransformer3DModel.forward n1
transformer_anyflow_far AnyFlowTransformerBlock.forward n2 g2
transformer_anyflow_far AnyFlowFARTransformer3DModel._forward_inference n1
transformer_anyflow_far AnyFlowFARTransformer3DModel._forward_train n1
transformer_bria BriaTransformerBlock.forward n2 g4
transformer_bria BriaSingleTransformerBlock.forward g1
transformer_bria_fibo BriaFiboTransformerBlock.forward n2 g4
transformer_bria_fibo BriaFiboSingleTransformerBlock.forward g1
transformer_bria_fibo2 BriaFibo2TransformerBlock.forward g3
transformer_chroma ChromaTransformerBlock.forward n2 g4
transformer_chroma ChromaSingleTransformerBlock.forward g1
transformer_chronoedit WanTransformerBlock.forward n2 g2
transformer_chronoedit ChronoEditTransformer3DModel.forward n1
transformer_cogview3plus CogView3PlusTransformerBlock.forward n2 g4
transformer_cogview4 CogView4TransformerBlock.forward n2 g4
transformer_cosmos CosmosTransformerBlock.forward g3
transformer_easyanimate EasyAnimateTransformerBlock.forward g4
transformer_ernie_image ErnieImageSharedAdaLNBlock.forward m2
transformer_flux FluxTransformerBlock.forward n2 g4
transformer_flux FluxSingleTransformerBlock.forward g1
transformer_flux2 Flux2TransformerBlock.forward n4 g4
transformer_flux2 Flux2SingleTransformerBlock.forward n1 g1
transformer_flux3 Flux3ModeTransformerBlock.forward n1 g1
transformer_flux3 Flux3SingleTransformerBlock.forward n2 g2
transformer_glm_image GlmImageTransformerBlock.forward n2 g4
transformer_helios HeliosTransformerBlock.forward n2 g2
transformer_hidream_image HiDreamImageTransformerBlock.forward c4 g4
transformer_hidream_image HiDreamImageSingleTransformerBlock.forward c2 g2
transformer_hidream_image HiDreamImageOutEmbed.forward n1
transformer_hunyuan_video HunyuanVideoTransformerBlock.forward n2 g4
transformer_hunyuan_video HunyuanVideoSingleTransformerBlock.forward g1
transformer_hunyuan_video HunyuanVideoTokenReplaceTransformerBlock.forward m3 g6
transformer_hunyuan_video HunyuanVideoIndividualTokenRefinerBlock.forward g2
transformer_hunyuan_video15 HunyuanVideo15TransformerBlock.forward n2 g4
transformer_hunyuan_video15 HunyuanVideo15IndividualTokenRefinerBlock.forward g2
transformer_hunyuanimage HunyuanImageTransformerBlock.forward n2 g4
transformer_hunyuanimage HunyuanImageSingleTransformerBlock.forward g1
transformer_hunyuanimage HunyuanImageIndividualTokenRefinerBlock.forward g2
transformer_ideogram4 Ideogram4TransformerBlock.forward g2
transformer_joyimage JoyImageTransformerBlock.forward n4 g4
transformer_joyimage_edit_plus JoyImageEditPlusTransformerBlock.forward n4 g4
transformer_kandinsky Kandinsky5TransformerEncoderBlock.forward n2 g2
transformer_kandinsky Kandinsky5TransformerDecoderBlock.forward n3 g3
transformer_kandinsky Kandinsky5OutLayer.forward n1
transformer_kandinsky6 apply_scale_shift m1
transformer_kandinsky6 apply_gate_sum g1
transformer_kandinsky6_sr apply_scale_shift m1
transformer_kandinsky6_sr apply_gate_sum g1
transformer_krea2 Krea2TransformerBlock.forward n2 g2
transformer_krea2 Krea2FinalLayer.forward n1
transformer_longcat_audio_dit AudioDiTBlock.forward m2 g2
transformer_longcat_image LongCatImageTransformerBlock.forward n2 g4
transformer_longcat_image LongCatImageSingleTransformerBlock.forward g1
transformer_ltx LTXVideoTransformerBlock.forward n1 m1 g2
transformer_ltx LTXVideoTransformer3DModel.forward n1
transformer_ltx2 LTX2VideoTransformerBlock.forward n4 m8 g6
transformer_ltx2 LTX2VideoTransformer3DModel.forward n2
transformer_lumina2 Lumina2TransformerBlock.forward g2
transformer_minimax_h3 MiniMaxH3TransformerBlock.forward m2 g2
transformer_motif_video MotifVideoTransformerBlock.forward n2 g4
transformer_motif_video MotifVideoSingleTransformerBlock.forward g1
transformer_nucleusmoe_image NucleusMoEImageTransformerBlock.forward g2
transformer_ovis_image OvisImageTransformerBlock.forward n2 g4
transformer_ovis_image OvisImageSingleTransformerBlock.forward g1
transformer_prx PRXBlock.forward n2 g2
transformer_prx FinalLayer.forward n1
transformer_qwenimage QwenImageTransformerBlock._modulate m1
transformer_qwenimage QwenImageTransformerBlock.forward g4
transformer_qwenimage21 QwenImage21TransformerBlock.forward g2
transformer_rfd4_proteina RFD4ProteinaAdaptiveNorm.forward g1
transformer_sana_video SanaVideoTransformerBlock.forward n2 g2
transformer_sana_wm SanaVideoMSCamCtrlBlock.forward m2
transformer_sana_wm_refiner SanaWMLTX2RefinerTransformerBlock.forward n2 g2
transformer_sana_wm_refiner SanaWMLTX2RefinerTransformer3DModel.forward n1
transformer_sd3 SD3SingleTransformerBlock.forward n1 g2
transformer_skyreels_v2 SkyReelsV2TransformerBlock.forward n2 g2
transformer_skyreels_v2 SkyReelsV2Transformer3DModel.forward n1
transformer_stable_audio3 _modulate m1
transformer_stable_audio3 StableAudio3DiTBlock.forward g2
transformer_wan WanTransformerBlock.forward n2 g2
transformer_wan WanTransformer3DModel.forward n1
transformer_wan_animate WanTransformerBlock.forward n2 g2
transformer_wan_animate WanAnimateTransformer3DModel.forward m1
transformer_wan_animate_2 WanAnimate2TransformerBlock.forward n2 g2
transformer_wan_animate_2 Head.forward n1
transformer_wan_vace WanVACETransformerBlock.forward n2 g2
transformer_wan_vace WanVACETransformer3DModel.forward n1 g2
transformer_z_image ZImageTransformerBlock.forward g2
controlnets.controlnet_z_image ZImageTransformerBlock.forward g2
controlnets.controlnet_z_image ZImageControlTransformerBlock.forward g2
diffusers.models.attention_processor SpatialNorm.forward g1
autoencoders.autoencoder_cosmos3_audio Snake1d.forward g1
autoencoders.autoencoder_kandinsky6_sr Kandinsky6SRSpatialNorm3D.forward g1
autoencoders.autoencoder_kl_cogvideox CogVideoXSpatialNorm3D.forward g1
autoencoders.autoencoder_kl_kvae KVAEDecoderSpatialNorm2D.forward g1
autoencoders.autoencoder_kl_kvae_audio KVAEAudioSnake1d.forward g1
autoencoders.autoencoder_kl_kvae_video KVAECachedSpatialNorm3D.forward g1
autoencoders.autoencoder_kl_ltx LTXVideoResnetBlock3d.forward m2
autoencoders.autoencoder_kl_ltx LTXVideoDecoder3d.forward m1
autoencoders.autoencoder_kl_ltx2 LTX2VideoResnetBlock3d.forward m2
autoencoders.autoencoder_kl_ltx2 LTX2VideoDecoder3d.forward m1
autoencoders.autoencoder_kl_minimax_h3 MiniMaxH3VideoTransformerBlock.forward g2
autoencoders.autoencoder_kl_minimax_h3_audio MiniMaxH3AudioSnake1d.forward g1
autoencoders.autoencoder_kl_minimax_h3_audio MiniMaxH3AudioSnakeBeta.forward g1
autoencoders.autoencoder_longcat_audio_dit Snake1d.forward g1
autoencoders.autoencoder_oobleck Snake1d.forward g1
autoencoders.autoencoder_rfd4_proteina RFD4ProteinaAdaptiveNorm.forward g1
autoencoders.autoencoder_same DynamicTanh.forward g1
autoencoders.ltx2_diffusion_decoder LTX2VideoVaeDiffusionNABlock.forward m2
autoencoders.minimax_music3_vocoder MiniMaxMusic3Snake1d.forward g1
autoencoders.mmaudio_vocoder MMAudioSnakeBeta.forward g1
latent_upscaler.latent_upscaler_kandinsky6_sr Kandinsky6SRLatentUpscalerModulatedNorm.forward g1
diffusers.models.normalization AdaGroupNorm.forward m1
diffusers.models.normalization GlobalResponseNorm.forward g1
diffusers.models.resnet AlphaBlender.forward g1
unets.unet_kandinsky3 Kandinsky3ConditionalGroupNorm.forward m1
unets.unet_stable_cascade SDCascadeTimestepBlock.forward m1
unets.unet_stable_cascade GlobalResponseNorm.forward g1
unets.uvit_2d ConvNextBlock.forward m1
"""

# In the order in which they are looked for.
_KINDS = {"c": CAST_NORM_MODULATE, "n": NORM_MODULATE, "m": MODULATE, "g": GATE}


def home(module: str) -> str:
    """The dotted name of a module; transformers are named by their last part."""
    if module.startswith("diffusers."):
        return module
    return (
        f"diffusers.models.{module}" if "." in module else f"diffusers.models.transformers.{module}"
    )


RECORDS, _BY_NAME = records(
    rows(_TABLE, _KINDS, home),
    family="modulation",
    becomes=lambda rule: (
        "mindiesd.layernorm_scale_shift"
        if NORM_MODULATE in rule.counts or CAST_NORM_MODULATE in rule.counts
        else "torch.addcmul"
    ),
    why="one or two kernels instead of four for a modulated norm, one instead of two for a gate",
    when="tensors of one half or float32 dtype, layer norms without hooks, no gradients",
    numerics="fewer roundings than the expressions have",
)
build = builder(_BY_NAME)


def build_norm_modulate(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``norm(x) * (1 + scale) + shift``."""
    import torch
    from diffusers.models.normalization import FP32LayerNorm
    from torch import float32 as single
    from torch.nn import LayerNorm

    from mindiesd.ops import ada_norm
    from mindiesd.ops import norm as norms

    kinds = (LayerNorm, FP32LayerNorm)
    hooked = _hook_finder()
    unlike, unlike_or_narrower = _unlike(), _unlike(narrower=True)

    def refusal(norm: Any, x: Any, scale: Any, shift: Any) -> str | None:
        reason = unlike_or_narrower(x, scale, shift)
        if reason is not None:
            return reason
        if hooked(norm):
            return HOOKED
        for parameter in (norm.weight, norm.bias):
            if parameter is not None:
                # The other kind casts what it is given, and its parameters, itself.
                same = unlike if type(norm) is LayerNorm else unlike_or_narrower
                reason = same(x, parameter, parameter)
                if reason is not None:
                    return reason
        if len(norm.normalized_shape) != 1:
            return law.NOT_LAST_DIM
        hidden = norm.normalized_shape[0]
        if x.dim() < 2 or x.shape[-1] != hidden:
            return law.NOT_LAST_DIM
        if not scale.dim() or not shift.dim():
            return SHAPE
        if scale.shape[-1] != hidden or shift.shape[-1] != hidden:
            return SHAPE
        return None

    def norm_modulate(norm: Any, x: Any, scale: Any, shift: Any) -> Any:
        if type(norm) in kinds:
            reason = refusal(norm, x, scale, shift)
            # In half precision all in one costs more: it is exact only in float32, so that x, the
            # parameters and the result are cast.
            if reason is None and x.dtype is single:
                site.takes(None)
                gain = one_more(scale) if scale.dtype is single else None
                if gain is not None and norm.weight is None and norm.bias is None:
                    if scale.shape[:-1] == shift.shape[:-1] == (1, 1):
                        hidden, offset = norm.normalized_shape, shift.float()
                        return norms.layer_norm(
                            x, hidden, gain.view(hidden), offset.view(hidden), norm.eps
                        )
                    normed = norms.layer_norm(x, norm.normalized_shape, None, None, norm.eps)
                    return torch.addcmul(shift.float(), normed, gain)
                return ada_norm.layer_norm_scale_shift(
                    x, norm.weight, norm.bias, norm.eps, scale, shift
                )
            if reason is not None and reason is not HOOKED:
                site.takes(reason)
                return original(norm, x, scale, shift)
        # Called as ever; what follows may still be one kernel.
        normed = norm(x)

        def again(_: Any) -> Any:
            return normed

        if site.takes(unlike_or_narrower(normed, scale, shift)):
            return scale_and_shift(normed, scale, shift)
        return original(again, x, scale, shift)

    return norm_modulate


def build_cast_norm_modulate(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``norm(x).to(dtype=dtype) * (1 + scale) + shift``."""

    def plain(norm: Any, x: Any, scale: Any, shift: Any) -> Any:
        return original(norm, x, x.dtype, scale, shift)

    norm_modulate = build_norm_modulate(plain, site)

    def cast_norm_modulate(norm: Any, x: Any, dtype: Any, scale: Any, shift: Any) -> Any:
        if getattr(x, "dtype", None) is dtype:
            # The norm's result is cast to what it is.
            return norm_modulate(norm, x, scale, shift)
        site.takes(law.MIXED_DTYPES)
        return original(norm, x, dtype, scale, shift)

    return cast_norm_modulate


def build_modulate(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``x * (1 + scale) + shift``."""
    unlike_or_narrower = _unlike(narrower=True)

    def modulate(x: Any, scale: Any, shift: Any) -> Any:
        if site.takes(unlike_or_narrower(x, scale, shift)):
            return scale_and_shift(x, scale, shift)
        return original(x, scale, shift)

    return modulate


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``x * (1 + scale) + shift``; scale and shift of x's dtype, or half where that is float32."""
    import torch

    if shift.dtype is not x.dtype:
        shift = shift.float()
    if scale.dtype is not x.dtype:
        return torch.addcmul(shift, x, 1 + scale.float())
    gain = one_more(scale)
    return torch.addcmul(shift, x, 1 + scale if gain is None else gain)


def one_more(scale: Tensor) -> Tensor | None:
    """``1 + scale``, made once for all parts of the projection that the scale is one of.

    None where the scale is no part of one, or of one with few others: a block takes its modulations
    from six parts of one small tensor, of which two are scales.
    """
    import torch

    if torch.compiler.is_dynamo_compiling() or scale.is_inference():
        return None
    whole = scale._base
    if (
        whole is None
        or whole.dtype is not scale.dtype
        or whole.requires_grad
        or not 4 * scale.numel() <= whole.numel() <= _LARGEST_PROJECTION
        or not whole.is_contiguous()
    ):
        return None
    from mindiesd.patches.memory import ONE_MORE

    offset = scale.storage_offset() - whole.storage_offset()
    return ONE_MORE(whole).as_strided(scale.shape, scale.stride(), offset)


def build_gated_residual(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``x + y * gate``."""
    import torch

    unlike_or_narrower = _unlike(narrower=True)

    def gated_residual(x: Any, y: Any, gate: Any) -> Any:
        reason = unlike_or_narrower(x, y, gate)
        if reason is None and y.dtype is not gate.dtype:
            # The product is float32 if one factor is.
            y, gate = y.float(), gate.float()
        if reason is None and y.dtype is not x.dtype:
            reason = law.MIXED_DTYPES
        if site.takes(reason):
            return torch.addcmul(x, y, gate)
        return original(x, y, gate)

    return gated_residual


def _unlike(*, narrower: bool = False) -> Callable[[Any, Any, Any], str | None]:
    """Why three operands may not go into one kernel; None if they may.

    Args:
        narrower: whether the last two may be half precision where the first is float32.
    """
    import torch

    unfit = law.unfit_for_kernels()
    half_or_single = (torch.float32, torch.bfloat16, torch.float16)

    def unlike(x: Any, y: Any, z: Any) -> str | None:
        reason = unfit(x, y, z)
        if reason is not None:
            return reason
        dtype = x.dtype
        if dtype not in half_or_single:
            return law.DTYPE
        if y.dtype is not dtype or z.dtype is not dtype:
            if not narrower or dtype is not torch.float32:
                return law.MIXED_DTYPES
            if y.dtype not in half_or_single or z.dtype not in half_or_single:
                return law.MIXED_DTYPES
        # A tensor without dimensions may be on another device.
        if x.device != y.device or x.device != z.device:
            return DEVICES
        return None

    return unlike


def _hook_finder() -> Callable[[Any], bool]:
    """Whether calling a module does more than its class's forward."""
    from torch.nn.modules import module as torch_module

    from mindiesd.patches.pipeline import scoped_only

    def hooked(module: Any) -> bool:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        ):
            return True
        return not scoped_only(module)

    return hooked
