"""Autoencoders of sound, and vocoders."""

from __future__ import annotations

from tests.emulator.tiny_models.tiny import Tiny, randn

MODELS: dict[str, Tiny] = {
    "vae_cosmos3_audio": Tiny(
        "Cosmos3AVAEAudioTokenizer",
        {
            "vocoder_input_dim": 8,
            "dec_dim": 8,
            "dec_c_mults": (1, 2),
            "dec_strides": (2, 4),
            "enc_dim": 16,
            "enc_intermediate_dim": 32,
            "enc_num_layers": 1,
            "enc_num_blocks": 1,
            "enc_n_fft": 8,
            "enc_hop_length": 2,
            "enc_latent_dim": 16,
            "enc_c_mults": (1,),
            "enc_strides": (4,),
            "hop_size": 8,
        },
        lambda: {"sample": randn(1, 2, 64)},
    ),
    "vae_kvae_audio": Tiny(
        "AutoencoderKLKVAEAudio",
        {
            "encoder_dim": 8,
            "encoder_rates": [2, 4],
            "latent_dim": 16,
            "codebook_dim": 4,
            "decoder_dim": 16,
            "decoder_rates": [4, 2],
            "attn_num_heads": 2,
        },
        lambda: {"sample": randn(1, 1, 64)},
    ),
    "vae_ltx2_audio": Tiny(
        "AutoencoderKLLTX2Audio",
        {
            "base_channels": 16,
            "ch_mult": (1,),
            "num_res_blocks": 1,
            "resolution": 32,
            "latent_channels": 2,
            "mel_bins": 16,
        },
        lambda: {"sample": randn(1, 2, 5, 16)},
    ),
    "vae_minimax_h3_audio": Tiny(
        "AutoencoderKLMiniMaxH3Audio",
        {
            "encoder_dim": 8,
            "encoder_rates": (2, 4),
            "latent_dim": 32,
            "latent_channels": 4,
            "num_attention_heads": 2,
            "decoder_dim": 16,
            "decoder_rates": (4, 2),
            "decoder_kernel_sizes": (8, 4),
            "resblock_kernel_sizes": (3,),
            "resblock_dilation_sizes": ((1, 3),),
        },
        lambda: {"sample": randn(1, 1, 64)},
    ),
    "vae_longcat_audio": Tiny(
        "LongCatAudioDiTVae",
        {
            "channels": 8,
            "c_mults": [1, 2],
            "strides": [2, 4],
            "latent_dim": 4,
            "encoder_latent_dim": 8,
            "downsampling_ratio": 8,
        },
        lambda: {"sample": randn(1, 1, 64)},
    ),
    "vae_mmaudio": Tiny(
        "MMAudioVAE",
        {
            "mel_bins": 16,
            "latent_channels": 4,
            "hidden_channels": 32,
            "channel_multipliers": (1, 2),
            "layers_per_block": 1,
            "n_fft": 64,
            "hop_length": 16,
        },
        lambda: {"sample": randn(1, 512)},
    ),
    "vae_oobleck": Tiny(
        "AutoencoderOobleck",
        {
            "encoder_hidden_size": 12,
            "decoder_channels": 12,
            "decoder_input_channels": 6,
            "audio_channels": 2,
            "downsampling_ratios": [2, 4],
            "channel_multiples": [1, 2],
        },
        lambda: {"sample": randn(1, 2, 64)},
    ),
    "vae_same": Tiny(
        "AutoencoderSAME",
        {
            "patch_size": 4,
            "encoder_channels": 16,
            "encoder_c_mults": (2,),
            "encoder_strides": (4,),
            "encoder_transformer_depths": (1,),
            "latent_dim": 8,
            "dim_heads": 16,
        },
        lambda: {"sample": randn(1, 2, 128)},
    ),
    "vocoder_minimax_music3": Tiny(
        "MiniMaxMusic3Vocoder",
        {
            "latent_channels": 8,
            "decoder_input_dim": 16,
            "decoder_hidden_dim": 16,
            "upsampling_ratios": (4, 2),
        },
        lambda: {"latents": randn(1, 8, 8)},
    ),
    "vocoder_mmaudio": Tiny(
        "MMAudioVocoder",
        {
            "num_mels": 8,
            "upsample_initial_channel": 16,
            "upsample_rates": (4, 2),
            "upsample_kernel_sizes": (8, 4),
            "resblock_kernel_sizes": (3,),
            "resblock_dilation_sizes": ((1, 3, 5),),
        },
        lambda: {"mel": randn(1, 8, 8)},
    ),
}
