"""Group norms followed by SiLU, in the resnet blocks of UNets and autoencoders.

    act(norm(x))

is one kernel on an Ascend NPU, which rounds once. It stands in two statements of a forward, now and
then with the norm in the branches of a condition; the functions are rewritten from their own
source, see :mod:`mindiesd.patches.rewriting`. So is the rest of these blocks: a division by an
output scale that is 1, a modulated norm, the projection of the conditioning. For a ``Sequential``
see :mod:`mindiesd.patches.sequential`.

Which norm and which activation a block has is known when it runs: anything but ``nn.GroupNorm`` and
``nn.SiLU`` is called as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindiesd.patches import conditioning, modulation
from mindiesd.patches.registry import Left
from mindiesd.patches.rewriting.records import builder, records, rows
from mindiesd.patches.rewriting.rules import Expression
from mindiesd.patches.scope import Site

OTHER_NORM = "not nn.GroupNorm, or with hooks"
OTHER_ACTIVATION = "not nn.SiLU, or with hooks"
SCALED = "divided by another number than 1.0"

_HERE = "mindiesd.patches.group_norm:"
_ACTIVATIONS = ("nonlinearity", "conv_act", "act", "conv_act_out", "base_conv_act")

NORM_ACT = Expression(
    name="norm_act",
    spellings=("ACT(NORM(X))",),
    holes=("ACT", "NORM", "X"),
    calls=("X",),
    members=("ACT", "NORM"),
    named=(("ACT", _ACTIVATIONS),),
    joins=("NORM(X)",),
    build=_HERE + "build_norm_act",
)
SCALED_SUM = Expression(
    name="scaled_sum",
    spellings=("(A + B) / FACTOR",),
    holes=("A", "B", "FACTOR"),
    calls=("A", "B"),
    build=_HERE + "build_scaled_sum",
)
QUOTIENT = Expression(
    name="quotient",
    spellings=("X / FACTOR",),
    holes=("X", "FACTOR"),
    build=_HERE + "build_quotient",
)

# Module of diffusers.models, function, and how many it has of: norms with an activation (s), scaled
# sums (d), quotients (f), modulations (m), projections of a SiLU (z).
_TABLE = """
attention_processor AttnProcessor2_0.__call__ f1
attention_processor AllegroAttnProcessor2_0.__call__ f1
attention_processor FusedAttnProcessor2_0.__call__ f1
attention_processor HunyuanAttnProcessor2_0.__call__ f1
attention_processor FusedHunyuanAttnProcessor2_0.__call__ f1
attention_processor MochiVaeAttnProcessor2_0.__call__ f2
attention_processor StableAudioAttnProcessor2_0.__call__ f1
attention_processor IPAdapterAttnProcessor2_0.__call__ f1
autoencoders.autoencoder_kl_allegro AllegroEncoder3D.forward s1
autoencoders.autoencoder_kl_allegro AllegroDecoder3D.forward s1
autoencoders.autoencoder_kl_cogvideox CogVideoXResnetBlock3D.forward s2 z1
autoencoders.autoencoder_kl_cogvideox CogVideoXEncoder3D.forward s1
autoencoders.autoencoder_kl_hunyuan_video HunyuanVideoResnetBlockCausal3D.forward s2
autoencoders.autoencoder_kl_hunyuan_video HunyuanVideoEncoder3D.forward s1
autoencoders.autoencoder_kl_hunyuan_video HunyuanVideoDecoder3D.forward s1
autoencoders.autoencoder_kl_hunyuanimage HunyuanImageResnetBlock.forward s2
autoencoders.autoencoder_kl_hunyuanimage HunyuanImageEncoder2D.forward s1
autoencoders.autoencoder_kl_hunyuanimage HunyuanImageDecoder2D.forward s1
autoencoders.autoencoder_kl_kvae KVAEResnetBlock2D.forward s2 z1
autoencoders.autoencoder_kl_kvae KVAEEncoder2D.forward s1
autoencoders.autoencoder_kl_magvit EasyAnimateResidualBlock3D.forward s2 d1
autoencoders.autoencoder_kl_magvit EasyAnimateEncoder.forward s1
autoencoders.autoencoder_kl_magvit EasyAnimateDecoder.forward s1
autoencoders.autoencoder_kl_temporal_decoder TemporalDecoder.forward s1
autoencoders.vae Encoder.forward s1
autoencoders.vae Decoder.forward s1
autoencoders.vae MaskConditionDecoder.forward s1
controlnets.controlnet_xs UNetControlNetXSModel.forward s1
resnet ResnetBlock2D.forward s3 z1 d1 m1
resnet ResnetBlockCondNorm2D.forward d1
resnet TemporalResnetBlock.forward s2 z1
unets.unet_2d UNet2DModel.forward s1
unets.unet_2d_blocks AttnSkipUpBlock2D.forward s1
unets.unet_2d_blocks SkipUpBlock2D.forward s1
unets.unet_2d_condition UNet2DConditionModel.forward s1
unets.unet_3d_condition UNet3DConditionModel.forward s1
unets.unet_dreamlite ResnetBlock2DDreamLite.forward s3 z1 d1 m1
unets.unet_i2vgen_xl I2VGenXLUNet.forward s1
unets.unet_kandinsky3 Kandinsky3UNet.forward s1
unets.unet_motion_model UNetMotionModel.forward s1
unets.unet_spatio_temporal_condition UNetSpatioTemporalConditionModel.forward s1
"""

# In the order in which they are looked for.
_KINDS = {
    "s": NORM_ACT,
    "z": conditioning.PROJECTION,
    "d": SCALED_SUM,
    "f": QUOTIENT,
    "m": modulation.MODULATE,
}

LEFT = (
    Left(
        "torch.nn.GroupNorm",
        "one kernel of the device already; with a SiLU after it, that of the block it stands in",
    ),
)


RECORDS, _BY_NAME = records(
    rows(_TABLE, _KINDS, "diffusers.models.{}".format),
    family="group_norm",
    becomes="mindiesd.ops.norm.group_norm_silu",
    why="one kernel instead of two for a group norm and SiLU; no division by 1",
    when="on an Ascend NPU, nn.GroupNorm and nn.SiLU without hooks, one dtype, no gradients",
    numerics="float32 inside and one rounding",
)
build = builder(_BY_NAME)


def build_norm_act(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``act(norm(x))``."""
    from mindiesd.ops import norm as norms

    refusal = refusal_of_norm_act()

    def norm_act(act: Any, norm: Any, x: Any) -> Any:
        if site.takes(refusal(act, norm, x)):
            return norms.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)
        return original(act, norm, x)

    return norm_act


