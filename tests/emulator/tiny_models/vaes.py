"""Autoencoders of images (and one of proteins)."""

from __future__ import annotations

import torch

from tests.emulator.tiny_models.tiny import Tiny, randn

MODELS: dict[str, Tiny] = {
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
    "vae_asym": Tiny(
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "down_block_out_channels": (8, 16),
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "up_block_out_channels": (8, 16),
            "norm_num_groups": 4,
        },
        lambda: {"sample": randn(1, 3, 16, 16), "mask": torch.ones(1, 1, 16, 16)},
    ),
    "vae_dc": Tiny(
        "AutoencoderDC",
        {
            "latent_channels": 4,
            "attention_head_dim": 8,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 16),
            "decoder_block_out_channels": (8, 16),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
        },
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "vae_flux2": Tiny(
        "AutoencoderKLFlux2",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
        },
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "vae_hunyuan_image": Tiny(
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 16,
        },
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "vae_kvae": Tiny(
        "AutoencoderKLKVAE",
        {
            "channels": 32,
            "num_enc_blocks": 1,
            "num_dec_blocks": 1,
            "z_channels": 4,
            "ch_mult": (1, 2),
            "sample_size": 16,
        },
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "vae_rae": Tiny(
        "AutoencoderRAE",
        {
            "encoder_type": "mae",
            "encoder_hidden_size": 64,
            "encoder_patch_size": 4,
            "encoder_num_hidden_layers": 1,
            "decoder_hidden_size": 32,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 64,
            "patch_size": 4,
            "encoder_input_size": 16,
            "image_size": 16,
        },
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "vae_tiny": Tiny(
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "vae_consistency": Tiny(
        "ConsistencyDecoderVAE",
        {
            "encoder_block_out_channels": (8, 8),
            "encoder_down_block_types": ("DownEncoderBlock2D",) * 2,
            "encoder_norm_num_groups": 4,
            "encoder_layers_per_block": 1,
            "decoder_block_out_channels": (8, 8),
            "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2,
            "decoder_norm_num_groups": 4,
            "decoder_layers_per_block": 1,
        },
        lambda: {
            "sample": randn(1, 3, 32, 32),
            "generator": torch.Generator().manual_seed(0),
        },
    ),
    "vqmodel": Tiny(
        "VQModel",
        {
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
        },
        lambda: {"sample": randn(1, 3, 16, 16)},
    ),
    "vae_temporal": Tiny(
        "AutoencoderKLTemporalDecoder",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
        },
        lambda: {"sample": randn(2, 3, 16, 16), "num_frames": 2},
    ),
    "rfd4_autoencoder": Tiny(
        "RFD4ProteinaAutoencoder",
        {
            "atom37_mask": [[True] * 37] * 5,
            "allowed_residue_types": [[True] * 5] * 7,
            "latent_dim": 8,
            "n_residue_types": 5,
            "nlayers": 1,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "token_type_emb_dim": 8,
            "encoder_feats_seq": ("token_type",),
            "decoder_feats_seq": ("ca_coors_nm", "z_latent_seq", "token_type"),
        },
        lambda: {
            "z_latent": randn(1, 6, 8),
            "ca_coors_nm": randn(1, 6, 3),
            "padding_mask": torch.tensor([[True] * 5 + [False]]),
            "token_type": torch.zeros(1, 6, dtype=torch.long),
            "atom37_mask": torch.ones(1, 6, 37, dtype=torch.bool),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 6, dtype=torch.bool),
                "supports_local_latent": torch.ones(1, 6, dtype=torch.bool),
            },
        },
    ),
}
