"""Tiny text encoders with rotary embeddings: configuration, and inputs with padding."""

from __future__ import annotations

from typing import Any

import torch

from tests.emulator.tiny_models import MODELS, Tiny

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def _ids() -> dict[str, Any]:
    return {
        "input_ids": torch.randint(3, 90, (2, 8)),
        "attention_mask": torch.tensor([[1] * 8, [0] * 3 + [1] * 5]),
    }


def _positions() -> dict[str, Any]:
    """Positions of their own for each row, so that there is a table a batch."""
    positions = torch.stack((torch.arange(8), torch.arange(8).sub(3).clamp(min=0)))
    return {**_ids(), "position_ids": positions}


def _text(name: str, **more: Any) -> Tiny:
    return Tiny((f"{name}Config", f"{name}Model"), {**_TEXT, **more}, _positions, "transformers")


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "fullatt_block_indexes": [1],
    "window_size": 8,
}


def _picture() -> dict[str, Any]:
    """One picture of 4 x 4 patches of 2 x 2 pixels, two frames: four tokens after merging."""
    ids = torch.randint(3, 90, (1, 8))
    ids[0, 2:6] = 95
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "pixel_values": torch.randn(16, 3 * 2 * 2 * 2),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 95).long(),
    }


ENCODERS = {
    "llama": _text("Llama"),
    "qwen2": _text("Qwen2"),
    "qwen3": _text("Qwen3"),
    "mistral": _text("Mistral"),
    "ministral3": _text("Ministral3"),
    "phi3": _text(
        "Phi3",
        rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
    ),
    "gemma2": _text("Gemma2"),
    "gemma3": Tiny(("Gemma3TextConfig", "Gemma3TextModel"), _TEXT, _positions, "transformers"),
    "glm": _text("Glm", partial_rotary_factor=0.5),
    "glm4": _text("Glm4", partial_rotary_factor=0.5),
    "qwen2_5_vl": Tiny(
        ("Qwen2_5_VLConfig", "Qwen2_5_VLModel"),
        {
            "text_config": {
                **_TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [1, 1, 2],
                },
            },
            "vision_config": _VISION,
            "image_token_id": 95,
            "video_token_id": 96,
            "vision_start_token_id": 97,
            "vision_end_token_id": 98,
        },
        _picture,
        "transformers",
    ),
}


def _allegro() -> dict[str, Any]:
    """With the tables and positions that Allegro's pipeline makes."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    tables = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (4, 4)), (4, 4), 2)
    grids = torch.cartesian_prod(*(grid.long() for grid in tables[3:]))
    positions = grids.transpose(0, 1).reshape(3, 1, -1).contiguous()
    return {
        **MODELS["allegro"].inputs(),
        "image_rotary_emb": (tables[:3], tuple(positions)),
    }


ALLEGRO = Tiny(
    MODELS["allegro"].cls,
    {
        **MODELS["allegro"].config,
        "attention_head_dim": 12,
        "cross_attention_dim": 24,
        "num_layers": 2,
    },
    _allegro,
)

_MODELS = (
    "flux",
    "cogview4",
    "hidream",
    "hunyuan_video",
    "joyimage",
    "longcat_audio",
    "ltx",
    "lumina_next",
    "lumina2",
    "omnigen",
    "prx",
    "qwenimage",
    "stable_audio",
    "stable_audio3",
)
MODELS_WITH_ROPE = {**{name: MODELS[name] for name in _MODELS}, "allegro": ALLEGRO, **ENCODERS}
