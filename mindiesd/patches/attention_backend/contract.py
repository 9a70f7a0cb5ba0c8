"""What each named attention backend of diffusers promises, and where it can run.

A script that names a backend relies on that package's rules: where its causal diagonal ends, which
masks it takes, how it groups heads. They are data here, so that the same call means the same
without the package. Sources: the interfaces of flash-attention 2, SageAttention and xFormers, and
the backends of ``diffusers.models.attention_dispatch``.
"""

from __future__ import annotations

from typing import NamedTuple

# Where the diagonal of a causal mask lies when there are more keys than queries, or fewer.
TOP_LEFT = "top left"  # query i sees the keys j <= i, as SDPA and xFormers
BOTTOM_RIGHT = "bottom right"  # the last query sees the last key, as flash-attention since 2.1
SQUARE = "square"  # only defined for as many queries as keys, as SageAttention

# Which masks the backend takes.
NO_MASK = "none"
PADDING = "padding"  # bool, reduced to the keys of each sequence
DENSE = "dense"  # two or four dimensions, bool or additive
ANY = "any"

HUB = "hub"
CUDA = "cuda"
NOWHERE = ""


class Contract(NamedTuple):
    """One named backend.

    Attributes:
        needs: where it runs: the name of the flag in ``attention_dispatch`` that says its package
            is usable, :data:`HUB` for a kernel that is downloaded, :data:`CUDA` for one that
            PyTorch has, :data:`NOWHERE` for one that is never called as it is wrong.
        causal: where the causal diagonal lies.
        masks: which masks it takes.
        groups_heads: whether it takes fewer key heads than query heads without being told.
        on_cpu: whether it also runs on the CPU.
    """

    needs: str
    causal: str = TOP_LEFT
    masks: str = ANY
    groups_heads: bool = False
    on_cpu: bool = False


def _flash(needs: str, masks: str = NO_MASK) -> Contract:
    return Contract(needs, BOTTOM_RIGHT, masks, groups_heads=True)


def _sage(needs: str, masks: str = NO_MASK) -> Contract:
    return Contract(needs, SQUARE, masks, groups_heads=True)


_FLASH_2, _FLASH_3, _SAGE = "_CAN_USE_FLASH_ATTN", "_CAN_USE_FLASH_ATTN_3", "_CAN_USE_SAGE_ATTN"

CONTRACTS: dict[str, Contract] = {
    "flash": _flash(_FLASH_2),
    "flash_varlen": _flash(_FLASH_2, PADDING),
    "_flash_3": _flash(_FLASH_3),
    "_flash_varlen_3": _flash(_FLASH_3, PADDING),
    "flash_hub": _flash(HUB),
    "flash_varlen_hub": _flash(HUB, PADDING),
    "_flash_3_hub": _flash(HUB),
    "_flash_3_varlen_hub": _flash(HUB, PADDING),
    "flash_4_hub": _flash(HUB),
    "aiter": _flash("_CAN_USE_AITER_ATTN"),
    "aiter_fa2_hub": _flash(HUB),
    "sage": _sage(_SAGE),
    "sage_varlen": _sage(_SAGE, PADDING),
    "_sage_qk_int8_pv_fp8_cuda": _sage(_SAGE),
    "_sage_qk_int8_pv_fp8_cuda_sm90": _sage(_SAGE),
    "_sage_qk_int8_pv_fp16_cuda": _sage(_SAGE),
    "_sage_qk_int8_pv_fp16_triton": _sage(_SAGE),
    "sage_hub": _sage(HUB),
    "sage_blackwell_hub": _sage(HUB),
    "xformers": Contract("_CAN_USE_XFORMERS_ATTN", masks=DENSE),
    "_native_cudnn": Contract(CUDA),
    "_native_efficient": Contract(CUDA),
    "_native_flash": Contract(CUDA, masks=NO_MASK, on_cpu=True),
    "_native_npu": Contract(NOWHERE, groups_heads=True),
    # What the deprecated FusedFluxAttnProcessor2_0_NPU sets; diffusers has no such backend.
    "_fused_npu": Contract(NOWHERE, groups_heads=True),
}
"""Name of a backend -> its contract. Backends that run on every device are not listed."""
