"""Tiny configurations of diffusers and transformers models, with inputs for one forward.

Each entry of :data:`MODELS` gives a class name, its configuration and its inputs, all random and on
the CPU. The configurations follow those of diffusers' own tests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

randn = torch.randn


@dataclass(frozen=True)
class Tiny:
    """One model: how to build it and what to call it with."""

    cls: str | tuple[str, str]  # transformers: configuration and model
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    library: str = "diffusers"

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        if self.library == "transformers":
            import transformers

            config = getattr(transformers, self.cls[0])(**self.config)
            model = getattr(transformers, self.cls[1])(config)
        else:
            import diffusers

            model = getattr(diffusers, self.cls)(**self.config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Gates and last layers that start as zero would hide everything behind them.
                if not parameter.any():
                    parameter.normal_(0, 0.1)
        return model.eval()

    def make_inputs(self) -> dict[str, Any]:
        torch.manual_seed(1)
        return self.inputs()


def _flux_like(channels: int, width: int, pooled: int | None, **more: Any) -> dict[str, Any]:
    inputs = {
        "hidden_states": randn(1, 16, channels),
        "encoder_hidden_states": randn(1, 48, width),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(48, 3),
        **more,
    }
    if pooled is not None:
        inputs["pooled_projections"] = randn(1, pooled)
    return inputs


_WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 256,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def _wan(channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, channels, 2, 16, 16),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": randn(1, 12, 16),
    }


def _sd3(dim: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 32, 32),
        "encoder_hidden_states": randn(2, 154, 32),
        "pooled_projections": randn(2, 64),
        "timestep": torch.tensor([1, 1]),
    }


_SD3 = {
    "sample_size": 32,
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "caption_projection_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 64,
    "out_channels": 4,
}

_COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 2,
    "text_embed_dim": 8,
    "num_layers": 2,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 8,
    "patch_size": 2,
    "temporal_compression_ratio": 4,
    "max_text_seq_length": 8,
}


def _cogvideox(frames: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, frames, 4, 8, 8),
        "encoder_hidden_states": randn(2, 8, 8),
        "timestep": torch.tensor([3, 7]),
    }


def _cogview() -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 8, 8),
        "encoder_hidden_states": randn(2, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "original_size": torch.tensor([[20, 20]] * 2),
        "target_size": torch.tensor([[20, 20]] * 2),
        "crop_coords": torch.tensor([[0, 0]] * 2),
    }


def _hunyuan_video() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 1, 16, 16),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": randn(1, 12, 16),
        "encoder_attention_mask": torch.ones(1, 12),
        "pooled_projections": randn(1, 8),
        "guidance": torch.tensor([5.0]),
    }


_HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (2, 4, 4),
    "image_condition_type": None,
}


def _ltx() -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 2 * 16 * 16, 4),
        "encoder_hidden_states": randn(2, 16, 16),
        "encoder_attention_mask": torch.ones(2, 16).bool(),
        "timestep": torch.tensor([3, 7]),
        "num_frames": 2,
        "height": 16,
        "width": 16,
    }


MODELS: dict[str, Tiny] = {
    "dit": Tiny(
        "DiTTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 8,
            "activation_fn": "gelu-approximate",
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "attention_bias": True,
            "num_layers": 1,
            "norm_type": "ada_norm_zero",
            "num_embeds_ada_norm": 8,
            "patch_size": 2,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": randn(4, 4, 8, 8),
            "timestep": torch.randint(0, 1000, (4,)),
            "class_labels": torch.randint(0, 4, (4,)),
        },
    ),
    "pixart": Tiny(
        "PixArtTransformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "attention_head_dim": 2,
            "num_attention_heads": 2,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 8,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "use_additional_conditions": False,
            "caption_channels": None,
        },
        lambda: {
            "hidden_states": randn(4, 4, 8, 8),
            "timestep": torch.randint(0, 1000, (4,)),
            "encoder_hidden_states": randn(4, 8, 8),
            "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
        },
    ),
    "prior": Tiny(
        "PriorTransformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 4,
            "num_layers": 2,
            "embedding_dim": 8,
            "num_embeddings": 7,
            "additional_embeddings": 4,
        },
        lambda: {
            "hidden_states": randn(4, 8),
            "timestep": 2,
            "proj_embedding": randn(4, 8),
            "encoder_hidden_states": randn(4, 7, 8),
        },
    ),
    "allegro": Tiny(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "caption_channels": 8,
        },
        lambda: {
            "hidden_states": randn(2, 4, 2, 8, 8),
            "encoder_hidden_states": randn(2, 8, 8),
            "timestep": torch.tensor([3, 7]),
        },
    ),
    "auraflow": Tiny(
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 256,
        },
        lambda: {
            "hidden_states": randn(2, 4, 32, 32),
            "encoder_hidden_states": randn(2, 256, 32),
            "timestep": torch.randint(0, 1000, (2,)),
        },
    ),
    "bria": Tiny(
        "BriaTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": None,
            "axes_dims_rope": [0, 4, 4],
        },
        lambda: _flux_like(4, 32, None),
    ),
    "chroma": Tiny(
        "ChromaTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": [4, 4, 8],
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        lambda: _flux_like(4, 32, None),
    ),
    "chronoedit": Tiny(
        "ChronoEditTransformer3DModel",
        {**_WAN, "rope_temporal_skip_len": 8},
        _wan,
    ),
    "cogvideox": Tiny("CogVideoXTransformer3DModel", _COGVIDEOX, lambda: _cogvideox(2)),
    "cogvideox15": Tiny(
        "CogVideoXTransformer3DModel",
        {
            **_COGVIDEOX,
            "patch_size_t": 2,
            "max_text_seq_length": 8,
            "use_rotary_positional_embeddings": True,
        },
        lambda: _cogvideox(2),
    ),
    "cogview3": Tiny(
        "CogView3PlusTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 2,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        _cogview,
    ),
    "cogview4": Tiny(
        "CogView4Transformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 4,
            "out_channels": 4,
            "text_embed_dim": 8,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        _cogview,
    ),
    "easyanimate": Tiny(
        "EasyAnimateTransformer3DModel",
        {
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "in_channels": 4,
            "mmdit_layers": 2,
            "num_layers": 2,
            "out_channels": 4,
            "patch_size": 2,
            "sample_height": 60,
            "sample_width": 90,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "time_position_encoding_type": "3d_rope",
            "timestep_activation_fn": "silu",
        },
        lambda: {
            "hidden_states": randn(2, 4, 2, 16, 16),
            "timestep": torch.randint(0, 1000, (2,)),
            "timestep_cond": None,
            "encoder_hidden_states": randn(2, 16, 16),
            "encoder_hidden_states_t5": None,
            "inpaint_latents": None,
            "control_latents": None,
        },
    ),
    "flux": Tiny(
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        lambda: _flux_like(4, 32, 32),
    ),
    "flux2": Tiny(
        "Flux2Transformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "timestep_guidance_channels": 256,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        lambda: {
            "hidden_states": randn(1, 16, 4),
            "encoder_hidden_states": randn(1, 48, 32),
            "img_ids": torch.zeros(1, 16, 4),
            "txt_ids": torch.zeros(1, 48, 4),
            "timestep": torch.tensor([1.0]),
            "guidance": torch.tensor([1.0]),
        },
    ),
    "hidream": Tiny(
        "HiDreamImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_channels": [32, 16],
            "text_emb_dim": 64,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (32, 32),
            "llama_layers": (0, 1),
            "force_inference_output": True,
        },
        lambda: {
            "hidden_states": randn(2, 4, 32, 32),
            "encoder_hidden_states_t5": randn(2, 8, 32),
            "encoder_hidden_states_llama3": randn(2, 2, 8, 16),
            "pooled_embeds": randn(2, 64),
            "timesteps": torch.randint(0, 1000, (2,)),
        },
    ),
    "hunyuan_dit": Tiny(
        "HunyuanDiT2DModel",
        {
            "sample_size": 16,
            "num_layers": 2,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 3,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 24,
            "text_len": 4,
            "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        lambda: {
            "hidden_states": randn(2, 4, 8, 8),
            "encoder_hidden_states": randn(2, 4, 8),
            "text_embedding_mask": torch.ones(2, 4),
            "encoder_hidden_states_t5": randn(2, 4, 8),
            "text_embedding_mask_t5": torch.ones(2, 4),
            "timestep": torch.tensor([1.0, 7.0]),
            "image_meta_size": torch.tensor([[1024, 1024, 1024, 1024, 0, 0]] * 2),
            "style": torch.zeros(2, dtype=torch.long),
            "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)),
        },
    ),
    "hunyuan_video": Tiny("HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO, _hunyuan_video),
    "latte": Tiny(
        "LatteTransformer3DModel",
        {
            "sample_size": 8,
            "num_layers": 1,
            "patch_size": 2,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "caption_channels": 8,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
        },
        lambda: {
            "hidden_states": randn(2, 4, 1, 8, 8),
            "encoder_hidden_states": randn(2, 8, 8),
            "timestep": torch.randint(0, 1000, (2,)),
            "enable_temporal_attentions": True,
        },
    ),
    "longcat": Tiny(
        "LongCatImageTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        lambda: _flux_like(4, 32, None),
    ),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "num_layers": 1,
            "qk_norm": "rms_norm_across_heads",
            "caption_channels": 16,
        },
        _ltx,
    ),
    "lumina_next": Tiny(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "ffn_dim_multiplier": None,
            "norm_eps": 1e-5,
            "learn_sigma": False,
            "qk_norm": True,
            "cross_attention_dim": 32,
            "scaling_factor": 1.0,
        },
        lambda: {
            "hidden_states": randn(2, 4, 16, 16),
            "encoder_hidden_states": randn(2, 16, 32),
            "timestep": torch.rand(2),
            "encoder_mask": torch.ones(2, 16),
            "image_rotary_emb": _lumina_rope(),
            "cross_attention_kwargs": {},
        },
    ),
    "lumina2": Tiny(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "ffn_dim_multiplier": None,
            "norm_eps": 1e-5,
            "scaling_factor": 1.0,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (128, 128, 128),
            "cap_feat_dim": 32,
        },
        lambda: {
            "hidden_states": randn(2, 4, 16, 16),
            "encoder_hidden_states": randn(2, 16, 32),
            "timestep": torch.rand(2),
            "encoder_attention_mask": torch.ones(2, 16, dtype=torch.bool),
        },
    ),
    "mochi": Tiny(
        "MochiTransformer3DModel",
        {
            "patch_size": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 4,
            "qk_norm": "rms_norm",
            "text_embed_dim": 16,
            "time_embed_dim": 4,
            "activation_fn": "swiglu",
            "max_sequence_length": 16,
        },
        lambda: {
            "hidden_states": randn(2, 4, 2, 16, 16),
            "encoder_hidden_states": randn(2, 16, 16),
            "timestep": torch.tensor([3, 7]),
            "encoder_attention_mask": torch.ones(2, 16).bool(),
        },
    ),
    "omnigen": Tiny(
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 32,
            "num_layers": 2,
            "in_channels": 4,
            "time_step_dim": 4,
            "rope_scaling": {"long_factor": list(range(1, 3)), "short_factor": list(range(1, 3))},
        },
        lambda: {
            "hidden_states": randn(2, 4, 8, 8),
            "timestep": torch.rand(2),
            "input_ids": torch.randint(0, 10, (2, 24)),
            "input_img_latents": [randn(1, 4, 8, 8)],
            "input_image_sizes": {0: [[0, 16]]},
            "attention_mask": torch.ones(2, 41, 41),
            "position_ids": torch.arange(41)[None].repeat(2, 1),
        },
    ),
    "ovis": Tiny(
        "OvisImageTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        lambda: _flux_like(4, 32, None),
    ),
    "prx": Tiny(
        "PRXTransformer2DModel",
        {
            "in_channels": 16,
            "patch_size": 2,
            "context_in_dim": 64,
            "hidden_size": 64,
            "mlp_ratio": 3.5,
            "num_heads": 2,
            "depth": 4,
            "axes_dim": [16, 16],
            "theta": 10_000,
        },
        lambda: {
            "hidden_states": randn(1, 16, 16, 16),
            "timestep": torch.tensor([1.0]),
            "encoder_hidden_states": randn(1, 12, 64),
        },
    ),
    "qwenimage": Tiny(
        "QwenImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 16,
            "guidance_embeds": False,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": randn(1, 16, 16),
            "encoder_hidden_states": randn(1, 7, 16),
            "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.long),
            "timestep": torch.tensor([1.0]),
            "img_shapes": [(1, 4, 4)],
        },
    ),
    "sana": Tiny(
        "SanaTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 4,
            "num_attention_heads": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 32,
        },
        lambda: {
            "hidden_states": randn(2, 4, 32, 32),
            "encoder_hidden_states": randn(2, 8, 8),
            "timestep": torch.randint(0, 1000, (2,)),
        },
    ),
    "sana_video": Tiny(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
            "mlp_ratio": 2.5,
            "dropout": 0.0,
            "attention_bias": False,
            "sample_size": 8,
            "patch_size": (1, 2, 2),
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
        lambda: {
            "hidden_states": randn(1, 16, 2, 16, 16),
            "timestep": torch.tensor([1]),
            "encoder_hidden_states": randn(1, 12, 16),
        },
    ),
    "sd3": Tiny("SD3Transformer2DModel", _SD3, lambda: _sd3(32)),
    "sd35": Tiny(
        "SD3Transformer2DModel",
        {**_SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda: _sd3(32),
    ),
    "skyreels": Tiny("SkyReelsV2Transformer3DModel", _WAN, _wan),
    "stable_audio": Tiny(
        "StableAudioDiTModel",
        {
            "sample_size": 4,
            "in_channels": 3,
            "num_layers": 2,
            "attention_head_dim": 4,
            "num_key_value_attention_heads": 2,
            "out_channels": 3,
            "cross_attention_dim": 4,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 4,
        },
        lambda: {
            "hidden_states": randn(2, 3, 4),
            "timestep": torch.tensor([1.0, 1.0]),
            "encoder_hidden_states": randn(2, 5, 4),
            "global_hidden_states": randn(2, 1, 8),
            "rotary_embedding": (torch.ones(5, 2), torch.zeros(5, 2)),
        },
    ),
    "temporal": Tiny(
        "TransformerTemporalModel",
        {
            "num_attention_heads": 8,
            "attention_head_dim": 4,
            "in_channels": 32,
            "num_layers": 1,
        },
        lambda: {"hidden_states": randn(4, 32, 8, 8), "num_frames": 2},
    ),
    "wan": Tiny("WanTransformer3DModel", _WAN, _wan),
    "wan_vace": Tiny(
        "WanVACETransformer3DModel",
        {**_WAN, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 48},
        lambda: {
            **_wan(),
            "control_hidden_states": randn(1, 48, 2, 16, 16),
            "control_hidden_states_scale": torch.ones(2),
        },
    ),
    "z_image": Tiny(
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 16,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "n_kv_heads": 2,
            "qk_norm": True,
            "cap_feat_dim": 16,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        lambda: {
            "x": [randn(16, 1, 4, 4)],
            "t": torch.tensor([0.5]),
            "cap_feats": [randn(8, 16)],
        },
    ),
    "ernie": Tiny(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 1,
            "ffn_hidden_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "text_in_dim": 16,
            "rope_theta": 256,
            "rope_axes_dim": (8, 4, 4),
        },
        lambda: {
            "hidden_states": randn(2, 4, 8, 8),
            "timestep": torch.tensor([1.0, 2.0]),
            "text_bth": randn(2, 6, 16),
            "text_lens": torch.tensor([6, 4]),
        },
    ),
    "krea2": Tiny(
        "Krea2Transformer2DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 32,
            "num_text_layers": 2,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 64,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda: {
            "hidden_states": randn(1, 16, 4),
            "encoder_hidden_states": randn(1, 6, 2, 32),
            "timestep": torch.tensor([0.5]),
            "position_ids": torch.zeros(22, 3),
        },
    ),
    "glm": Tiny(
        "GlmImageTransformer2DModel",
        {
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 16,
            "condition_dim": 8,
            "prior_vq_quantizer_codebook_size": 32,
        },
        lambda: {
            "hidden_states": randn(2, 4, 8, 8),
            "encoder_hidden_states": randn(2, 6, 16),
            "prior_token_id": torch.randint(0, 32, (2, 16)),
            "prior_token_drop": torch.zeros(2, 16, dtype=torch.bool),
            "timestep": torch.tensor([1.0, 2.0]),
            "target_size": torch.tensor([[8.0, 8.0]] * 2),
            "crop_coords": torch.tensor([[0.0, 0.0]] * 2),
        },
    ),
    "joyimage": Tiny(
        "JoyImageEditTransformer3DModel",
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "mlp_width_ratio": 2.0,
            "num_layers": 2,
            "rope_dim_list": [4, 6, 6],
        },
        lambda: {
            "hidden_states": randn(1, 4, 1, 8, 8),
            "timestep": torch.tensor([1.0]),
            "encoder_hidden_states": randn(1, 6, 16),
        },
    ),
    "kandinsky5": Tiny(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "out_visual_dim": 4,
            "patch_size": (1, 2, 2),
            "model_dim": 32,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        lambda: {
            "hidden_states": randn(1, 2, 8, 8, 4),
            "encoder_hidden_states": randn(1, 6, 16),
            "timestep": torch.tensor([1.0]),
            "pooled_projections": randn(1, 8),
            "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": torch.arange(6),
        },
    ),
    "longcat_audio": Tiny(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 8},
        lambda: {
            "hidden_states": randn(1, 10, 8),
            "encoder_hidden_states": randn(1, 6, 16),
            "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
            "timestep": torch.tensor([0.5]),
            "latent_cond": randn(1, 10, 8),
        },
    ),
    "stable_audio3": Tiny(
        "StableAudio3DiTModel",
        {
            "io_channels": 8,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 16,
            "global_cond_dim": 16,
            "local_add_cond_dim": 9,
            "timestep_features_dim": 16,
            "num_memory_tokens": 4,
        },
        lambda: {
            "hidden_states": randn(1, 8, 10),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": randn(1, 6, 16),
            "global_hidden_states": randn(1, 16),
            "local_add_cond": randn(1, 9, 10),
        },
    ),
    "hunyuan15": Tiny(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 1,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 12,
            "rope_axes_dim": (2, 2, 4),
            "target_size": 16,
            "task_type": "t2v",
        },
        lambda: {
            "hidden_states": randn(1, 4, 1, 8, 8),
            "timestep": torch.tensor([5.0]),
            "encoder_hidden_states": randn(1, 6, 16),
            "encoder_attention_mask": torch.ones(1, 6),
            "encoder_hidden_states_2": randn(1, 4, 8),
            "encoder_attention_mask_2": torch.ones(1, 4),
            "image_embeds": torch.zeros(1, 3, 12),
        },
    ),
    "motif": Tiny(
        "MotifVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_decoder_layers": 1,
            "mlp_ratio": 2.0,
            "patch_size": 2,
            "patch_size_t": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
        lambda: {
            "hidden_states": randn(1, 4, 1, 8, 8),
            "timestep": torch.tensor([5]),
            "encoder_hidden_states": randn(1, 6, 16),
            "encoder_attention_mask": torch.ones(1, 6),
        },
    ),
    "transformer2d": Tiny(
        "Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "norm_num_groups": 8,
        },
        lambda: {"hidden_states": randn(1, 32, 8, 8), "encoder_hidden_states": randn(1, 6, 16)},
    ),
    "unet": Tiny(
        "UNet2DConditionModel",
        {
            "block_out_channels": (4, 8),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "out_channels": 4,
            "in_channels": 4,
            "layers_per_block": 1,
            "sample_size": 16,
        },
        lambda: {
            "sample": randn(2, 4, 16, 16),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": randn(2, 4, 8),
        },
    ),
    "vae": Tiny(
        "AutoencoderKL",
        {
            "block_out_channels": [4, 8],
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "latent_channels": 4,
            "norm_num_groups": 2,
        },
        lambda: {"sample": randn(2, 3, 16, 16)},
    ),
    "wan_vae": Tiny(
        "AutoencoderKLWan",
        {
            "base_dim": 3,
            "z_dim": 4,
            "dim_mult": [1, 1, 1, 1],
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
            "num_res_blocks": 1,
            "temperal_downsample": [False, True, True],
        },
        lambda: {"sample": randn(1, 3, 5, 16, 16)},
    ),
    "clip": Tiny(
        ("CLIPTextConfig", "CLIPTextModel"),
        {
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "vocab_size": 100,
            "max_position_embeddings": 16,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        lambda: {"input_ids": torch.randint(3, 100, (2, 8))},
        library="transformers",
    ),
    "t5": Tiny(
        ("T5Config", "T5EncoderModel"),
        {
            "vocab_size": 100,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
        },
        lambda: {
            "input_ids": torch.randint(3, 100, (2, 8)),
            "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        },
        library="transformers",
    ),
}


def _lumina_rope() -> torch.Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return get_2d_rotary_pos_embed_lumina(8, 8, 8)


def move(value: Any, to: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``to`` applied to every tensor in it."""
    if isinstance(value, torch.Tensor):
        return to(value)
    if isinstance(value, dict):
        return {key: move(item, to) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, to) for item in value)
    return value


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor of a model's output."""
    if isinstance(output, torch.Tensor):
        return output
    items = output.values() if isinstance(output, dict) else output
    return next(first_tensor(item) for item in items if item is not None)


@contextmanager
def without_torch_npu() -> Iterator[None]:
    """Let diffusers believe that there is no torch_npu, so that models run on the CPU as usual.

    With torch_npu importable, diffusers calls its operators on CPU tensors too.
    """
    # Imported in the block, they would leave out `import torch_npu` for good.
    import diffusers.models.transformers
    import diffusers.pipelines.pipeline_utils
    import diffusers.utils.import_utils

    real = diffusers.utils.import_utils.is_torch_npu_available

    def absent() -> bool:
        return False

    _swap_in_diffusers(real, absent)
    try:
        yield
    finally:
        # Modules that were first imported in the block took the stand-in by name.
        _swap_in_diffusers(absent, real)


def _swap_in_diffusers(old: Callable[[], bool], new: Callable[[], bool]) -> None:
    for name, module in [*sys.modules.items()]:
        if name.startswith("diffusers.") and vars(module).get("is_torch_npu_available") is old:
            vars(module)["is_torch_npu_available"] = new
