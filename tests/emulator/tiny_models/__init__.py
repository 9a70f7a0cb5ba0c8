"""Tiny configurations of diffusers and transformers models, with inputs for one forward.

Each entry of :data:`MODELS` gives a class name, its configuration and its inputs, all random and on
the CPU. The configurations follow those of diffusers' own tests.
"""

from tests.emulator.tiny_models import (
    audio,
    controlnets,
    encoders,
    images,
    images_more,
    images_recent,
    unets,
    vaes,
    vaes_audio,
    vaes_video,
    videos,
    videos_recent,
)
from tests.emulator.tiny_models.tiny import Tiny, first_tensor, move, without_torch_npu

GROUPS = (
    images,
    images_more,
    images_recent,
    videos,
    videos_recent,
    audio,
    unets,
    controlnets,
    vaes,
    vaes_video,
    vaes_audio,
    encoders,
)

MODELS: dict[str, Tiny] = {name: tiny for group in GROUPS for name, tiny in group.MODELS.items()}
assert len(MODELS) == sum(len(group.MODELS) for group in GROUPS), "a name is used twice"

# Model classes of diffusers that have no configuration here, and why.
UNCONFIGURED: dict[str, str] = {
    "CosmosControlNetModel": "resizes its padding mask with torchvision, which is no dependency",
    "FluxMultiControlNetModel": "a list of FluxControlNetModel",
    "HunyuanDiT2DMultiControlNetModel": "a list of HunyuanDiT2DControlNetModel",
    "MultiControlNetModel": "a list of ControlNetModel",
    "MultiControlNetUnionModel": "a list of ControlNetUnionModel",
    "QwenImageMultiControlNetModel": "a list of QwenImageControlNetModel",
    "SD3MultiControlNetModel": "a list of SD3ControlNetModel",
    "MultiAdapter": "a list of T2IAdapter",
    "ControlNetXSAdapter": "has no forward; part of UNetControlNetXSModel",
    "MotionAdapter": "has no forward; part of UNetMotionModel",
}

__all__ = ["MODELS", "UNCONFIGURED", "Tiny", "first_tensor", "move", "without_torch_npu"]
