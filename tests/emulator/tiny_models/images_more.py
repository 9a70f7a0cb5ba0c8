"""Transformers for images: the other families."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulator.tiny_models.tiny import Tiny, randn


def _cogview() -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 8, 8),
        "encoder_hidden_states": randn(2, 8, 8),
        "timestep": torch.tensor([3, 7]),
        "original_size": torch.tensor([[20, 20]] * 2),
        "target_size": torch.tensor([[20, 20]] * 2),
        "crop_coords": torch.tensor([[0, 0]] * 2),
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


def _sd3(dim: int) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 32, 32),
        "encoder_hidden_states": randn(2, 154, 32),
        "pooled_projections": randn(2, 64),
        "timestep": torch.tensor([1, 1]),
    }


def _lumina_rope() -> torch.Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return get_2d_rotary_pos_embed_lumina(8, 8, 8)


MODELS: dict[str, Tiny] = {
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
    "sd3": Tiny("SD3Transformer2DModel", _SD3, lambda: _sd3(32)),
    "sd35": Tiny(
        "SD3Transformer2DModel",
        {**_SD3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        lambda: _sd3(32),
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
}
