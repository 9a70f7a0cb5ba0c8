"""Models as they were released, at the sizes at which people run them: weights without values.

Each is built as ``from_pretrained(..., torch_dtype=...)`` builds it and called as its pipeline
calls it. The count of parameters beside the published one shows that the configuration is the
released one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mindiesd.emulator.outline import withhold

HALF = torch.bfloat16
MEMORY = "from memory"


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        name: for people.
        size: what is drawn: resolution, frames, length of the text.
        source: where the configuration is from.
        published: its parameters in billions, as its makers or the library's pages say.
        forwards: how often a step calls it, guidance included.
        build: makes it, without weights.
        inputs: the arguments of one call, on the device.
        call: calls it.
        dtype: of its weights.
        per: what the figures are for.
    """

    name: str
    size: str
    source: str
    published: float
    forwards: int
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    call: Callable[..., Any] = lambda model, **inputs: model(**inputs)
    dtype: torch.dtype = HALF
    per: str = "step"


def unknown(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """A tensor on the device that has no values."""
    return withhold(torch.empty(shape, dtype=dtype, device="npu"))


def known(value: Any, dtype: torch.dtype) -> Tensor:
    """A tensor on the device that has values."""
    return torch.as_tensor(value, dtype=dtype).to("npu")


def placed(subject: Subject) -> tuple[Any, int]:
    """The model on the device, its weights unknown, and how many it has."""
    from accelerate import init_empty_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(subject.dtype)  # as from_pretrained does
    try:
        with init_empty_weights(include_buffers=False):
            model = subject.build()
    finally:
        torch.set_default_dtype(before)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # weights that are one had become two on the meta device
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    if type(model).__module__.startswith("transformers"):
        kept = ()  # there it is for float16 alone
    made: dict[int, torch.nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                parts = f"{prefix}.{name}".split(".")
                dtype = torch.float32 if any(part in kept for part in parts) else subject.dtype
                data = unknown(*parameter.shape, dtype=dtype)
                made[id(parameter)] = torch.nn.Parameter(data, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("npu")
    return model.eval(), sum(parameter.numel() for parameter in made.values())


def _flux() -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def _flux_inputs() -> dict[str, Any]:
    from diffusers import FluxPipeline

    return {
        "hidden_states": unknown(1, 64 * 64, 64),
        "timestep": known([0.5], HALF),
        "guidance": known([3.5], torch.float32),
        "pooled_projections": unknown(1, 768),
        "encoder_hidden_states": unknown(1, 512, 4096),
        "txt_ids": torch.zeros(512, 3, dtype=HALF, device="npu"),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, 64, 64, "npu", HALF),
        "return_dict": False,
    }


def _wan() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel()


def _wan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": unknown(1, 16, 21, 90, 160),
        "timestep": known([500], torch.int64),
        "encoder_hidden_states": unknown(1, 512, 4096),
        "return_dict": False,
    }


def _hunyuan() -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel()


def _hunyuan_inputs() -> dict[str, Any]:
    return {
        "hidden_states": unknown(1, 16, 33, 90, 160),
        "timestep": known([500], HALF),
        "encoder_hidden_states": unknown(1, 256, 4096),
        "encoder_attention_mask": known([[1] * 64 + [0] * 192], HALF),
        "pooled_projections": unknown(1, 768),
        "guidance": known([6000], HALF),
        "return_dict": False,
    }


def _qwen() -> Any:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel()


def _qwen_inputs() -> dict[str, Any]:
    return {
        "hidden_states": unknown(1, 64 * 64, 64),
        "timestep": known([0.5], HALF),
        "encoder_hidden_states": unknown(1, 128, 3584),
        "encoder_hidden_states_mask": None,  # what the pipeline passes where no token is padding
        "img_shapes": [[(1, 64, 64)]],
        "return_dict": False,
    }


def _sdxl() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def _sdxl_inputs() -> dict[str, Any]:
    half = torch.float16
    return {
        "sample": unknown(2, 4, 128, 128, dtype=half),
        "timestep": known(500, torch.int64),
        "encoder_hidden_states": unknown(2, 77, 2048, dtype=half),
        "added_cond_kwargs": {
            "text_embeds": unknown(2, 1280, dtype=half),
            "time_ids": known([[1024, 1024, 0, 0, 1024, 1024]] * 2, half),
        },
        "return_dict": False,
    }


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
        )
    )


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


SUBJECTS = (
    Subject(
        "Flux.1-dev",
        "1024 × 1024 (4096 tokens), text 512",
        "defaults of FluxTransformer2DModel, with `guidance_embeds` (its docstring)",
        11.9,
        1,
        _flux,
        _flux_inputs,
    ),
    Subject(
        "Wan 2.1 T2V 14B",
        "1280 × 720, 81 frames (75 600 tokens), text 512",
        "defaults of WanTransformer3DModel",
        14.3,
        2,
        _wan,
        _wan_inputs,
    ),
    Subject(
        "HunyuanVideo",
        "1280 × 720, 129 frames (118 800 tokens), text 256, of which 64 are not padding",
        "defaults of HunyuanVideoTransformer3DModel; size: defaults of its pipeline",
        12.8,
        1,
        _hunyuan,
        _hunyuan_inputs,
    ),
    Subject(
        "Qwen-Image",
        "1024 × 1024 (4096 tokens), text 128",
        "defaults of QwenImageTransformer2DModel; size: default of its pipeline",
        20.4,
        2,
        _qwen,
        _qwen_inputs,
    ),
    Subject(
        "SDXL (UNet)",
        "1024 × 1024, text 77, batch 2 for guidance",
        f"the released `unet/config.json`, {MEMORY}",
        2.57,
        1,
        _sdxl,
        _sdxl_inputs,
        dtype=torch.float16,
    ),
    Subject(
        "T5-XXL encoder",
        "512 tokens (Flux)",
        f"`google/t5-v1_1-xxl`, {MEMORY}",
        4.76,
        1,
        _t5,
        lambda: {"input_ids": known([[1] * 512], torch.int64)},
        per="prompt",
    ),
    Subject(
        "AutoencoderKL, decoding (Flux)",
        "128 × 128 latents to 1024 × 1024",
        f"`vae/config.json` of Flux.1, {MEMORY}",
        0.084,
        1,
        _vae,
        lambda: {"z": unknown(1, 16, 128, 128), "return_dict": False},
        call=lambda model, **inputs: model.decode(**inputs),
        per="picture",
    ),
)
