"""Rotary position embedding: every function of diffusers and transformers that applies one.

``shared.py`` is diffusers' helper, ``models.py`` what diffusers' models own, ``encoders.py`` the
text encoders of transformers. :data:`LEFT` names the functions that are not redirected, and why.
"""

from __future__ import annotations

from mindiesd.patches.registry import Left
from mindiesd.patches.rope import encoders, models, shared

RECORDS = (*shared.RECORDS, *models.RECORDS, *encoders.RECORDS)

_MROPE = "joins the tables of three axes in every call; transformers 5 does so before, once a step"
LEFT = (
    Left(
        "diffusers.models.transformers.transformer_wan_animate_2.rope_apply",
        "computes in float64 and returns float32 unrounded; float32 arithmetic would be less exact",
    ),
    Left(
        "diffusers.models.transformers.transformer_sana_wm._apply_ucpe_transform",
        "one half of the channels goes through a 4 x 4 matrix a token; the rotation of the other "
        "half is not a function of its own",
    ),
    Left(
        "diffusers.pipelines.kolors.text_encoder.apply_rotary_pos_emb",
        "a torch.jit.script function, whose graph TorchScript callers compile in",
    ),
    Left(
        "diffusers.models.autoencoders.ltx2_diffusion_decoder."
        "LTX2VideoVaeRotaryPosEmbed3D._rotate_axis",
        "six dimensions, of which all but one are batch or heads to the kernel, which takes fewer "
        "than 1000 of them; the tables are made anew in every call",
    ),
    Left("transformers.models.qwen2_vl.modeling_qwen2_vl.apply_multimodal_rotary_pos_emb", _MROPE),
    Left(
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.apply_multimodal_rotary_pos_emb",
        _MROPE,
    ),
)
