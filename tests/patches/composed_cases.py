"""Every module that writes its attention out, tiny, and what to call it with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

randn = torch.randn


@dataclass(frozen=True)
class Case:
    """One module.

    Attributes:
        record: name of the patch that redirects it.
        build: makes the module.
        inputs: makes its positional and keyword arguments.
        attentions: how many there are in one call.
        others: what else the record redirects in it.
    """

    record: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    attentions: int = 1
    others: int = 0


def _unet_1d() -> nn.Module:
    from diffusers.models.unets.unet_1d_blocks import SelfAttention1d

    return SelfAttention1d(32, n_head=4)


def _perceiver() -> nn.Module:
    from diffusers.models.transformers.consisid_transformer_3d import PerceiverAttention

    return PerceiverAttention(32, dim_head=8, heads=4)


def _perceiver_cross() -> nn.Module:
    from diffusers.models.transformers.consisid_transformer_3d import PerceiverCrossAttention

    return PerceiverCrossAttention(32, dim_head=8, heads=4, kv_dim=24)


def _projection() -> nn.Module:
    from diffusers.models.embeddings import IPAdapterTimeImageProjectionBlock

    return IPAdapterTimeImageProjectionBlock(hidden_dim=32, dim_head=8, heads=4)


def _pooling() -> nn.Module:
    from diffusers.models.embeddings import AttentionPooling

    return AttentionPooling(4, 32)


def _ltx2_audio() -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import LTX2AudioAttnBlock

    return LTX2AudioAttnBlock(32)


def attention(processor: str = "AttnProcessor", *given: Any, **config: Any) -> nn.Module:
    """An ``Attention`` with one of diffusers' processors, made of ``given``."""
    from diffusers.models import attention_processor

    made = getattr(attention_processor, processor)(*given)
    settings = {"query_dim": 32, "heads": 4, "dim_head": 8, "processor": made}
    return attention_processor.Attention(**settings | config)


def _siglip(version: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, f"Siglip{version}VisionConfig")(
            hidden_size=32, intermediate_size=64, num_attention_heads=4
        )
        config._attn_implementation = "sdpa"
        name = f"siglip{version}"
        module = getattr(getattr(transformers.models, name), f"modeling_{name}")
        return getattr(module, f"Siglip{version}MultiheadAttentionPoolingHead")(config)

    return build


def _added() -> dict[str, Any]:
    return {"added_kv_proj_dim": 24, "norm_num_groups": 4, "bias": True}


def _masked() -> dict[str, torch.Tensor]:
    """The last three keys of the second row are not seen."""
    mask = torch.zeros(2, 1, 7)
    mask[1, :, 4:] = -10000.0
    return {"encoder_hidden_states": randn(2, 7, 32), "attention_mask": mask}


def _image() -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": randn(2, 5, 24)}


def _adapters() -> dict[str, Any]:
    return {"encoder_hidden_states": (randn(2, 7, 32), [randn(2, 4, 32), randn(2, 4, 32)])}


def _masked_adapters() -> dict[str, Any]:
    masks = [torch.ones(1, 2, 4, 4), torch.ones(1, 1, 4, 4)]
    masks[0][:, :, :2] = 0
    images = [randn(2, 2, 4, 32), randn(2, 1, 4, 32)]
    return {"encoder_hidden_states": (randn(2, 7, 32), images), "ip_adapter_masks": masks}


def _seen() -> torch.Tensor:
    seen = torch.ones(2, 6, dtype=torch.long)
    seen[1, 4:] = 0
    return seen


_PROCESSORS = "attention_processor"