def build_scaled_sum(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``(a + b) / factor``: dividing by 1.0 changes no bit."""
    unlike = modulation._unlike()

    def scaled_sum(a: Any, b: Any, factor: Any) -> Any:
        reason = unlike(a, b, b)
        if reason is None and not (type(factor) in (int, float) and factor == 1):
            reason = SCALED
        if site.takes(reason):
            return a + b
        return original(a, b, factor)

    return scaled_sum


def build_quotient(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``x / factor`` in a name's own place: x is used for nothing else."""
    unlike = modulation._unlike()

    def quotient(x: Any, factor: Any) -> Any:
        reason = unlike(x, x, x)
        if reason is None and not (type(factor) in (int, float) and factor == 1):
            reason = SCALED
        return x if site.takes(reason) else original(x, factor)

    return quotient


def refusal_of_norm_act() -> Callable[[Any, Any, Any], str | None]:
    """Why a norm and an activation are not one kernel; None if they are."""
    from torch.nn import GroupNorm, SiLU

    from mindiesd.ops import norm as norms

    hooked, unlike = modulation._hook_finder(), modulation._unlike()

    def refusal(act: Any, norm: Any, x: Any) -> str | None:
        if type(norm) is not GroupNorm or hooked(norm):
            return OTHER_NORM
        if type(act) is not SiLU or hooked(act):
            return OTHER_ACTIVATION
        weight, bias = norm.weight, norm.bias
        reason = unlike(x, x if weight is None else weight, x if bias is None else bias)
        if reason is not None:
            return reason
        return norms.group_norm_silu_refusal(x, weight, bias, norm.num_groups, norm.eps)

    return refusal
