"""Attention that is chosen by a name, a processor or a setter instead of a call of SDPA.

diffusers and transformers let a script name what computes its attention: ``"flash"``, ``"sage"``,
``"xformers"``, ``"_native_npu"``. A name whose package or device is missing leads here to PyTorch's
``scaled_dot_product_attention``, and with it to the ``sdpa`` patch; so do the branches that both
libraries have for Ascend NPUs, which read masks the wrong way round or drop arguments.

Left alone, with reasons, in docs/attention.md: ``flex`` and its block masks, eager attention with a
softcap (Gemma 2), attention slicing outside an NPU.
"""

from __future__ import annotations

from mindiesd.patches.attention_backend import dispatch, encoders, processors

RECORDS = (*dispatch.RECORDS, *processors.RECORDS, *encoders.RECORDS)