CASES: dict[str, Case] = {
    "unet_1d": Case("unet_1d_blocks.SelfAttention1d", _unet_1d, lambda: ((randn(2, 32, 9),), {})),
    "perceiver": Case(
        "consisid.PerceiverAttention", _perceiver, lambda: ((randn(2, 7, 32), randn(2, 5, 32)), {})
    ),
    "perceiver_cross": Case(
        "consisid.PerceiverCrossAttention",
        _perceiver_cross,
        lambda: ((randn(2, 7, 24), randn(2, 5, 32)), {}),
    ),
    "projection": Case(
        "embeddings.IPAdapterTimeImageProjectionBlock",
        _projection,
        lambda: ((randn(2, 7, 32), randn(2, 5, 32), randn(2, 32)), {}),
        others=2,
    ),
    "pooling": Case("embeddings.AttentionPooling", _pooling, lambda: ((randn(2, 6, 32),), {})),
    "ltx2_audio": Case(
        "autoencoder_kl_ltx2_audio.LTX2AudioAttnBlock",
        _ltx2_audio,
        lambda: ((randn(2, 32, 3, 4),), {}),
    ),
    "self": Case(f"{_PROCESSORS}.AttnProcessor", attention, lambda: ((randn(2, 9, 32),), {})),
    "unscaled": Case(
        f"{_PROCESSORS}.AttnProcessor",
        lambda: attention(scale_qk=False, bias=False),
        lambda: ((randn(2, 9, 32),), _masked()),
    ),
    "masked": Case(
        f"{_PROCESSORS}.AttnProcessor",
        lambda: attention(cross_attention_dim=32),
        lambda: ((randn(2, 9, 32),), _masked()),
    ),
    "upcast": Case(
        f"{_PROCESSORS}.AttnProcessor",
        lambda: attention(upcast_attention=True, upcast_softmax=True),
        lambda: ((randn(2, 9, 32),), {}),
    ),
    "image": Case(
        f"{_PROCESSORS}.AttnProcessor",
        lambda: attention(residual_connection=True, norm_num_groups=4),
        lambda: ((randn(2, 32, 3, 4),), {}),
    ),
    "added": Case(
        f"{_PROCESSORS}.AttnAddedKVProcessor",
        lambda: attention("AttnAddedKVProcessor", **_added()),
        lambda: ((randn(2, 32, 3, 4),), _image()),
    ),
    "added_only": Case(
        f"{_PROCESSORS}.AttnAddedKVProcessor",
        lambda: attention("AttnAddedKVProcessor", **_added(), only_cross_attention=True),
        lambda: ((randn(2, 32, 3, 4),), _image()),
    ),
    "sliced": Case(
        f"{_PROCESSORS}.SlicedAttnProcessor",
        lambda: attention("SlicedAttnProcessor", 3),
        lambda: ((randn(2, 9, 32),), _masked()),
        attentions=3,  # of eight heads
    ),
    "sliced_added": Case(
        f"{_PROCESSORS}.SlicedAttnAddedKVProcessor",
        lambda: attention("SlicedAttnAddedKVProcessor", 4, **_added()),
        lambda: ((randn(2, 32, 3, 4),), _image()),
        attentions=2,
    ),
    "custom_diffusion": Case(
        f"{_PROCESSORS}.CustomDiffusionAttnProcessor",
        lambda: attention("CustomDiffusionAttnProcessor", True, True, 32, 32),
        lambda: ((randn(2, 9, 32),), {"encoder_hidden_states": randn(2, 7, 32)}),
    ),
    "ip_adapter": Case(
        f"{_PROCESSORS}.IPAdapterAttnProcessor",
        lambda: attention("IPAdapterAttnProcessor", 32, 32, (4, 4), [0.5, 1.0]),
        lambda: ((randn(2, 16, 32),), _adapters()),
        attentions=3,
    ),
    "ip_adapter_masks": Case(
        f"{_PROCESSORS}.IPAdapterAttnProcessor",
        lambda: attention("IPAdapterAttnProcessor", 32, 32, (4, 4), [0.5, 1.0]),
        lambda: ((randn(2, 16, 32),), _masked_adapters()),
        attentions=4,
    ),
    "siglip": Case(
        "siglip.SiglipMultiheadAttentionPoolingHead",
        _siglip(""),
        lambda: ((randn(2, 6, 32),), {}),
    ),
    "siglip2": Case(
        "siglip2.Siglip2MultiheadAttentionPoolingHead",
        _siglip("2"),
        lambda: ((randn(2, 6, 32),), {"attention_mask": _seen()}),
    ),
    "siglip2_unmasked": Case(
        "siglip2.Siglip2MultiheadAttentionPoolingHead",
        _siglip("2"),
        lambda: ((randn(2, 6, 32),), {}),
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The module of a case, its weights large enough that the softmax is not flat."""
    torch.manual_seed(0)
    module = CASES[name].build()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module.to(dtype).eval()
