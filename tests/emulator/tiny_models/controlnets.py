"""ControlNets, adapters and other companions of a transformer or UNet."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulator.tiny_models import images
from tests.emulator.tiny_models.tiny import Tiny, randn
from tests.emulator.tiny_models.unets import unet

_CONTROL = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 16,
    "layers_per_block": 1,
    "conditioning_embedding_out_channels": (8, 8, 16, 16),
}


def _with_a_transformer(model: Any) -> None:
    """Give Z-Image's ControlNet the transformer's embedders, as its pipeline does."""
    model.from_transformer(model, images.MODELS["z_image"].build())


MODELS: dict[str, Tiny] = {
    "controlnet": Tiny(
        "ControlNetModel",
        {**_CONTROL, "attention_head_dim": 2},
        lambda: {**unet(), "controlnet_cond": randn(1, 3, 128, 128)},
    ),
    "controlnet_union": Tiny(
        "ControlNetUnionModel",
        {
            **_CONTROL,
            "attention_head_dim": 2,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 64,
            "num_trans_channel": 16,
            "num_trans_head": 2,
            "num_proj_channel": 16,
        },
        lambda: {
            **unet(),
            "controlnet_cond": [randn(1, 3, 128, 128)],
            "control_type": torch.tensor([[1.0, 0, 0, 0, 0, 0]]),
            "control_type_idx": [0],
            "added_cond_kwargs": {"text_embeds": randn(1, 16), "time_ids": torch.ones(1, 6)},
        },
    ),
    "controlnet_sparse": Tiny(
        "SparseControlNetModel",
        {
            **_CONTROL,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "attention_head_dim": 2,
            "motion_num_attention_heads": 2,
        },
        lambda: {
            "sample": randn(1, 4, 2, 16, 16),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": randn(2, 4, 16),
            "controlnet_cond": randn(1, 4, 2, 16, 16),
            "conditioning_mask": torch.ones(1, 1, 2, 16, 16),
        },
    ),
    "controlnet_xs": Tiny(
        "UNetControlNetXSModel",
        {
            "sample_size": 16,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "ctrl_conditioning_embedding_out_channels": (2, 2),
            "ctrl_block_out_channels": (4, 8),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 4,
        },
        lambda: {
            "sample": randn(1, 4, 16, 16),
            "timestep": torch.tensor([10]),
            "encoder_hidden_states": randn(1, 4, 16),
            "controlnet_cond": randn(1, 3, 32, 32),
            "conditioning_scale": 1.0,
        },
    ),
    "controlnet_flux": Tiny(
        "FluxControlNetModel",
        {
            "in_channels": 8,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [4, 4, 8],
        },
        lambda: {
            "hidden_states": randn(1, 16, 8),
            "controlnet_cond": randn(1, 16, 8),
            "encoder_hidden_states": randn(1, 12, 32),
            "pooled_projections": randn(1, 32),
            "timestep": torch.tensor([1.0]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(12, 3),
        },
    ),
    "controlnet_sd3": Tiny(
        "SD3ControlNetModel",
        {
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 32,
            "out_channels": 4,
            "pos_embed_max_size": 16,
        },
        lambda: {
            "hidden_states": randn(1, 4, 16, 16),
            "controlnet_cond": randn(1, 4, 16, 16),
            "encoder_hidden_states": randn(1, 6, 16),
            "pooled_projections": randn(1, 32),
            "timestep": torch.tensor([10]),
        },
    ),
    "controlnet_hunyuan_dit": Tiny(
        "HunyuanDiT2DControlNetModel",
        {
            "sample_size": 16,
            "transformer_num_layers": 4,
            "patch_size": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "in_channels": 4,
            "cross_attention_dim": 8,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 4,
            "text_len_t5": 4,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda: {
            "hidden_states": randn(2, 4, 16, 16),
            "timestep": torch.tensor([1.0, 7.0]),
            "controlnet_cond": randn(2, 4, 16, 16),
            "encoder_hidden_states": randn(2, 4, 8),
            "text_embedding_mask": torch.ones(2, 4),
            "encoder_hidden_states_t5": randn(2, 4, 8),
            "text_embedding_mask_t5": torch.ones(2, 4),
            "image_rotary_emb": (torch.ones(64, 8), torch.zeros(64, 8)),
        },
    ),
    "controlnet_qwenimage": Tiny(
        "QwenImageControlNetModel",
        {
            "in_channels": 8,
            "out_channels": 2,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": randn(1, 16, 8),
            "controlnet_cond": randn(1, 16, 8),
            "encoder_hidden_states": randn(1, 7, 16),
            "encoder_hidden_states_mask": torch.ones(1, 7).bool(),
            "timestep": torch.tensor([0.5]),
            "img_shapes": [(1, 4, 4)],
        },
        if_taken={"txt_seq_lens": [7]},
    ),
    "controlnet_sana": Tiny(
        "SanaControlNetModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
            "sample_size": 8,
        },
        lambda: {
            "hidden_states": randn(1, 4, 8, 8),
            "encoder_hidden_states": randn(1, 6, 8),
            "timestep": torch.tensor([10]),
            "controlnet_cond": randn(1, 4, 8, 8),
        },
    ),
    "t2i_adapter": Tiny(
        "T2IAdapter",
        {"channels": [8, 16], "num_res_blocks": 1, "downscale_factor": 4},
        lambda: {"x": randn(1, 3, 32, 32)},
    ),
    "anima_conditioner": Tiny(
        "AnimaTextConditioner",
        {
            "source_dim": 16,
            "target_dim": 32,
            "model_dim": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "target_vocab_size": 64,
            "min_sequence_length": 8,
        },
        lambda: {
            "source_hidden_states": randn(1, 6, 16),
            "target_input_ids": torch.randint(0, 64, (1, 7)),
            "target_attention_mask": torch.tensor([[1] * 5 + [0] * 2]),
            "source_attention_mask": torch.tensor([[1] * 4 + [0] * 2]),
        },
    ),
    "kandinsky6_upscaler": Tiny(
        "Kandinsky6SRLatentUpscalerBank",
        {
            "in_channels": 8,
            "stage_channels": (32, 32, 32),
            "num_pre_blocks": 1,
            "num_mid_blocks": 1,
            "num_post_blocks": 1,
            "num_x2_adapter_blocks": 1,
        },
        lambda: {"latents": randn(1, 8, 2, 4, 4), "scale": 2},
    ),
    "controlnet_z_image": Tiny(
        "ZImageControlNetModel",
        {
            "control_layers_places": [0],
            "control_refiner_layers_places": [0],
            "control_in_dim": 16,
            "add_control_noise_refiner": "control_noise_refiner",
            "dim": 16,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "n_kv_heads": 2,
        },
        lambda: {
            "x": [randn(16, 1, 4, 4)],
            "t": torch.tensor([0.5]),
            "cap_feats": [randn(8, 16)],
            "control_context": [randn(16, 1, 4, 4)],
        },
        prepare=_with_a_transformer,
    ),
}
