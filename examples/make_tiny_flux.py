"""Build a tiny but complete Flux pipeline in a folder, without downloading anything.

    python examples/make_tiny_flux.py FOLDER

Every part is the real class of diffusers or transformers: two text encoders with their tokenizers,
the Flux transformer, the VAE and the scheduler. Only the sizes are small, and the weights are
random numbers from a seed. The pictures are therefore coloured clouds, not what the prompt says,
but they change with the prompt and with every layer. The same seed gives the same files, byte for
byte.
"""

import argparse
from pathlib import Path

import torch

# The tokenizers know the letters, the marks and a few whole words.
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"
WORDS = ("the", "and", "light", "house", "dusk", "oil", "on", "at", "red", "boat", "sea", "of")
CLIP_LENGTH = 77


def build(
    folder,
    seed=0,
    layers=3,
    single_layers=6,
    heads=4,
    head_dim=64,
    vae_channels=(32, 32, 64, 64),
):
    """Save a Flux pipeline with seeded random weights in ``folder`` and return the folder.

    Args:
        folder: where to write; made when missing.
        seed: seed of all weights.
        layers: blocks that keep picture and text apart.
        single_layers: blocks that join them.
        heads: attention heads of the transformer.
        head_dim: size of one attention head; a multiple of 16.
        vae_channels: channels of the VAE at each of its four resolutions.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        FluxPipeline,
        FluxTransformer2DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer, tokenizer_2 = make_clip_tokenizer(), make_t5_tokenizer()
    text_width = 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=text_width,
                intermediate_size=4 * text_width,
                projection_dim=text_width,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=CLIP_LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        text_encoder_2 = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer_2),
                d_model=text_width,
                d_kv=32,
                d_ff=4 * text_width,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
            )
        )
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=layers,
            num_single_layers=single_layers,
            num_attention_heads=heads,
            attention_head_dim=head_dim,
            joint_attention_dim=text_width,
            pooled_projection_dim=text_width,
            guidance_embeds=True,
            axes_dims_rope=(head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8),
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=tuple(vae_channels),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=8,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        for model in (text_encoder, text_encoder_2, transformer, vae):
            roughen(model)
        smoothen(transformer, vae)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipe = FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipe.save_pretrained(folder)
    return Path(folder)


def roughen(model, amount=0.1):
    """Move every weight off its initial value: a norm of ones or a bias of zeros does nothing."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=amount)


def smoothen(transformer, vae):
    """Let neighbouring pixels resemble each other, so that there is something to look at.

    Keys that equal the queries make each token attend to the tokens near it; the four pixels of a
    token get one colour; and the VAE's kernels blur.
    """
    with torch.no_grad():
        for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
            block.attn.to_k.load_state_dict(block.attn.to_q.state_dict())
            block.attn.norm_q.weight.mul_(3)
        weight = transformer.proj_out.weight
        first = weight.unflatten(0, (-1, 4))[:, :1]
        weight.copy_(first.expand(-1, 4, -1).flatten(0, 1) * 0.12)
        transformer.proj_out.bias.zero_()
        for name, parameter in vae.decoder.named_parameters():
            if parameter.ndim == 4:
                parameter.copy_(parameter.mean((2, 3), keepdim=True).expand_as(parameter))
            elif parameter.ndim == 1 and "norm" not in name:
                parameter.mul_(0.1)
        vae.decoder.conv_out.weight.mul_(0.6)


def make_clip_tokenizer(words=WORDS, length=CLIP_LENGTH):
    """A byte-pair tokenizer with a vocabulary of letters and a few merged words."""
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    vocab = [*LETTERS, *(letter + "</w>" for letter in LETTERS)]
    merges = []
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            parts[:2] = ["".join(merge)]
            if merge not in merges:
                merges.append(merge)
                vocab.append(parts[0])
    vocab += [start, end]
    return CLIPTokenizer(
        vocab={piece: number for number, piece in enumerate(vocab)},
        merges=merges,
        model_max_length=length,
    )


def make_t5_tokenizer(words=WORDS):
    """A unigram tokenizer with a vocabulary of letters and a few whole words."""
    from transformers import T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -5.0) for letter in ["▁", *LETTERS]]
    whole = [("▁" + word, -6.0) for word in words]
    return T5TokenizerFast(vocab=[*special, *letters, *whole], extra_ids=0, model_max_length=512)


def main():
    parser = argparse.ArgumentParser(description="Build a tiny Flux pipeline with random weights.")
    parser.add_argument("folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"saved {build(args.folder, seed=args.seed)}")


if __name__ == "__main__":
    main()
