"""The norms of video autoencoders: RMS norm over the channels, which are dimension 1.

diffusers has one class a model, written alike: ``F.normalize(x) * sqrt(C) * gamma + bias`` with a
cast to float32 and back for half precision. As eight operators over the largest tensors there are,
that is most of the memory traffic between two convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import law, source
from mindiesd.patches.registry import Left, Patch
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

NOTHING_SAVED = "float32 without a bias: as few operators as it can be"

# Digest of the source -> whether there is a choice of the dimension, and a bias to add.
FORMS = {
    "a2dd1355e16b140f": True,
    # diffusers 0.35 and 0.36, which normalise half precision in half precision.
    "038551d20de918cb": True,
    "da785aaecf6547ba": False,
    "ab8d2cf02d705ce7": False,
}

# Module under diffusers.models, class, and the name of the parameter where it is not x.
CLASSES: tuple[tuple[str, ...], ...] = (
    ("autoencoders.autoencoder_kandinsky6_sr", "Kandinsky6VAERMSNorm", "hidden_states"),
    ("autoencoders.autoencoder_kl_hunyuanimage_refiner", "HunyuanImageRefinerRMS_norm"),
    ("autoencoders.autoencoder_kl_hunyuanvideo15", "HunyuanVideo15RMS_norm"),
    ("autoencoders.autoencoder_kl_qwenimage", "QwenImageRMS_norm"),
    ("autoencoders.autoencoder_kl_qwenimage21", "QwenImage21RMS_norm"),
    ("autoencoders.autoencoder_kl_wan", "WanRMS_norm"),
    (
        "latent_upscaler.latent_upscaler_kandinsky6_sr",
        "Kandinsky6SRLatentUpscalerRMSNorm",
        "hidden_states",
    ),
)

RECORDS = tuple(
    Patch(
        name=f"diffusers_{name}",
        family="channel_norm",
        module=f"diffusers.models.{module}",
        attribute=f"{name}.forward",
        after=f"diffusers.models.{module}",
        becomes="mindiesd.ops.norm.unit_norm",
        build="mindiesd.patches.channel_norm:build",
        why=(
            "half precision: six operators, three of them over the whole tensor, instead of eight, "
            "all but one over the whole; in float32 five instead of six"
        ),
        when="the source is one of the known forms; half, or float32 where a bias is added",
        numerics="float32 inside and one rounding; the original's result dtype and strides",
        requires={"diffusers": ">=0.35,<0.44"},
        parameters=("self", *(argument or ["x"])),
    )
    for module, name, *argument in CLASSES
)

_GROUPS = (
    "group norms of one frame or chunk at a time: each is one kernel, copies around them aside"
)
LEFT = tuple(
    Left(f"diffusers.models.autoencoders.{target}", _GROUPS)
    for target in (
        "autoencoder_kl_cosmos.CosmosCausalGroupNorm",
        "autoencoder_kl_kvae_video.KVAECachedGroupNorm",
        "autoencoder_kl_minimax_h3.MiniMaxH3VideoGroupNorm",
        "autoencoder_kl_mochi.MochiChunkedGroupNorm3D",
    )
)


def build(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of the ``forward`` of one of :data:`CLASSES`."""
    import torch
    from torch import Tensor

    from mindiesd.ops import norm

    record = next(record for record in RECORDS if record.name == site.name)
    digest, _ = source.read(original, record.module, record.attribute)
    if digest not in FORMS:
        raise source.Unrecognised("its source is none of the known forms of a channel norm")
    choices = FORMS[digest]
    grad_enabled, jit_tracing, autocast = law.context()
    half = (torch.bfloat16, torch.float16)
    half_or_single = (torch.float32, *half)

    def refusal(x: Any, gamma: Any, bias: Any) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not isinstance(x, Tensor):
            return law.NOT_A_TENSOR
        if x.dtype not in half_or_single or gamma.dtype not in half_or_single:
            return law.DTYPE
        if not choices and x.dtype not in half:
            return NOTHING_SAVED
        if bias is not None and (not isinstance(bias, Tensor) or bias.dtype not in half_or_single):
            return law.UNUSUAL_ARGUMENT
        if x.dim() < 2 or gamma.dim() > x.dim():
            return law.WEIGHT_SHAPE
        if autocast():
            return law.AUTOCAST
        if grad_enabled() and (
            x.requires_grad or gamma.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return law.GRADIENTS
        return None

    def compute(self: Any, x: Tensor) -> Tensor:
        if site.everywhere or site.in_force():
            gamma, bias, dim = self.gamma, None, 1
            if choices:
                if not self.channel_first:
                    dim = -1
                bias = self.bias
                # The number 0.0 where there is none.
                if isinstance(bias, float) and bias == 0.0:
                    bias = None
            reason = refusal(x, gamma, bias)
            if site.takes(reason):
                return norm.unit_norm(x, dim, self.scale, gamma, bias)
        kept: Tensor = original(self, x)
        return kept

    if record.parameters == ("self", "x"):

        def forward(self: Any, x: Tensor) -> Tensor:
            return compute(self, x)

        return forward

    def forward_hidden_states(self: Any, hidden_states: Tensor) -> Tensor:
        return compute(self, hidden_states)

    return forward_hidden_states
