"""Transformers for images: recent families."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulator.tiny_models.tiny import Tiny, randn


def _grid(height: int, width: int, axes: int) -> torch.Tensor:
    """Positions [height * width, axes] of image tokens; the last two axes count."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.zeros(height * width, axes)
    ids[:, -2], ids[:, -1] = rows.flatten(), columns.flatten()
    return ids


def _ideogram() -> dict[str, Any]:
    indicator = torch.full((1, 24), 2)
    indicator[:, :8] = 3
    position_ids = torch.zeros(1, 24, 3, dtype=torch.long)
    position_ids[0, 8:] = _grid(4, 4, 3).long()
    return {
        "hidden_states": randn(1, 24, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": randn(1, 24, 16),
        "position_ids": position_ids,
        "segment_ids": torch.tensor([[0] * 20 + [1] * 4]),
        "indicator": indicator,
    }


MODELS: dict[str, Tiny] = {
    "bria_fibo": Tiny(
        "BriaFiboTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "text_encoder_dim": 32,
            "axes_dims_rope": [0, 8, 8],
        },
        lambda: {
            "hidden_states": randn(1, 16, 8),
            "encoder_hidden_states": randn(1, 12, 64),
            "text_encoder_layers": [randn(1, 12, 32), randn(1, 12, 32)],
            "timestep": torch.tensor([1.0]),
            "img_ids": _grid(4, 4, 3),
            "txt_ids": torch.zeros(12, 3),
        },
    ),
    "bria_fibo2": Tiny(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "patch_size": 2,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 16,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (32, 16, 16),
        },
        lambda: {
            "hidden_states": randn(1, 4, 8, 8),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": randn(1, 2, 8, 16),
        },
    ),
    "dreamlite_transformer": Tiny(
        "DreamLiteTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 32,
            "num_layers": 1,
            "cross_attention_dim": 16,
            "norm_num_groups": 8,
            "use_linear_projection": True,
        },
        lambda: {"hidden_states": randn(1, 32, 8, 8), "encoder_hidden_states": randn(1, 6, 16)},
    ),
    "flux3": Tiny(
        "Flux3Transformer2DModel",
        {
            "in_channels": 8,
            "cond_in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "timestep_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        lambda: {
            "hidden_states": randn(1, 16, 8),
            "encoder_hidden_states": randn(1, 12, 32),
            "timestep": torch.tensor([0.5]),
            "img_ids": _grid(4, 4, 4),
            "txt_ids": torch.zeros(12, 4),
        },
    ),
    "hunyuan_image": Tiny(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": (1, 1),
            "guidance_embeds": False,
            "text_embed_dim": 32,
            "text_embed_2_dim": 32,
            "rope_axes_dim": (8, 8),
        },
        lambda: {
            "hidden_states": randn(1, 4, 8, 8),
            "timestep": torch.tensor([5.0]),
            "encoder_hidden_states": randn(1, 8, 32),
            "encoder_attention_mask": torch.tensor([[1.0] * 6 + [0.0] * 2]),
            "encoder_hidden_states_2": randn(1, 4, 32),
            "encoder_attention_mask_2": torch.ones(1, 4),
        },
    ),
    "ideogram4": Tiny(
        "Ideogram4Transformer2DModel",
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 16,
            "mrope_section": (6, 5, 5),
        },
        _ideogram,
    ),
    "joyimage_plus": Tiny(
        "JoyImageEditPlusTransformer3DModel",
        {
            "patch_size": [1, 2, 2],
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "text_dim": 16,
            "num_layers": 1,
            "rope_dim_list": [4, 6, 6],
        },
        lambda: {
            "hidden_states": randn(1, 8, 4, 1, 2, 2),
            "timestep": torch.tensor([5.0]),
            "encoder_hidden_states": randn(1, 6, 16),
            "encoder_hidden_states_mask": torch.tensor([[1.0] * 4 + [0.0] * 2]),
            "shape_list": [[(1, 2, 2), (1, 2, 2)]],
        },
    ),
    "nucleus": Tiny(
        "NucleusMoEImageTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 8,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
            "moe_enabled": True,
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 32,
            "capacity_factors": [2.0, 2.0],
        },
        lambda: {
            "hidden_states": randn(2, 16, 8),
            "img_shapes": [(1, 4, 4)] * 2,
            "encoder_hidden_states": randn(2, 7, 16),
            "encoder_hidden_states_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]).bool(),
            "timestep": torch.tensor([0.5, 0.5]),
        },
        unset=(".gate_up_proj", ".experts.down_proj"),
    ),
    "qwenimage21": Tiny(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "context_in_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": randn(1, 16, 8),
            "encoder_hidden_states": randn(1, 6, 16),
            "timestep": torch.tensor([0.5]),
            "img_shapes": [[(1, 4, 4)]],
            "img_mask": torch.tensor([[False] * 6 + [True] * 4]),
        },
    ),
    "rfd4": Tiny(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 2,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": 8,
            "token_type_emb_dim": 8,
            "cath_emb_dim": 4,
            "t_emb_dim": 16,
            "seq_sep_dim": 8,
            "xt_pair_dist_dim": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask"),
            "update_pair_repr_every_n": 2,
            "tri_mult_c": 16,
            "num_sequence_classes": 5,
        },
        lambda: {
            "bb_ca": randn(1, 6, 3),
            "local_latents": randn(1, 6, 8),
            "bb_ca_time": torch.tensor([0.5]),
            "local_latents_time": torch.tensor([0.5]),
            "padding_mask": torch.tensor([[True] * 5 + [False]]),
            "token_type": torch.zeros(1, 6, dtype=torch.long),
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 6, dtype=torch.bool),
                "supports_local_latent": torch.ones(1, 6, dtype=torch.bool),
            },
        },
    ),
}
