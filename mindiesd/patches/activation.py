"""Activations and gated units that libraries write out in Python.

Gated units differ in which half of the projection is the gate, so every target is recognised by its
source (:mod:`mindiesd.patches.source`): ``npu_swiglu`` activates the first half, ``npu_geglu`` the
second, and where the halves are the other way round, or come out of two projections, putting them
in place would copy more than the kernel saves. Those are listed in :data:`LEFT`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import gelu, law, source
from mindiesd.patches.registry import Left, Patch
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

NO_KERNEL = "no kernel of this device computes it at once"
OTHER_ACTIVATION = "its activation is another one, or has hooks"

_HERE = "mindiesd.patches.activation:"
_VERSIONS = {"diffusers": ">=0.35,<0.44", "transformers": ">=4.51,<6"}


def _patch(name: str, target: str, parameters: tuple[str, ...], build: str, **more: Any) -> Patch:
    module, attribute = target.split(":")
    library = module.partition(".")[0]
    return Patch(
        name=name,
        family="activation",
        module=module,
        attribute=f"{attribute}.forward",
        after=module,
        build=_HERE + build,
        requires={library: _VERSIONS[library]},
        parameters=("self", *parameters),
        **more,
    )


def _elementwise(name: str, target: str, kind: str) -> Patch:
    fast = kind == "fast"
    return _patch(
        name,
        target,
        ("input",),
        "build_elementwise",
        becomes="mindiesd.get_activation_layer",
        why=(
            "one npu_fast_gelu kernel instead of mul, sigmoid, mul"
            if fast
            else "one kernel instead of eight elementwise ones"
        ),
        when="half or float32 input, no gradients" + (", on an NPU" if fast else ""),
        numerics="the same formula, rounded once",
    )


def _swiglu(name: str, target: str, why: str) -> Patch:
    return _patch(
        name,
        target,
        ("x",),
        "build_swiglu",
        becomes="mindiesd.ops.activation.swiglu",
        why=why,
        when="its gate is a plain SiLU; no gradients",
        numerics="bitwise equal on CPU and CUDA; on the NPU rounded once instead of twice",
    )


def _packed(name: str, target: str) -> Patch:
    return _patch(
        name,
        target,
        ("hidden_states",),
        "build_packed",
        becomes="mindiesd.ops.activation.swiglu",
        why="one npu_swiglu kernel instead of silu and mul, and half the memory traffic",
        when="its activation is a plain SiLU; no gradients",
        numerics="bitwise equal on CPU and CUDA; on the NPU rounded once instead of twice",
    )


# Digest of the source -> the kind of GELU it is.
GELUS = {
    "ef08ffeec9c5d261": "tanh",
    "7000ee2c14903e58": "tanh",
    "0c8002518194ca68": "tanh",
    "21a126ac25dd0b91": "fast",
    "8247164c55d55eab": "held",
}

RECORDS = (
    *gelu.RECORDS,
    _patch(
        "diffusers_GEGLU",
        "diffusers.models.activations:GEGLU",
        ("hidden_states", "args", "kwargs"),
        "build_geglu",
        becomes="mindiesd.ops.activation.geglu",
        why=(
            "the erf form on the NPU, as everywhere else; and a tensor on the CPU no longer fails "
            "where torch_npu is installed, by which diffusers chooses the kernel of the NPU"
        ),
        when="half or float32 input, no gradients, no deprecated argument",
        numerics="bitwise equal to what diffusers computes where there is no torch_npu; on the NPU "
        "rounded once instead of twice",
        # With torch_npu, the original computes the tanh form, and nothing on the CPU.
        reference=_HERE + "reference_geglu",
    ),
    _patch(
        "diffusers_ApproximateGELU",
        "diffusers.models.activations:ApproximateGELU",
        ("x",),
        "build_approximate",
        becomes="mindiesd.get_activation_layer",
        why="one npu_fast_gelu kernel instead of mul, sigmoid, mul",
        when="half or float32 input on an NPU, no gradients",
        numerics="the same formula, rounded once instead of three times",
    ),
    _swiglu(
        "diffusers_Flux2SwiGLU",
        "diffusers.models.transformers.transformer_flux2:Flux2SwiGLU",
        "one npu_swiglu kernel instead of silu and mul, and half the memory traffic",
    ),
    _swiglu(
        "diffusers_Flux3SwiGLU",
        "diffusers.models.transformers.transformer_flux3:Flux3SwiGLU",
        "one npu_swiglu kernel instead of silu and mul, and half the memory traffic",
    ),
    _packed(
        "diffusers_OmniGenFeedForward",
        "diffusers.models.transformers.transformer_omnigen:OmniGenFeedForward",
    ),
    _packed("glm_GlmMLP", "transformers.models.glm.modeling_glm:GlmMLP"),
    _packed("glm4_Glm4MLP", "transformers.models.glm4.modeling_glm4:Glm4MLP"),
    _packed("phi3_Phi3MLP", "transformers.models.phi3.modeling_phi3:Phi3MLP"),
    _elementwise("transformers_NewGELU", "transformers.activations:NewGELUActivation", "tanh"),
    _elementwise(
        "t5_film_NewGELU",
        "diffusers.models.transformers.t5_film_transformer:NewGELUActivation",
        "tanh",
    ),
    _elementwise("transformers_FastGELU", "transformers.activations:FastGELUActivation", "tanh"),
    _elementwise(
        "transformers_AccurateGELU", "transformers.activations:AccurateGELUActivation", "tanh"
    ),
    _elementwise("transformers_QuickGELU", "transformers.activations:QuickGELUActivation", "fast"),
    _elementwise(
        "diffusers_QuickGELU", "diffusers.models.controlnets.controlnet_union:QuickGELU", "fast"
    ),
    _patch(
        "transformers_GELU",
        "transformers.activations:GELUActivation",
        ("input",),
        "build_elementwise",
        becomes="mindiesd.get_activation_layer",
        why="holds F.gelu in its instances, where replacing F.gelu does not reach it",
        when="the instance holds F.gelu; half or float32 input, no gradients",
        numerics="bitwise equal on CPU and CUDA; on the NPU the erf form, not the tanh form",
    ),
)

_TWO = "the halves come out of two projections: joining them costs what the kernel saves"
_BETWEEN = "its gate is between two convolutions, and the second half of dimension 1"
_SECOND = "the gate is the second half, npu_swiglu's the first: swapping costs what it saves"
LEFT = tuple(
    Left(target, reason)
    for target, reason in (
        ("diffusers.models.activations.SwiGLU", _SECOND),
        (
            "diffusers.models.transformers.transformer_stable_audio3.StableAudio3FeedForward",
            _SECOND,
        ),
        ("diffusers.models.autoencoders.autoencoder_same.FeedForward", _SECOND),
        ("diffusers.models.attention.LuminaFeedForward", _TWO),
        ("diffusers.models.transformers.auraflow_transformer_2d.AuraFlowFeedForward", _TWO),
        ("diffusers.models.transformers.transformer_z_image.FeedForward", _TWO),
        (
            "diffusers.models.transformers.transformer_hidream_image.HiDreamImageFeedForwardSwiGLU",
            _TWO,
        ),
        ("diffusers.models.transformers.transformer_krea2.Krea2SwiGLU", _TWO),
        ("diffusers.models.transformers.transformer_ideogram4.Ideogram4MLP", _TWO),
        ("diffusers.models.transformers.transformer_ernie_image.ErnieImageFeedForward", _TWO),
        ("diffusers.models.transformers.ace_step_transformer.AceStepMLP", _TWO),
        (
            "diffusers.models.transformers.transformer_qwenimage21.QwenImage21SwiGLUFeedForward",
            _TWO,
        ),
        ("diffusers.models.autoencoders.ltx2_diffusion_decoder.LTX2VideoVaeSwiGLU", _TWO),
        (
            "diffusers.models.autoencoders.autoencoder_kl_minimax_h3_audio.MiniMaxH3AudioGeGluMlp",
            _TWO,
        ),
        ("transformers.models.llama.modeling_llama.LlamaMLP", _TWO),
        ("diffusers.models.transformers.sana_transformer.GLUMBConv", _BETWEEN),
        ("diffusers.models.transformers.transformer_sana_video.GLUMBTempConv", _BETWEEN),
        ("diffusers.models.transformers.transformer_sana_wm.GLUMBConvTemp", _BETWEEN),
        (
            "diffusers.models.transformers.transformer_hidream_image.MOEFeedForwardSwiGLU",
            "hands each token on to its experts, and activates nothing itself",
        ),
        (
            "diffusers.models.autoencoders.mmaudio_vocoder.MMAudioActivation1d",
            "filters before and after an activation, and activates nothing itself",
        ),
        (
            "diffusers.models.autoencoders.autoencoder_kl_minimax_h3_audio."
            "MiniMaxH3AudioActivation1d",
            "filters before and after an activation, and activates nothing itself",
        ),
        (
            "diffusers.models.transformers.transformer_nucleusmoe_image.SwiGLUExperts",
            "its gate is inside a loop over experts, between two matrix products",
        ),
        (
            "diffusers.models.activations.FP32SiLU",
            "nothing says that the device's half-precision SiLU is computed in float32, and it is "
            "called on embeddings, a few times a step",
        ),
        (
            "diffusers.models.activations.LinearActivation",
            "a projection and one activation kernel: nothing to join",
        ),
        ("diffusers.models.activations.GELU", "calls F.gelu, which is redirected itself"),
        (
            "transformers.activations.GELUTanh",
            "asks for the tanh form, which is what the device computes",
        ),
    )
)


def _known(original: Any, site: Site, digests: Any) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """What ``digests`` says about the source of a target, and the parts of that source.

    Raises:
        Unrecognised: the source is none of them.
    """
    record = next(record for record in RECORDS if record.name == site.name)
    digest, parts = source.read(original, record.module, record.attribute)
    if digest not in digests:
        raise source.Unrecognised("its source is none of the known forms of this activation")
    return digests[digest], parts


def _common() -> Callable[[Any, Any], str | None]:
    """The refusal that all of them share: of a module and its input."""
    import torch
    from torch import Tensor

    grad_enabled, jit_tracing, autocast = law.context()
    half_or_single = (torch.float32, torch.bfloat16, torch.float16)

    def refusal(module: Any, x: Any) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not isinstance(x, Tensor):
            return law.NOT_A_TENSOR
        if x.dtype not in half_or_single:
            return law.DTYPE
        if autocast():
            return law.AUTOCAST
        if grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in module.parameters())
        ):
            return law.GRADIENTS
        return None

    return refusal


def build_elementwise(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of the ``forward`` of a GELU without parameters."""
    import torch

    from mindiesd.ops import activation

    kind, _ = _known(original, site, GELUS)
    refusal = _common()
    builtin = torch._C._nn.gelu

    def forward(self: Any, input: Tensor) -> Tensor:
        if site.everywhere or site.in_force():
            reason = refusal(self, input)
            if reason is None:
                if kind == "fast":
                    if input.device.type in _ATEN:
                        reason = NO_KERNEL
                elif kind == "held" and self.act is not builtin:
                    reason = OTHER_ACTIVATION
            if site.takes(reason):
                return activation.gelu(input, "none" if kind == "held" else kind)
        kept: Tensor = original(self, input)
        return kept

    return forward


