"""The rotary functions of transformers' models that diffusers' pipelines use as text encoders.

Each model's forward looks ``apply_rotary_pos_emb`` up in its own module at call time. Where the
``kernels`` package is installed, some of these names hold something else than a function; those are
skipped, with that reason.
"""

from __future__ import annotations

from mindiesd.patches.registry import Patch
from mindiesd.patches.rope.family import Family

TEXT = Family(
    call="both_unsqueezed",
    form=lambda forms: forms.full(None, model_dtype=True),
    interleaved=False,
    bounded=True,
    sources=2,
)
PHI3 = Family(
    call="both_unsqueezed",
    form=lambda forms: forms.full(None, model_dtype=True),
    interleaved=False,
    partial=True,
    bounded=True,
    sources=2,
)
GLM = Family(
    call="both_unsqueezed",
    form=lambda forms: forms.half_repeated,
    interleaved=True,
    partial=True,
    bounded=True,
    sources=2,
)
VISION = Family(
    call="both_with_pair",
    form=lambda forms: forms.full(-2),
    interleaved=False,
    dims=0,
    bounded=True,
    sources=2,
)

_WHY = "one npu_rotary_mul kernel instead of slices, neg, cat, two products and a sum"
_TABLES = "cos and sin [B, S, D] no wider than query and key, within [-1, 1] on the NPU"
_NUMERICS = "float32 inside and one rounding, where the original rounds every step"


def _text(model: str, family: str = "TEXT") -> Patch:
    module = f"transformers.models.{model}.modeling_{model}"
    return Patch(
        name=f"{model}_rope",
        family="rope",
        module=module,
        attribute="apply_rotary_pos_emb",
        after=module,
        becomes="mindiesd.rotary_position_embedding",
        build=f"mindiesd.patches.rope.encoders:{family}",
        why=_WHY,
        when=f"{_TABLES}; no gradients",
        numerics=_NUMERICS,
        requires={"transformers": ">=4.57,<5.24"},
        parameters=("q", "k", "cos", "sin", "unsqueeze_dim"),
    )


def _vision(model: str) -> Patch:
    module = f"transformers.models.{model}.modeling_{model}"
    return Patch(
        name=f"{model}_vision_rope",
        family="rope",
        module=module,
        attribute="apply_rotary_pos_emb_vision",
        after=module,
        becomes="mindiesd.rotary_position_embedding",
        build="mindiesd.patches.rope.encoders:VISION",
        why=_WHY,
        when="cos and sin [S, D] and query and key [S, N, D]; no gradients",
        numerics="float32 inside and one rounding, as the original",
        requires={"transformers": ">=4.57,<5.24"},
        parameters=("q", "k", "cos", "sin"),
    )


RECORDS = (
    _text("llama"),
    _text("qwen2"),
    _text("qwen3"),
    _text("mistral"),
    _text("ministral"),
    _text("ministral3"),
    _text("smollm3"),
    _text("gemma"),
    _text("gemma2"),
    _text("gemma3"),
    _text("qwen2_vl"),
    _text("qwen2_5_vl"),
    _text("qwen3_vl"),
    _text("phi3", "PHI3"),
    _text("glm", "GLM"),
    _text("glm4", "GLM"),
    _vision("qwen2_vl"),
    _vision("qwen2_5_vl"),
    _vision("qwen3_vl"),
)
