"""Tiny diffusers models, built from configuration with random weights: no download, no hub.

Every builder is deterministic: the same call gives the same weights, whatever was drawn before it,
and the global random state is left as it was. The models are in ``eval`` mode, float32 on the CPU.

    model = tiny_flux_transformer()
    with torch.inference_mode():
        sample = model(**flux_inputs(model)).sample
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel

__all__ = [
    "flux_inputs",
    "sd3_inputs",
    "tiny_flux_pipeline",
    "tiny_flux_transformer",
    "tiny_sd3_transformer",
]


def tiny_flux_transformer(seed: int = 0, **overrides: Any) -> FluxTransformer2DModel:
    """A Flux transformer with one double and one single block: SDPA, RMSNorm, LayerNorm, RoPE.

    Args:
        seed: seed of the weights.
        overrides: configuration entries that differ, e.g. ``num_layers=2``.
    """
    from diffusers import FluxTransformer2DModel

    config = {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": False,
        "axes_dims_rope": (8, 12, 12),
    }
    return _seeded(FluxTransformer2DModel, seed, config | overrides)


def flux_inputs(
    model: FluxTransformer2DModel,
    batch: int = 1,
    height: int = 4,
    width: int = 4,
    text: int = 7,
    seed: int = 1,
) -> dict[str, torch.Tensor]:
    """Random keyword arguments for one forward of ``model``, in its dtype and on its device.

    Args:
        model: what :func:`tiny_flux_transformer` returned.
        batch: pictures at once.
        height: rows of picture tokens.
        width: columns of picture tokens.
        text: text tokens.
        seed: seed of the values.
    """
    draw = _Draw(model, seed)
    config = model.config
    picture_ids = torch.zeros(height, width, 3)
    picture_ids[..., 1] = torch.arange(height)[:, None]
    picture_ids[..., 2] = torch.arange(width)[None, :]
    inputs = {
        "hidden_states": draw(batch, height * width, config.in_channels),
        "encoder_hidden_states": draw(batch, text, config.joint_attention_dim),
        "pooled_projections": draw(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 0.5, dtype=draw.dtype, device=draw.device),
        "img_ids": picture_ids.reshape(-1, 3).to(draw.device, draw.dtype),
        "txt_ids": torch.zeros(text, 3, dtype=draw.dtype, device=draw.device),
    }
    if config.guidance_embeds:
        inputs["guidance"] = torch.full((batch,), 3.5, dtype=draw.dtype, device=draw.device)
    return inputs


def tiny_sd3_transformer(seed: int = 0, **overrides: Any) -> SD3Transformer2DModel:
    """An SD3.5 transformer with two blocks, the first with dual attention, and RMS-normed q and k.

    Args:
        seed: seed of the weights.
        overrides: configuration entries that differ, e.g. ``qk_norm=None``.
    """
    from diffusers import SD3Transformer2DModel

    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    }
    return _seeded(SD3Transformer2DModel, seed, config | overrides)


def sd3_inputs(
    model: SD3Transformer2DModel, batch: int = 1, text: int = 7, seed: int = 1
) -> dict[str, torch.Tensor]:
    """Random keyword arguments for one forward of ``model``, in its dtype and on its device.

    Args:
        model: what :func:`tiny_sd3_transformer` returned.
        batch: pictures at once.
        text: text tokens.
        seed: seed of the values.
    """
    draw = _Draw(model, seed)
    config = model.config
    return {
        "hidden_states": draw(batch, config.in_channels, config.sample_size, config.sample_size),
        "encoder_hidden_states": draw(batch, text, config.joint_attention_dim),
        "pooled_projections": draw(batch, config.pooled_projection_dim),
        "timestep": torch.full((batch,), 500.0, dtype=draw.dtype, device=draw.device),
    }


def tiny_flux_pipeline(path: str | Path) -> FluxPipeline:
    """A whole Flux pipeline (text encoders, transformer, VAE, scheduler), loaded from ``path``.

    It is built there first when ``path`` holds no pipeline yet. Call it with small pictures, e.g.
    ``pipe("a red boat", height=32, width=32, num_inference_steps=2, output_type="np")``.

    Args:
        path: a folder, usually below ``tmp_path``.
    """
    from diffusers import FluxPipeline

    from examples.make_tiny_flux import build

    folder = Path(path)
    if not (folder / "model_index.json").exists():
        build(folder, **TINY)
    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# What `tiny_flux_pipeline` asks of the example's builder, which makes a larger one by default.
TINY = {
    "layers": 1,
    "single_layers": 1,
    "heads": 2,
    "head_dim": 32,
    "vae_channels": (16, 16, 16, 16),
}


class _Draw:
    """Normal random tensors in the dtype and on the device of a model."""

    def __init__(self, model: torch.nn.Module, seed: int) -> None:
        parameter = next(model.parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, self.dtype)


def _seeded(model: type, seed: int, config: dict[str, Any]) -> Any:
    """``model(**config)`` with seeded weights, none of them left at an initial zero or one.

    A norm's weight of ones and a bias of zeros would hide a redirect that drops them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = model(**config).eval()
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built
