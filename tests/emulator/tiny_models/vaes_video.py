"""Autoencoders of videos."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulator.tiny_models.tiny import Tiny, randn


def _tiled(model: Any) -> None:
    """Allegro's autoencoder is defined over tiles only."""
    model.enable_tiling()
    model.kernel, model.stride = (16, 16, 16), (8, 8, 8)
    model.tile_overlap_t, model.tile_overlap_h, model.tile_overlap_w = 8, 8, 8


MODELS: dict[str, Tiny] = {
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
    "vae_kandinsky6_sr": Tiny(
        "Kandinsky6SRVAE",
        {
            "latent_channels": 8,
            "encoder_block_out_channels": (32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32),
            "layers_per_block": 1,
            "temporal_compression_ratio": 2,
        },
        lambda: {"sample": randn(1, 3, 5, 16, 16)},
    ),
    "vae_allegro": Tiny(
        "AutoencoderKLAllegro",
        {
            "down_block_types": ("AllegroDownBlock3D",) * 3,
            "up_block_types": ("AllegroUpBlock3D",) * 3,
            "block_out_channels": (8, 8, 8),
            "temporal_downsample_blocks": (True, True, False),
            "temporal_upsample_blocks": (False, True, True),
            "layers_per_block": 1,
            "norm_num_groups": 2,
        },
        lambda: {"sample": randn(1, 3, 16, 16, 16)},
        prepare=_tiled,
    ),
    "vae_cogvideox": Tiny(
        "AutoencoderKLCogVideoX",
        {
            "down_block_types": ("CogVideoXDownBlock3D",) * 3,
            "up_block_types": ("CogVideoXUpBlock3D",) * 3,
            "block_out_channels": (8, 8, 8),
            "latent_channels": 4,
            "layers_per_block": 1,
            "norm_num_groups": 2,
            "temporal_compression_ratio": 4,
            "sample_height": 16,
            "sample_width": 16,
        },
        lambda: {"sample": randn(1, 3, 5, 16, 16)},
    ),
    "vae_cosmos": Tiny(
        "AutoencoderKLCosmos",
        {
            "latent_channels": 4,
            "encoder_block_out_channels": (8, 8, 8),
            "decode_block_out_channels": (8, 8, 8),
            "attention_resolutions": (8,),
            "resolution": 64,
            "num_layers": 1,
            "patch_size": 4,
            "spatial_compression_ratio": 8,
            "temporal_compression_ratio": 4,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        lambda: {"sample": randn(1, 3, 5, 32, 32)},
    ),
    "vae_hunyuan_video": Tiny(
        "AutoencoderKLHunyuanVideo",
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        },
        lambda: {"sample": randn(1, 3, 9, 16, 16)},
    ),
    "vae_hunyuan_image_refiner": Tiny(
        "AutoencoderKLHunyuanImageRefiner",
        {
            "latent_channels": 4,
            "block_out_channels": (32, 32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
        },
        lambda: {"sample": randn(1, 3, 5, 16, 16)},
    ),
    "vae_hunyuan15": Tiny(
        "AutoencoderKLHunyuanVideo15",
        {
            "latent_channels": 4,
            "block_out_channels": (32, 32, 32),
            "layers_per_block": 1,
            "spatial_compression_ratio": 4,
            "temporal_compression_ratio": 4,
        },
        lambda: {"sample": randn(1, 3, 5, 16, 16)},
    ),
    "vae_kvae_video": Tiny(
        "AutoencoderKLKVAEVideo",
        {
            "ch": 32,
            "ch_mult": (1, 2),
            "num_res_blocks": 1,
            "z_channels": 4,
            "temporal_compress_times": 2,
        },
        lambda: {"sample": randn(1, 3, 3, 16, 16)},
    ),
    "vae_ltx": Tiny(
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8, 8),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1, 1),
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_spatio_temporal_scaling": (True, True, False, False),
            "decoder_inject_noise": (False, False, False, False, False),
            "upsample_residual": (False, False, False, False),
            "upsample_factor": (1, 1, 1, 1),
            "timestep_conditioning": False,
            "patch_size": 1,
            "encoder_causal": True,
            "decoder_causal": False,
        },
        lambda: {"sample": randn(1, 3, 9, 16, 16)},
    ),
    "vae_ltx2": Tiny(
        "AutoencoderKLLTX2Video",
        {
            "latent_channels": 8,
            "block_out_channels": (8, 8, 8, 8),
            "decoder_block_out_channels": (16, 32, 64),
            "layers_per_block": (1, 1, 1, 1, 1),
            "decoder_layers_per_block": (1, 1, 1, 1),
            "patch_size": 1,
            "decoder_causal": False,
        },
        lambda: {"sample": randn(1, 3, 9, 16, 16)},
    ),
    "vae_ltx2_diffusion": Tiny(
        "LTX2VideoDiffusionDecoderModel",
        {
            "latent_channels": 8,
            "patch_size": 1,
            "decoder_head_dim": 8,
            "decoder_stage_channels": (64, 32, 16, 16, 8),
            "decoder_stage_depths": (1, 1, 1, 1, 1),
            "decoder_stage_kernels": ((3, 3, 3),) * 4,
            "decoder_stage5_kernel": (3, 3, 3),
            "decoder_t_emb_dim": 16,
            "decoder_upsample_strides": ((1, 2, 2), (2, 1, 1), (2, 1, 1), (2, 1, 1)),
        },
        lambda: {
            "z": randn(1, 8, 3, 3, 3),
            "generator": torch.Generator().manual_seed(0),
        },
    ),
    "vae_magvit": Tiny(
        "AutoencoderKLMagvit",
        {
            "latent_channels": 4,
            "block_out_channels": [8, 8, 8, 8],
            "down_block_types": [
                "SpatialDownBlock3D",
                "SpatialTemporalDownBlock3D",
                "SpatialTemporalDownBlock3D",
                "SpatialTemporalDownBlock3D",
            ],
            "up_block_types": [
                "SpatialUpBlock3D",
                "SpatialTemporalUpBlock3D",
                "SpatialTemporalUpBlock3D",
                "SpatialTemporalUpBlock3D",
            ],
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        lambda: {"sample": randn(1, 3, 9, 16, 16)},
    ),
    "vae_minimax_h3": Tiny(
        "AutoencoderKLMiniMaxH3",
        {
            "latent_channels": 4,
            "block_out_channels": (8, 8, 16),
            "layers_per_block": 1,
            "spatial_downsample_factors": (2, 2, 1),
            "temporal_downsample_factors": (1, 2, 1),
            "norm_num_groups": 4,
            "decoder_num_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_attention_head_dim": 16,
            "decoder_num_register_tokens": 2,
            "clip_length": 5,
            "token_drop": 1,
            "latents_mean": (0.0,) * 4,
            "latents_std": (1.0,) * 4,
        },
        lambda: {"sample": randn(1, 3, 10, 16, 16)},
    ),
    "vae_mochi": Tiny(
        "AutoencoderKLMochi",
        {
            "encoder_block_out_channels": (32, 32, 32, 32),
            "decoder_block_out_channels": (32, 32, 32, 32),
            "latent_channels": 4,
            "layers_per_block": (1, 1, 1, 1, 1),
            "latents_mean": (0.0,) * 4,
            "latents_std": (1.0,) * 4,
        },
        lambda: {"sample": randn(1, 3, 7, 16, 16)},
    ),
    "vae_qwenimage": Tiny(
        "AutoencoderKLQwenImage",
        {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        lambda: {"sample": randn(1, 3, 1, 16, 16)},
    ),
    "vae_qwenimage21": Tiny(
        "AutoencoderKLQwenImage21",
        {
            "base_dim": 8,
            "decoder_base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 1, 1],
            "num_res_blocks": 1,
            "temperal_downsample": [False, True],
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
            "in_channels": 3,
            "out_channels": 3,
        },
        lambda: {"sample": randn(1, 3, 1, 16, 16)},
    ),
    "vae_vidtok": Tiny(
        "AutoencoderVidTok",
        {
            "ch": 32,
            "ch_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
        },
        lambda: {"sample": randn(1, 3, 17, 32, 32), "sample_posterior": False},
    ),
}
