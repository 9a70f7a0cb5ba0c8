"""The patch records of the doors. Reading them imports no torch."""

from __future__ import annotations

from mindiesd.patches.registry import NOT_COMPARED, Patch

_HERE = "mindiesd.patches.front_doors"
_INTERFACE = "flash_attn.flash_attn_interface"
_WHEN_INSTALLED = (
    "where the package is installed, calls with tensors that are not on a CUDA device, which it "
    "cannot compute; on CUDA its own kernels stay. Where it is not, the functions are provided to "
    "the user's own code, and installed libraries still find no package"
)
_EXACT = "exact: one rounding, where the original rounds the same or more"

RECORDS = (
    Patch(
        name="flash_attn",
        family="flash_attn",
        module=_INTERFACE,
        attribute="flash_attn_func",
        also=(
            (_INTERFACE, "flash_attn_varlen_func"),
            (_INTERFACE, "flash_attn_qkvpacked_func"),
            (_INTERFACE, "flash_attn_kvpacked_func"),
            (_INTERFACE, "flash_attn_varlen_qkvpacked_func"),
            (_INTERFACE, "flash_attn_varlen_kvpacked_func"),
            (_INTERFACE, "flash_attn_with_kvcache"),
        ),
        provides=("flash_attn",),
        contents=f"{_HERE}.modules:flash_attn",
        after="flash_attn",
        becomes="mindiesd.attention_forward",
        build=f"{_HERE}.flash_attn:redirect",
        reference=NOT_COMPARED,
        why="scripts that import flash_attn run, on the fused Ascend kernel, without CUDA",
        when=_WHEN_INSTALLED,
        numerics=_EXACT,
        requires={"torch": ">=2.5", "flash_attn": ">=2.7"},
    ),
    Patch(
        name="flash_attn_3",
        family="flash_attn",
        module="flash_attn_interface",
        attribute="flash_attn_func",
        also=(
            ("flash_attn_interface", "flash_attn_varlen_func"),
            ("flash_attn_interface", "flash_attn_qkvpacked_func"),
        ),
        provides=("flash_attn_interface",),
        contents=f"{_HERE}.modules:flash_attn_3",
        # Its releases return different things under one name, and scripts that find it stop using
        # flash_attn, so nobody gets it unasked.
        by_name_only=True,
        after="flash_attn_interface",
        becomes="mindiesd.attention_forward",
        build=f"{_HERE}.flash_attn_3:redirect",
        reference=NOT_COMPARED,
        why="scripts that import FlashAttention 3 run, on the fused Ascend kernel, without CUDA",
        when=f"only when named in `only=`; then as for `flash_attn`: {_WHEN_INSTALLED}",
        numerics=_EXACT,
        requires={"torch": ">=2.5", "flash_attn_3": ">=3.0.0b1"},
    ),
    Patch(
        name="xformers",
        family="xformers",
        module="xformers.ops.fmha",
        attribute="memory_efficient_attention",
        provides=("xformers",),
        contents=f"{_HERE}.modules:xformers",
        after="xformers.ops",
        becomes="mindiesd.attention_forward",
        build=f"{_HERE}.xformers:redirect",
        reference=NOT_COMPARED,
        why="scripts that call memory_efficient_attention run, on the fused Ascend kernel",
        when=_WHEN_INSTALLED,
        numerics=_EXACT,
        requires={"torch": ">=2.5", "xformers": ">=0.0.27"},
    ),
    Patch(
        name="sageattention",
        family="sageattention",
        module="sageattention",
        attribute="sageattn",
        also=(("sageattention", "sageattn_varlen"),),
        provides=("sageattention",),
        contents=f"{_HERE}.modules:sageattention",
        after="sageattention",
        becomes="mindiesd.attention_forward",
        build=f"{_HERE}.sageattention:redirect",
        reference=NOT_COMPARED,
        why="scripts that call sageattn run, on the fused Ascend kernel",
        when=_WHEN_INSTALLED,
        numerics="exact, where the original quantises to 8 bits",
        requires={"torch": ">=2.5", "sageattention": ">=1.0.6,<2"},
    ),
)