# Not `is_cuda`: transfer_to_npu makes it say yes of tensors on an NPU.
_ATEN = ("cpu", "cuda")


def build_approximate(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of diffusers' ``ApproximateGELU.forward``."""

    from mindiesd.ops import activation

    _known(original, site, {"751c838fa01c5112": None})
    refusal = _common()

    def forward(self: Any, x: Tensor) -> Tensor:
        if site.everywhere or site.in_force():
            reason = refusal(self, x)
            if reason is None and x.device.type in _ATEN:
                reason = NO_KERNEL
            if site.takes(reason):
                return activation.gelu(self.proj(x), "fast")
        kept: Tensor = original(self, x)
        return kept

    return forward


def build_geglu(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of diffusers' ``GEGLU.forward``."""

    from mindiesd.ops import activation

    _, parts = _known(original, site, {"fd88e7d259e2da66-3e6f0615afa422a2": None})
    ((_, own_gelu),) = parts
    refusal = _common()

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if site.everywhere or site.in_force():
            if args or kwargs.get("scale") is not None:
                reason: str | None = law.UNUSUAL_ARGUMENT
            elif type(self).gelu is not own_gelu:
                reason = law.OVERRIDDEN
            else:
                reason = refusal(self, hidden_states)
            if site.takes(reason):
                return activation.geglu(self.proj(hidden_states))
        kept: Tensor = original(self, hidden_states, *args, **kwargs)
        return kept

    return forward


def reference_geglu(
    module: Any, hidden_states: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``x * gelu(gate)`` in float64, of the projection as it is: it is the same in both."""
    from torch.nn import functional

    x, gate = module.proj(hidden_states).detach().cpu().double().chunk(2, dim=-1)
    return x * functional.gelu(gate), lambda whole: whole


def _plain_silu() -> Callable[[Any], bool]:
    """Whether a module computes SiLU and nobody watches or replaces its call."""
    from torch import nn

    kinds = [nn.SiLU]
    library: Any = sys.modules.get("transformers.activations")
    if hasattr(library, "SiLUActivation"):
        kinds.append(library.SiLUActivation)
    known = tuple(kinds)

    def plain_silu(module: Any) -> bool:
        return (
            type(module) in known
            and not module._forward_hooks
            and not module._forward_pre_hooks
            and "forward" not in module.__dict__
        )

    return plain_silu


def build_swiglu(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of the ``forward`` of a gate whose first half is activated."""

    from mindiesd.ops import activation

    _known(original, site, {"0fac3ff5dac279fb": None, "d332e98bf58aa8a9": None})
    refusal, plain_silu = _common(), _plain_silu()

    def forward(self: Any, x: Tensor) -> Tensor:
        if site.everywhere or site.in_force():
            reason = refusal(self, x)
            if reason is None:
                if not plain_silu(self.gate_fn):
                    reason = OTHER_ACTIVATION
                elif x.shape[-1] % 2:
                    reason = law.UNUSUAL_ARGUMENT
            if site.takes(reason):
                return activation.swiglu(x)
        kept: Tensor = original(self, x)
        return kept

    return forward


def build_packed(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of a feed-forward whose gate and input are one projection, the gate first."""

    from mindiesd.ops import activation

    _known(original, site, {"128df1ae62344efa": None})
    refusal, plain_silu = _common(), _plain_silu()

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if site.everywhere or site.in_force():
            reason = refusal(self, hidden_states)
            if reason is None and not plain_silu(self.activation_fn):
                reason = OTHER_ACTIVATION
            if site.takes(reason):
                down: Tensor = self.down_proj(activation.swiglu(self.gate_up_proj(hidden_states)))
                return down
        kept: Tensor = original(self, hidden_states)
        return kept

    return forward
