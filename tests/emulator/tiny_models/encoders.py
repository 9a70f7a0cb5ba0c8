"""Text and image encoders of pipelines, from transformers."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch

from tests.emulator.tiny_models.tiny import Tiny, randn

_DECODER = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _mrope(section: list[int]) -> dict[str, Any]:
    """Positions of three axes, as transformers 5 writes them, and as the versions before do."""
    if metadata.version("transformers").startswith("4."):
        return {
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "default", "mrope_section": section},
        }
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": section,
        }
    }


def _text() -> dict[str, Any]:
    """Two prompts, the second shorter."""
    return {
        "input_ids": torch.randint(3, 90, (2, 8)),
        "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
    }


def _image_text(pixels: int) -> dict[str, Any]:
    """A prompt with one image of 4 x 4 patches, merged 2 x 2."""
    ids = torch.randint(3, 90, (1, 12))
    ids[0, 2:8] = torch.tensor([95, 97, 97, 97, 97, 96])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones(1, 12, dtype=torch.long),
        "pixel_values": randn(16, pixels),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 97).int(),
    }


MODELS: dict[str, Tiny] = {
    "clip": Tiny(
        ("CLIPTextConfig", "CLIPTextModel"),
        {
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "vocab_size": 100,
            "max_position_embeddings": 16,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
        lambda: {"input_ids": torch.randint(3, 100, (2, 8))},
        library="transformers",
    ),
    "t5": Tiny(
        ("T5Config", "T5EncoderModel"),
        {
            "vocab_size": 100,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 37,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
        },
        lambda: {
            "input_ids": torch.randint(3, 100, (2, 8)),
            "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        },
        library="transformers",
    ),
    "clip_vision": Tiny(
        ("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 16,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        lambda: {"pixel_values": randn(1, 3, 16, 16)},
        library="transformers",
    ),
    "siglip_vision": Tiny(
        ("SiglipVisionConfig", "SiglipVisionModel"),
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        lambda: {"pixel_values": randn(1, 3, 16, 16)},
        library="transformers",
    ),
    "bert": Tiny(
        ("BertConfig", "BertModel"),
        {
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        },
        _text,
        library="transformers",
    ),
    "umt5": Tiny(
        ("UMT5Config", "UMT5EncoderModel"),
        {
            "vocab_size": 100,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
        },
        _text,
        library="transformers",
    ),
    "llama": Tiny(
        ("LlamaConfig", "LlamaModel"),
        {**_DECODER},
        _text,
        library="transformers",
    ),
    "qwen2": Tiny(
        ("Qwen2Config", "Qwen2Model"),
        {**_DECODER},
        _text,
        library="transformers",
    ),
    "qwen3": Tiny(
        ("Qwen3Config", "Qwen3Model"),
        {**_DECODER, "head_dim": 16},
        _text,
        library="transformers",
    ),
    "mistral": Tiny(
        ("MistralConfig", "MistralModel"),
        {**_DECODER, "head_dim": 16},
        _text,
        library="transformers",
    ),
    "gemma": Tiny(
        ("GemmaConfig", "GemmaModel"),
        {**_DECODER, "head_dim": 16},
        _text,
        library="transformers",
    ),
    "gemma2": Tiny(
        ("Gemma2Config", "Gemma2Model"),
        {**_DECODER, "head_dim": 16, "sliding_window": 4},
        _text,
        library="transformers",
    ),
    "gemma3_text": Tiny(
        ("Gemma3TextConfig", "Gemma3TextModel"),
        {**_DECODER, "head_dim": 16, "sliding_window": 4},
        _text,
        library="transformers",
    ),
    "glm_text": Tiny(
        ("GlmConfig", "GlmModel"),
        {**_DECODER, "head_dim": 16},
        _text,
        library="transformers",
    ),
    "smollm3": Tiny(
        ("SmolLM3Config", "SmolLM3Model"),
        {**_DECODER},
        _text,
        library="transformers",
    ),
    "qwen25_vl": Tiny(
        ("Qwen2_5_VLConfig", "Qwen2_5_VLModel"),
        {
            "text_config": {
                **_DECODER,
                **_mrope([2, 1, 1]),
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": 97,
            "video_token_id": 98,
            "vision_start_token_id": 95,
            "vision_end_token_id": 96,
        },
        lambda: _image_text(3 * 2 * 4 * 4),
        library="transformers",
    ),
    "qwen3_vl": Tiny(
        ("Qwen3VLConfig", "Qwen3VLModel"),
        {
            "text_config": {
                **_DECODER,
                "head_dim": 16,
                **_mrope([4, 2, 2]),
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": 97,
            "video_token_id": 98,
            "vision_start_token_id": 95,
            "vision_end_token_id": 96,
        },
        lambda: _image_text(3 * 2 * 4 * 4),
        library="transformers",
    ),
    "gemma3": Tiny(
        ("Gemma3Config", "Gemma3Model"),
        {
            "text_config": {**_DECODER, "head_dim": 16, "sliding_window": 4},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "image_size": 16,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4,
            "image_token_id": 97,
        },
        _text,
        library="transformers",
    ),
    "dinov2": Tiny(
        ("Dinov2Config", "Dinov2Model"),
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "image_size": 16,
            "patch_size": 4,
        },
        lambda: {"pixel_values": randn(1, 3, 16, 16)},
        library="transformers",
    ),
}
