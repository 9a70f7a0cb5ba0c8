"""RMS norms that libraries write out in Python, class after class.

They differ in what the weight and the eps are called, in whether 1 is added to the weight, and in
the dtype of the result where input and weight differ. :data:`FORMS` knows a way of writing by the
digest of its source (:mod:`mindiesd.patches.source`), so a class is one line in :data:`CLASSES`,
and one whose source changes is skipped with that reason instead of computing something else.

Every form normalises in float32. Where the original rounds on the way (before it multiplies by a
half-precision weight), the redirected call does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from mindiesd.patches import law, source
from mindiesd.patches.registry import Left, Patch
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

# The dtype of the result: that of the input; that of the weight; what the two promote to.
INPUT, WEIGHT, PROMOTED = "input", "weight", "promoted"


class Form(NamedTuple):
    """One way of writing an RMS norm.

    Attributes:
        result: which dtype the result has.
        eps: attribute that holds the eps.
        weight: attribute that holds the weight; it may hold None where ``result`` is the input's.
        centred: whether the weight is stored around zero.
        flag: attribute that says whether there is a weight; empty if there always is.
    """

    result: str
    eps: str = "variance_epsilon"
    weight: str = "weight"
    centred: bool = False
    flag: str = ""


# Digest of the source -> form. Those of classes that are older than these versions were found
# unchanged in transformers 4.51, 4.57 and 5.23, and in diffusers 0.35, 0.36 and 0.38 to 0.42.
FORMS = {
    # weight * normed.to(input dtype): Llama's, and nearly everybody's.
    "d04c142a3a7e75d5": Form(PROMOTED),
    # Rounds the norm to a half-precision weight's dtype: T5's.
    "516090faca5502fc": Form(WEIGHT),
    # (weight * normed).to(input dtype): OLMo's, GPT-OSS's.
    "b659cd554fbcc4f7": Form(INPUT),
    # normed * (1 + weight) in float32: Gemma's.
    "20a28aa6c9fa3a74-4a131bc3cb406781": Form(INPUT, "eps", centred=True),
    # Gemma 3n's and 4's: the weight itself, or none.
    "b1716f1d643e71e1-cec46ae479edbdba": Form(INPUT, "eps", flag="with_scale"),
    # diffusers: Mochi, Kolors' ChatGLM, Cosmos 3, Krea 2, Qwen-Image 2.1, Stable Audio 3.
    "66da7a7060faf765": Form(INPUT, "eps"),
    "d7da0402ca5fa610": Form(INPUT, "eps"),
    "222f33e471b29f44": Form(INPUT, "eps"),
    "1b4c436cdd1e307d": Form(INPUT, "eps", centred=True),
    "74b2c471d9825eed": Form(INPUT, "eps", centred=True),
    "38997936106624d6": Form(INPUT, "eps", weight="gamma"),
}

# The classes of diffusers, and those of transformers that its pipelines use: module, class, and the
# name of the parameter where it is not hidden_states.
CLASSES: tuple[tuple[str, ...], ...] = (
    ("diffusers.models.normalization", "MochiRMSNorm"),
    ("diffusers.models.transformers.t5_film_transformer", "T5LayerNorm"),
    ("diffusers.models.transformers.transformer_cosmos3", "Cosmos3NemotronRMSNorm"),
    ("diffusers.models.transformers.transformer_krea2", "Krea2RMSNorm"),
    ("diffusers.models.transformers.transformer_qwenimage21", "QwenImage21ZeroCenterRMSNorm"),
    ("diffusers.models.transformers.transformer_stable_audio3", "StableAudio3RMSNorm"),
    ("diffusers.pipelines.kolors.text_encoder", "RMSNorm"),
    ("transformers.models.gemma.modeling_gemma", "GemmaRMSNorm", "x"),
    ("transformers.models.gemma2.modeling_gemma2", "Gemma2RMSNorm", "x"),
    ("transformers.models.gemma3.modeling_gemma3", "Gemma3RMSNorm", "x"),
    ("transformers.models.gemma3n.modeling_gemma3n", "Gemma3nRMSNorm"),
    ("transformers.models.gemma4.modeling_gemma4", "Gemma4RMSNorm"),
    ("transformers.models.gemma4_unified.modeling_gemma4_unified", "Gemma4UnifiedRMSNorm"),
    ("transformers.models.glm.modeling_glm", "GlmRMSNorm"),
    ("transformers.models.glm4.modeling_glm4", "Glm4RMSNorm"),
    ("transformers.models.glm4v.modeling_glm4v", "Glm4vRMSNorm"),
    ("transformers.models.glm_image.modeling_glm_image", "GlmImageRMSNorm"),
    ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssRMSNorm"),
    ("transformers.models.llama.modeling_llama", "LlamaRMSNorm"),
    ("transformers.models.ministral.modeling_ministral", "MinistralRMSNorm"),
    ("transformers.models.ministral3.modeling_ministral3", "Ministral3RMSNorm"),
    ("transformers.models.mistral.modeling_mistral", "MistralRMSNorm"),
    ("transformers.models.mistral3.modeling_mistral3", "Mistral3RMSNorm"),
    ("transformers.models.mt5.modeling_mt5", "MT5LayerNorm"),
    ("transformers.models.phi3.modeling_phi3", "Phi3RMSNorm"),
    ("transformers.models.pixtral.modeling_pixtral", "PixtralRMSNorm"),
    ("transformers.models.qwen2.modeling_qwen2", "Qwen2RMSNorm"),
    ("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "Qwen2_5_VLRMSNorm"),
    ("transformers.models.qwen2_vl.modeling_qwen2_vl", "Qwen2VLRMSNorm"),
    ("transformers.models.qwen3.modeling_qwen3", "Qwen3RMSNorm"),
    ("transformers.models.qwen3_5.modeling_qwen3_5", "Qwen3_5RMSNorm", "x"),
    ("transformers.models.qwen3_vl.modeling_qwen3_vl", "Qwen3VLTextRMSNorm"),
    ("transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe", "Qwen3VLMoeTextRMSNorm"),
    ("transformers.models.smollm3.modeling_smollm3", "SmolLM3RMSNorm"),
    ("transformers.models.t5.modeling_t5", "T5LayerNorm"),
    ("transformers.models.t5gemma.modeling_t5gemma", "T5GemmaRMSNorm", "x"),
    ("transformers.models.t5gemma2.modeling_t5gemma2", "T5Gemma2RMSNorm", "x"),
    ("transformers.models.umt5.modeling_umt5", "UMT5LayerNorm"),
)

# Targets that were looked at and are left alone.
LEFT = (
    Left(
        "diffusers.models.normalization.LpNorm",
        "divides by max(norm, eps), which no kernel does, and its three operators are the fewest",
    ),
    Left(
        "diffusers.models.autoencoders.autoencoder_kl_ltx2.PerChannelRMSNorm",
        "the channels are not the last dimension: moving them there copies the tensor twice, and "
        "written for that dimension it takes as many operators as now",
    ),
    Left(
        "diffusers.models.autoencoders.autoencoder_kl_ltx2_audio.LTX2AudioPixelNorm",
        "as PerChannelRMSNorm",
    ),
    Left(
        "transformers.models.mamba2.modeling_mamba2.MambaRMSNormGated",
        "gates before it normalises; no diffusers pipeline uses it, nor its like",
    ),
)


def _records() -> tuple[Patch, ...]:
    versions = {"diffusers": ">=0.35,<0.44", "transformers": ">=4.51,<6"}
    found = []
    for module, name, *argument in CLASSES:
        library, *_, last = module.split(".")
        model = last.removeprefix("modeling_")
        if library == "diffusers":
            model = "kolors" if model == "text_encoder" else "diffusers"
        found.append(
            Patch(
                name=f"{model}_{name}",
                family="rms_norm",
                module=module,
                attribute=f"{name}.forward",
                after=module,
                becomes="mindiesd.RMSNorm",
                build="mindiesd.patches.rms_classes:build",
                why="one kernel instead of six to ten (casts, pow, mean, add, rsqrt, mul, mul)",
                when="the source is one of the known forms; half or float32 input and weight",
                numerics="float32 inside and one rounding; the original's result dtype",
                requires={library: versions[library]},
                parameters=("self", *(argument or ["hidden_states"])),
            )
        )
    return tuple(found)


RECORDS = _records()


def build(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of the ``forward`` of one of :data:`CLASSES`."""
    import torch
    from torch import Tensor

    from mindiesd.ops import norm
    from mindiesd.patches.rope.templates import named_as

    record = next(record for record in RECORDS if record.name == site.name)
    digest, parts = source.read(original, record.module, record.attribute)
    form = FORMS.get(digest)
    if form is None:
        raise source.Unrecognised("its source is none of the known forms of an RMS norm")
    result, eps_name, weight_name, centred, flag = form
    grad_enabled, jit_tracing, autocast = law.context()
    half_or_single = (torch.float32, torch.bfloat16, torch.float16)

    def refusal(self: Any, x: Any, weight: Any) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not isinstance(x, Tensor):
            return law.NOT_A_TENSOR
        if x.dtype not in half_or_single:
            return law.DTYPE
        if weight is not None:
            if weight.dtype not in half_or_single:
                return law.MIXED_DTYPES
            if weight.dim() != 1 or not x.dim() or weight.numel() != x.shape[-1]:
                return law.WEIGHT_SHAPE
        elif result is not INPUT or centred or not x.dim():
            return law.WEIGHT_SHAPE
        if parts and any(getattr(type(self), name) is not known for name, known in parts):
            return law.OVERRIDDEN
        if autocast():
            return law.AUTOCAST
        if grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
            return law.GRADIENTS
        return None

    def forward(self: Any, x: Tensor) -> Tensor:
        if site.everywhere or site.in_force():
            weight: Any = None
            if not flag or getattr(self, flag):
                weight = getattr(self, weight_name)
            reason = refusal(self, x, weight)
            if site.takes(reason):
                eps = getattr(self, eps_name)
                if centred:
                    return norm.centred_rms_norm(x, weight, eps)
                dtype = x.dtype
                if result is INPUT or weight.dtype is dtype:
                    return norm.rms_norm(x, weight, eps)
                wanted = weight.dtype
                if result is PROMOTED:
                    wanted = torch.promote_types(dtype, wanted)
                return norm.rms_norm(x.float(), weight, eps).to(wanted)
        kept: Tensor = original(self, x)
        return kept

    named: Any = forward
    return named_as(named, original)
