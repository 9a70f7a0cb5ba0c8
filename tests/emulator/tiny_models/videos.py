"""Transformers for videos."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulator.tiny_models.tiny import Tiny, randn

WAN = {
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


def wan(channels: int = 4) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, channels, 2, 16, 16),
        "timestep": torch.tensor([1]),
        "encoder_hidden_states": randn(1, 12, 16),
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


HUNYUAN_VIDEO = {
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


def hunyuan_video() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 1, 16, 16),
        "timestep": torch.tensor([5]),
        "encoder_hidden_states": randn(1, 12, 16),
        "encoder_attention_mask": torch.ones(1, 12),
        "pooled_projections": randn(1, 8),
        "guidance": torch.tensor([5.0]),
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
    "chronoedit": Tiny(
        "ChronoEditTransformer3DModel",
        {**WAN, "rope_temporal_skip_len": 8},
        wan,
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
    "hunyuan_video": Tiny("HunyuanVideoTransformer3DModel", HUNYUAN_VIDEO, hunyuan_video),
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
    "skyreels": Tiny("SkyReelsV2Transformer3DModel", WAN, wan),
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
    "wan": Tiny("WanTransformer3DModel", WAN, wan),
    "wan_vace": Tiny(
        "WanVACETransformer3DModel",
        {**WAN, "num_layers": 4, "vace_layers": [0, 2], "vace_in_channels": 48},
        lambda: {
            **wan(),
            "control_hidden_states": randn(1, 48, 2, 16, 16),
            "control_hidden_states_scale": torch.ones(2),
        },
    ),
}
