"""Transformers for videos: recent families, and variants of older ones."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulator.tiny_models.tiny import Tiny, randn
from tests.emulator.tiny_models.videos import HUNYUAN_VIDEO, WAN, hunyuan_video, wan

_FAR = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def _anyflow(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 2, 4, 16, 16),
        "timestep": torch.full((1, 2), 500.0),
        "r_timestep": torch.full((1, 2), 250.0),
        "encoder_hidden_states": randn(1, 12, 16),
        **more,
    }


def _cosmos(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 1, 16, 16),
        "timestep": torch.randint(0, 1000, (1,)),
        "encoder_hidden_states": randn(1, 12, 16),
        "attention_mask": torch.ones(1, 12),
        "fps": 30,
        **more,
    }


_COSMOS3 = {
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "latent_channel": 4,
    "latent_patch_size": 2,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "patch_latent_dim": 16,
    "rope_scaling": {"mrope_section": [4, 2, 2]},
    "vocab_size": 64,
    "dtype": "float32",
}


def _cosmos3() -> dict[str, Any]:
    text, tokens = 6, 8
    return {
        "input_ids": torch.randint(0, 64, (text,)),
        "text_indexes": torch.arange(text),
        "position_ids": torch.arange(text + tokens).expand(3, -1).clone(),
        "und_len": text,
        "sequence_length": text + tokens,
        "vision_tokens": [randn(1, 4, 2, 4, 4)],
        "vision_token_shapes": [(2, 2, 2)],
        "vision_sequence_indexes": torch.arange(text, text + tokens),
        "vision_mse_loss_indexes": torch.arange(text, text + tokens),
        "vision_timesteps": torch.full((tokens,), 500.0),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


_LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 2,
    "caption_channels": 16,
    "rope_double_precision": False,
}


def _ltx2() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 2 * 4 * 4, 4),
        "audio_hidden_states": randn(1, 9, 4),
        "encoder_hidden_states": randn(1, 8, 16),
        "audio_encoder_hidden_states": randn(1, 8, 16),
        "timestep": torch.rand(1),
        "encoder_attention_mask": torch.tensor([[1.0] * 6 + [0.0] * 2]),
        "audio_encoder_attention_mask": torch.tensor([[1.0] * 6 + [0.0] * 2]),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 9,
        "fps": 25.0,
    }


def _helios() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 2, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, 12, 16),
        "indices_hidden_states": torch.arange(2)[None] + 16,
        "indices_latents_history_short": torch.arange(2)[None] + 14,
        "indices_latents_history_mid": torch.arange(2)[None] + 12,
        "indices_latents_history_long": torch.arange(12)[None],
        "latents_history_short": randn(1, 4, 2, 16, 16),
        "latents_history_mid": randn(1, 4, 2, 16, 16),
        "latents_history_long": randn(1, 4, 12, 16, 16),
    }


def _framepack() -> dict[str, Any]:
    return {
        **hunyuan_video(),
        "image_embeds": randn(1, 8, 16),
        "indices_latents": torch.ones(1),
        "latents_clean": randn(1, 4, 2, 16, 16),
        "indices_latents_clean": torch.ones(2),
        "latents_history_2x": randn(1, 4, 2, 16, 16),
        "indices_latents_history_2x": torch.ones(2),
        "latents_history_4x": randn(1, 4, 4, 16, 16),
        "indices_latents_history_4x": torch.ones(4),
    }


def _minimax_h3() -> dict[str, Any]:
    text, video, audio = 6, 8, 4
    positions = torch.arange(text + video + audio)
    return {
        "hidden_states": randn(1, video, 16),
        "audio_hidden_states": randn(1, audio, 4),
        "encoder_hidden_states": randn(1, text, 16),
        "timestep": torch.tensor([0.5, 1.0]),
        "timestep_indices": torch.tensor([1] * text + [0] * (video + audio)),
        "token_tags": torch.tensor([1] * text + [0] * video + [2] * audio),
        "position_ids": positions[:, None].repeat(1, 3),
        "text_indices": positions[:text],
        "video_indices": positions[text : text + video],
        "audio_indices": positions[text + video :],
    }


def _sana_wm() -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 8, 2, 4, 4),
        "timestep": torch.full((1, 1, 2), 500.0),
        "encoder_hidden_states": randn(1, 1, 6, 16),
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 2]),
    }


def _sana_wm_refiner() -> dict[str, Any]:
    angles = randn(1, 16, 32)
    return {
        "hidden_states": randn(1, 16, 4),
        "encoder_hidden_states": randn(1, 8, 16),
        "timestep": torch.full((1, 16), 500.0),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": torch.tensor([[1.0] * 6 + [0.0] * 2]),
    }


def _wan_animate2() -> dict[str, Any]:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [randn(4, 1, 8, 8)],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": [randn(6, 16)],
        "condition_latents": [randn(4, 1, 8, 8)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 16,
        "encoder_hidden_states_image": randn(1, 4, 1280),
        "offset_grid_sizes": torch.tensor([[1, 4, 4]]),
    }


MODELS: dict[str, Tiny] = {
    "anyflow": Tiny("AnyFlowTransformer3DModel", _FAR, _anyflow),
    "anyflow_far": Tiny(
        "AnyFlowFARTransformer3DModel",
        {**_FAR, "chunk_partition": (1, 1), "full_chunk_limit": 3},
        lambda: _anyflow(chunk_partition=[1, 1]),
    ),
    "consisid": Tiny(
        "ConsisIDTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 2,
            "text_embed_dim": 8,
            "num_layers": 1,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 8,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 8,
            "cross_attn_interval": 1,
            "is_kps": False,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 1,
            "LFE_id_dim": 2,
            "LFE_vit_dim": 2,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 1,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        lambda: {
            "hidden_states": randn(2, 1, 4, 8, 8),
            "encoder_hidden_states": randn(2, 8, 8),
            "timestep": torch.randint(0, 1000, (2,)),
            "id_vit_hidden": [torch.ones(2, 2, 2)],
            "id_cond": torch.ones(2, 2),
        },
    ),
    "cosmos": Tiny(
        "CosmosTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mlp_ratio": 2,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "patch_size": (1, 2, 2),
            # The padding mask is resized with torchvision.
            "concat_padding_mask": False,
            "extra_pos_embed_type": "learnable",
        },
        _cosmos,
    ),
    "cosmos3": Tiny("Cosmos3OmniTransformer", _COSMOS3, _cosmos3),
    "framepack": Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        {
            **HUNYUAN_VIDEO,
            "attention_head_dim": 16,
            "patch_size": 2,
            "rope_axes_dim": (4, 6, 6),
            "has_image_proj": True,
            "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        _framepack,
    ),
    "helios": Tiny(
        "HeliosTransformer3DModel",
        {
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_dim": (4, 6, 6),
        },
        _helios,
    ),
    "hunyuan_video_i2v": Tiny(
        "HunyuanVideoTransformer3DModel",
        {
            **HUNYUAN_VIDEO,
            "in_channels": 2 * 4 + 1,
            "attention_head_dim": 16,
            "rope_axes_dim": (4, 6, 6),
            "image_condition_type": "latent_concat",
            "guidance_embeds": False,
        },
        lambda: {
            **hunyuan_video(),
            "hidden_states": randn(1, 2 * 4 + 1, 1, 16, 16),
            "guidance": None,
        },
    ),
    "hunyuan_video_token_replace": Tiny(
        "HunyuanVideoTransformer3DModel",
        {
            **HUNYUAN_VIDEO,
            "in_channels": 2,
            "attention_head_dim": 16,
            "rope_axes_dim": (4, 6, 6),
            "image_condition_type": "token_replace",
        },
        lambda: {**hunyuan_video(), "hidden_states": randn(1, 2, 1, 16, 16)},
    ),
    "kandinsky6": Tiny(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 16,
            "time_dim": 32,
            "patch_size": (1, 2, 2),
            "model_dim": 32,
            "ff_dim": 64,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
            "in_audio_dim": 4,
            "out_audio_dim": 4,
        },
        lambda: {
            "hidden_states": randn(1, 2, 8, 8, 9),
            "encoder_hidden_states": randn(1, 8, 16),
            "pooled_projections": randn(1, 16),
            "timestep": torch.tensor([500.0]),
            "audio_hidden_states": randn(1, 6, 4),
            "encoder_attention_mask": torch.tensor([[True] * 6 + [False] * 2]),
        },
    ),
    "kandinsky6_sr": Tiny(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 32,
            "model_dim": 32,
            "ff_dim": 64,
            "num_visual_blocks": 1,
            "axes_dims": (4, 6, 6),
        },
        lambda: {
            "hidden_states": randn(1, 2, 16, 16, 9),
            "timestep": torch.tensor([500.0]),
        },
    ),
    "ltx2": Tiny("LTX2VideoTransformer3DModel", _LTX2, _ltx2),
    "minimax_h3": Tiny(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 64,
            "in_channels": 4,
            "audio_in_channels": 4,
            "text_dim": 16,
            "freq_dim": 32,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 16,
            "rope_freq_dim": 4,
        },
        _minimax_h3,
    ),
    "sana_wm": Tiny(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 8,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 2,
            "caption_channels": 16,
            "mixed_precision": "fp32",
        },
        _sana_wm,
    ),
    "sana_wm_refiner": Tiny("SanaWMLTX2RefinerTransformer3DModel", _LTX2, _sana_wm_refiner),
    "wan_animate": Tiny(
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "attention_head_dim": 16,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 4,
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda: {
            **wan(12),
            "hidden_states": randn(1, 12, 3, 16, 16),
            "encoder_hidden_states_image": randn(1, 12, 4),
            "pose_hidden_states": randn(1, 4, 2, 16, 16),
            "face_pixel_values": randn(1, 3, 5, 16, 16),
        },
    ),
    "wan_animate2": Tiny(
        "WanAnimate2Transformer3DModel",
        {
            "text_len": 8,
            "in_dim": 8,
            "dim": 64,
            "ffn_dim": 32,
            "freq_dim": 32,
            "text_dim": 16,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 2,
        },
        _wan_animate2,
    ),
    "wan_i2v": Tiny(
        "WanTransformer3DModel",
        {**WAN, "attention_head_dim": 16, "image_dim": 4, "added_kv_proj_dim": 32},
        # What exceeds 512 tokens is taken for those of the image.
        lambda: {
            **wan(),
            "encoder_hidden_states": randn(1, 512, 16),
            "encoder_hidden_states_image": randn(1, 12, 4),
        },
    ),
}
