"""Transformers for sound and music."""

from __future__ import annotations

import torch

from tests.emulator.tiny_models.tiny import Tiny, randn

MODELS: dict[str, Tiny] = {
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
    "ace_step": Tiny(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "patch_size": 2,
            "sliding_window": 4,
            "encoder_hidden_size": 32,
        },
        lambda: {
            "hidden_states": randn(1, 16, 8),
            "timestep": torch.tensor([0.5]),
            "timestep_r": torch.tensor([0.5]),
            "encoder_hidden_states": randn(1, 10, 32),
            "context_latents": randn(1, 16, 16),
        },
    ),
    "minimax_music3": Tiny(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 8,
            "condition_dim": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 64,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
        lambda: {
            "hidden_states": randn(1, 8, 16),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": randn(1, 16, 16),
        },
    ),
    "minimax_music3_depth": Tiny(
        "MiniMaxMusic3RVQDepthDecoder",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "audio_vocab_size": 16,
            "num_codebooks": 4,
            "max_position_embeddings": 8,
        },
        lambda: {"inputs_embeds": randn(2, 4, 32)},
    ),
    "minimax_music3_condition": Tiny(
        "MiniMaxMusic3ConditionEncoder",
        {
            "condition_hidden_dim": 16,
            "num_condition_layers": 2,
            "out_dim": 16,
        },
        lambda: {"hidden_states": randn(1, 8, 32)},
    ),
    "t5_film": Tiny(
        "T5FilmDecoder",
        {
            "input_dims": 16,
            "targets_length": 8,
            "d_model": 32,
            "num_layers": 2,
            "num_heads": 2,
            "d_kv": 16,
            "d_ff": 64,
            "dropout_rate": 0.0,
        },
        lambda: {
            "encodings_and_masks": [(randn(1, 6, 32), torch.ones(1, 6))],
            "decoder_input_tokens": randn(1, 8, 16),
            "decoder_noise_time": torch.tensor([0.5]),
        },
    ),
}
