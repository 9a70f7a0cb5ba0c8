"""UNets."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulator.tiny_models.tiny import Tiny, randn

UNET = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "layers_per_block": 1,
    "sample_size": 16,
}


def unet() -> dict[str, Any]:
    return {
        "sample": randn(1, 4, 16, 16),
        "timestep": torch.tensor([10]),
        "encoder_hidden_states": randn(1, 4, 16),
    }


MODELS: dict[str, Tiny] = {
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
    "unet1d": Tiny(
        "UNet1DModel",
        {
            "block_out_channels": (32, 32, 64),
            "in_channels": 4,
            "out_channels": 4,
            "norm_num_groups": 8,
            "sample_size": 16,
            "use_timestep_embedding": False,
            "time_embedding_type": "fourier",
            "extra_in_channels": 64,
        },
        lambda: {"sample": randn(1, 4, 64), "timestep": torch.tensor([10])},
    ),
    "unet2d": Tiny(
        "UNet2DModel",
        {
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
            "layers_per_block": 1,
            "sample_size": 16,
        },
        lambda: {"sample": randn(1, 3, 16, 16), "timestep": torch.tensor([10])},
    ),
    "unet3d": Tiny(
        "UNet3DConditionModel",
        {
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
            "layers_per_block": 1,
            "sample_size": 16,
        },
        lambda: {
            "sample": randn(1, 4, 2, 16, 16),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": randn(1, 4, 16),
        },
    ),
    "unet_sdxl": Tiny(
        "UNet2DConditionModel",
        {
            **UNET,
            "attention_head_dim": (1, 2),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2),
            "projection_class_embeddings_input_dim": 64,
        },
        lambda: {
            **unet(),
            "added_cond_kwargs": {"text_embeds": randn(1, 16), "time_ids": torch.ones(1, 6)},
        },
    ),
    "unet_dreamlite": Tiny(
        "DreamLiteUNetModel",
        {
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "down_block_types": (
                "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
                "DreamLiteCrossAttnDownBlock2D",
            ),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            "cross_attention_dim": 16,
            "attention_head_dim": (1, 2),
            "num_attention_heads": None,
            "layers_per_block": 1,
            "qk_norm": "rms_norm",
            "sample_size": 16,
        },
        unet,
    ),
    "i2vgen": Tiny(
        "I2VGenXLUNet",
        {
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "cross_attention_dim": 16,
            "attention_head_dim": 8,
            "layers_per_block": 1,
            "sample_size": 16,
        },
        lambda: {
            "sample": randn(1, 4, 2, 16, 16),
            "timestep": torch.tensor([10]),
            "fps": torch.tensor([2]),
            "image_latents": randn(1, 4, 2, 16, 16),
            "image_embeddings": randn(1, 16),
            "encoder_hidden_states": randn(1, 4, 16),
        },
    ),
    "kandinsky3": Tiny(
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 16,
            "groups": 4,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "block_out_channels": (16, 32, 32, 64),
            "cross_attention_dim": 16,
            "encoder_hid_dim": 16,
        },
        lambda: {
            "sample": randn(1, 4, 16, 16),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": randn(1, 6, 16),
            "encoder_attention_mask": torch.tensor([[1.0] * 4 + [0.0] * 2]),
        },
    ),
    "unet_motion": Tiny(
        "UNetMotionModel",
        {
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "layers_per_block": 1,
            "sample_size": 16,
        },
        lambda: {
            "sample": randn(1, 4, 2, 16, 16),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": randn(2, 4, 16),
        },
    ),
    "svd": Tiny(
        "UNetSpatioTemporalConditionModel",
        {
            "block_out_channels": (32, 64),
            "down_block_types": (
                "CrossAttnDownBlockSpatioTemporal",
                "DownBlockSpatioTemporal",
            ),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 16,
            "num_attention_heads": (4, 4),
            "layers_per_block": 1,
            "projection_class_embeddings_input_dim": 24,
            "addition_time_embed_dim": 8,
            "num_frames": 2,
            "in_channels": 4,
            "sample_size": 16,
        },
        lambda: {
            "sample": randn(1, 2, 4, 16, 16),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": randn(1, 1, 16),
            "added_time_ids": torch.ones(1, 3),
        },
    ),
    "cascade": Tiny(
        "StableCascadeUNet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (16, 32),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "clip_text_in_channels": 16,
            "clip_text_pooled_in_channels": 16,
            "clip_image_in_channels": 16,
            "dropout": (0.0, 0.0),
            "switch_level": (False,),
        },
        lambda: {
            "sample": randn(1, 4, 8, 8),
            "timestep_ratio": torch.tensor([0.5]),
            "clip_text_pooled": randn(1, 1, 16),
            "clip_text": randn(1, 6, 16),
            "clip_img": randn(1, 1, 16),
        },
    ),
    "uvit": Tiny(
        "UVit2DModel",
        {
            "hidden_size": 32,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 16,
            "vocab_size": 32,
            "codebook_size": 24,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 1,
            "downsample": True,
            "upsample": True,
            "block_num_heads": 2,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "sample_size": 8,
        },
        lambda: {
            "input_ids": torch.randint(0, 24, (1, 8, 8)),
            "encoder_hidden_states": randn(1, 4, 16),
            "pooled_text_emb": randn(1, 16),
            "micro_conds": torch.ones(1, 5),
        },
    ),
}
