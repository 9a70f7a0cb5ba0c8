"""The parts of the demo's text-to-image pipeline: diffusers' and transformers' classes, all small.

Everything is what a large Flux pipeline has but for the sizes: two text encoders with tokenizers, a
transformer of double and single blocks, a VAE, a scheduler.
"""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from examples.make_tiny_flux import make_clip_tokenizer, make_t5_tokenizer
from scripts._digits import NAMES

# {} is the digit's name or its figure. The first is the one that the demo uses.
PROMPTS = ("the digit {}", "a picture of the digit {}", "{}")
WORDS = (*NAMES, "the", "digit", "a", "picture", "of")
# Tokens of a prompt, ends and padding included, for either text encoder.
TEXT_LENGTH = 8

_TEXT_WIDTH = 64
_HEADS, _HEAD_DIM = 3, 32
_LAYERS, _SINGLE_LAYERS = 2, 4
_LATENT_CHANNELS = 4
_VAE_CHANNELS = (8, 16, 32)


def prompts() -> tuple[list[str], list[int]]:
    """Every prompt that the model is trained with, and the digit that each asks for."""
    texts, labels = [], []
    for digit, name in enumerate(NAMES):
        for prompt in PROMPTS:
            for word in (name, str(digit)):
                texts.append(prompt.format(word))
                labels.append(digit)
    return texts, labels


def make_vae() -> AutoencoderKL:
    """A VAE from 3 x 32 x 32 to 4 x 16 x 16 and back."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(_VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(_VAE_CHANNELS),
        block_out_channels=_VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=_LATENT_CHANNELS,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """The whole pipeline around a VAE, with initial weights of everything else."""
    tokenizer = make_clip_tokenizer(WORDS, TEXT_LENGTH)
    tokenizer_2 = make_t5_tokenizer(WORDS)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=2 * _TEXT_WIDTH,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=_TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * _TEXT_WIDTH,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    transformer = FluxTransformer2DModel(
        in_channels=4 * _LATENT_CHANNELS,
        num_layers=_LAYERS,
        num_single_layers=_SINGLE_LAYERS,
        num_attention_heads=_HEADS,
        attention_head_dim=_HEAD_DIM,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    _start_as_identity(transformer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def _start_as_identity(transformer: FluxTransformer2DModel) -> None:
    """Zero the modulations and the output, as DiT does (arXiv 2212.09748): it learns faster."""
    modulations = ("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear")
    with torch.no_grad():
        for name, module in transformer.named_modules():
            # Not the proj_out of a block.
            if name == "proj_out" or name.endswith(modulations):
                module.weight.zero_()
                module.bias.zero_()
