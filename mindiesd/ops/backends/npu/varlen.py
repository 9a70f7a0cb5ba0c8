"""Packed sequences by ``npu_fusion_attention`` in the layout TND.

Limits besides those of :mod:`.fusion`: the ends of the sequences are numbers on the host, at most
1024 of them (the narrower of two sentences), T at most 1M. A sequence that is empty on one side
only, and a window that leaves a row without a key, are documented differently in different places,
so such calls go a sequence at a time.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mindiesd.ops.backends.npu import forms, fusion, soc
from mindiesd.ops.backends.npu.call import Call, frozen
from mindiesd.ops.backends.npu.derived import derived
from mindiesd.ops.masks import Band

_MOST_SEQUENCES, _MOST_TOKENS = 1024, 1 << 20


def host_list(starts: Tensor) -> list[int]:
    """The numbers in a tensor; read from the device once while the tensor is not written to."""
    values: tuple[int, ...] = derived(
        frozen(starts), starts, "host", lambda: tuple(starts.tolist())
    )
    return list(values)


def refusal(
    call: Call, lengths: list[tuple[int, int]], tokens: int, left: int, right: int
) -> str | None:
    """Why one packed call does not do; None if it does.

    Args:
        call: of all tokens as one sequence.
        lengths: of the sequences, query and key.
        tokens: the larger number of packed tokens.
        left: keys before the diagonal, -1 for all.
        right: keys after the diagonal, -1 for all.
    """
    reason = fusion.refusal(call)
    if reason is not None:
        return reason
    if tokens > _MOST_TOKENS or len(lengths) > _MOST_SEQUENCES:
        return "more than 1024 sequences or 1M tokens"
    if not lengths or any(0 in pair for pair in lengths):
        return "a sequence that is empty on one side"
    if left >= 0 or right >= 0:
        for queries, keys in lengths:
            band = Band.window(left, right, queries, keys)
            if call._replace(queries=queries, keys=keys, band=band).empties_rows():
                return "a row without a key"
    return None


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: list[int],
    starts_k: list[int],
    scale: float | None,
    left: int,
    right: int,
) -> Tensor | None:
    """Attention over packed sequences in one kernel; None where it has to go one by one.

    Args:
        q: [Tq, N, D].
        k: [Tk, Nkv, D].
        v: [Tk, Nkv, Dv].
        starts_q: where each query sequence begins, and Tq.
        starts_k: the same for keys.
        scale: factor on the scores; None is D ** -0.5.
        left: keys before the bottom-right diagonal that are seen, -1 for all.
        right: the same after it.
    """
    if frozen(q) or soc.series() not in (soc.A2, soc.A3, soc.A950):
        return None
    if 0 in v.shape or q.shape[-1] == 0:
        return None
    # Sequences that are empty on both sides contribute nothing.
    ends = [
        (end_q, end_k, end_q - begin_q, end_k - begin_k)
        for (begin_q, end_q), (begin_k, end_k) in zip(
            pairwise(starts_q), pairwise(starts_k), strict=True
        )
        if end_q > begin_q or end_k > begin_k
    ]
    lengths = [(queries, keys) for _, _, queries, keys in ends]
    dim, value_dim = q.shape[-1], v.shape[-1]
    call = Call(
        soc.series(),
        q.device.index,
        q.dtype,
        len(lengths),
        q.shape[1],
        k.shape[1],
        max((queries for queries, _ in lengths), default=0),
        max((keys for _, keys in lengths), default=0),
        dim,
        value_dim,
        scale if scale is not None else dim**-0.5,
        False,
        "TND",
        True,
        "",
        "",
        None,
        False,
        None,
        False,
    )
    if refusal(call, lengths, max(q.shape[0], k.shape[0]), left, right) is not None:
        return None
    options: dict[str, Any] = {}
    if left >= 0 or right >= 0:
        options["atten_mask"] = forms.compressed(q.device, False)
        if left < 0 and right == 0:
            options["sparse_mode"] = forms.RIGHT_DOWN_CAUSAL
        else:
            options["sparse_mode"] = forms.BAND
            options["pre_tockens"] = forms.INT_MAX if left < 0 else left
            options["next_tockens"] = forms.INT_MAX if right < 0 else right
    width = max(dim, value_dim)
    if q.dtype is torch.float32:
        width += -width % 4
    extra = (0, width - dim)
    if width != dim:
        q, k = torch.nn.functional.pad(q, extra), torch.nn.functional.pad(k, extra)
    padded = q.dtype is torch.float32 and value_dim % 4
    if padded:
        v = torch.nn.functional.pad(v, (0, -value_dim % 4))
    out: Tensor = torch.ops.npu.npu_fusion_attention(
        q,
        k,
        v,
        call.heads,
        "TND",
        scale=call.scale,
        actual_seq_qlen=[end for end, _, _, _ in ends],
        actual_seq_kvlen=[end for _, end, _, _ in ends],
        **options,
    )[0]
    return out[..., :value_dim].contiguous() if padded else out
