"""Attention over sequences of different lengths, packed one after another.

    out_b = softmax(cap(scale * Q_b K_bᵀ) + alibi, over the kept keys) V_b   for each sequence b

with ``cap(s) = c * tanh(s / c)``, ``alibi_ij = -slope * |i + Sk - Sq - j|`` and every causal flag
and window aligned at the bottom right. Source: ``flash_attn.flash_attn_varlen_func`` (Dao-AILab,
flash-attention 2.x), whose neutral arguments are accepted. ALiBi: arXiv 2108.12409.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.attention import attend, check_dimensions
from mindiesd.ops.backends import backend_of
from mindiesd.ops.masks import BOTTOM_RIGHT_CAUSAL, Band, attention_mask

Lengths = Tensor | Sequence[int] | Sequence[Tensor]


def attention_forward_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool | None = None,
    return_attn_probs: bool | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attention forward over packed sequences of different lengths.

    Rows in which no key may be attended yield zeros; sequences may be empty on either side.

    Args:
        q: [Tq, N, D]; float16, bfloat16, float32 or float64.
        k: [Tk, Nkv, D], N a multiple of Nkv; same dtype and device.
        v: [Tk, Nkv, Dv], likewise.
        cu_seqlens_q: where each query sequence begins, and Tq: [B + 1] integers from 0, as an int32
            or int64 tensor, a list of ints, or a list of 0-d tensors.
        cu_seqlens_k: the same for keys, ending with Tk.
        max_seqlen_q: None, or an upper bound of the query lengths; changes nothing.
        max_seqlen_k: None, or an upper bound of the key lengths; changes nothing.
        dropout_p: only 0.0.
        softmax_scale: factor on the scores; None is ``D ** -0.5``.
        causal: query i of a sequence sees its keys j <= i + Sk - Sq.
        window_size: (left, right): query i sees its keys from i + Sk - Sq - left to
            i + Sk - Sq + right; -1 is unlimited, None is (-1, -1).
        softcap: c > 0 caps each scaled score s to c * tanh(s / c); None and 0.0 are off.
        alibi_slopes: [N] or [B, N], biases each score by -slope * |i + Sk - Sq - j|.
        deterministic: any; the forward always is.
        return_attn_probs: only None or False.
        block_table: only None.

    Returns:
        [Tq, N, Dv], dtype of q.

    Raises:
        ParametersInvalid: an argument is wrong, not supported, or a gradient is needed.
    """
    checks.tensor("q", q, 3)
    for name, other in (("k", k), ("v", v)):
        checks.tensor(name, other, 3)
        checks.same_kind(name, other, "q", q)
    check_dimensions(q, k, v, ("q", "k", "v"), sequence=0, head=1)
    checks.forward_only(q=q, k=k, v=v, alibi_slopes=alibi_slopes)
    scale = checks.optional_real("softmax_scale", softmax_scale)
    if checks.real("dropout_p", dropout_p) != 0.0:
        raise ParametersInvalid("dropout_p", dropout_p, "0.0: this is forward-only")
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if bound is not None:
            checks.integer(name, bound, 0)
    left, right = (-1, -1) if window_size is None else checks.window("window_size", window_size)
    if checks.boolean("causal", causal):
        # The causal flag is a window too, and both apply: nothing is seen after the diagonal.
        right = BOTTOM_RIGHT_CAUSAL[1]
    cap = 0.0 if softcap is None else float(checks.real("softcap", softcap, low=0.0))
    if deterministic is not None:
        checks.boolean("deterministic", deterministic)
    if return_attn_probs is not None and checks.boolean("return_attn_probs", return_attn_probs):
        raise ParametersInvalid("return_attn_probs", True, "None or False: only the output is made")
    if block_table is not None:
        shown = checks.describe(block_table)
        raise ParametersInvalid("block_table", shown, "None: paged keys are not supported")
    if alibi_slopes is not None:
        checks.tensor("alibi_slopes", alibi_slopes, (1, 2))
        checks.same_device("alibi_slopes", alibi_slopes, "q", q)

    starts_q = starts_of("cu_seqlens_q", cu_seqlens_q)
    starts_k = starts_of("cu_seqlens_k", cu_seqlens_k)
    bounds = (max_seqlen_q, max_seqlen_k)
    if isinstance(starts_q, list) and isinstance(starts_k, list):
        return _packed(q, k, v, starts_q, starts_k, *bounds, scale, left, right, cap, alibi_slopes)
    # Reading lengths out of a tensor is a data-dependent step no tracer can look into; the custom
    # operator hides it.
    tensors = [
        torch.tensor(starts, dtype=torch.int64) if isinstance(starts, list) else starts
        for starts in (starts_q, starts_k)
    ]
    out: Tensor = torch.ops.mindiesd.attention_varlen(
        q, k, v, *tensors, *bounds, scale, left, right, cap, alibi_slopes
    )
    return out


def starts_of(name: str, given: object) -> list[int] | Tensor:
    """The cumulative lengths as ints, or still as a tensor where its values cannot be read."""
    allowed = "an int32 or int64 tensor [B + 1], a list of ints, or a list of 0-d integer tensors"
    if isinstance(given, tuple | list):
        if given and all(isinstance(item, Tensor) and item.dim() == 0 for item in given):
            if any(item.dtype not in (torch.int32, torch.int64) for item in given):
                raise ParametersInvalid(name, checks.describe(given), allowed)
            given = torch.stack(tuple(given))
        elif given and not any(isinstance(item, Tensor) for item in given):
            return [checks.integer(f"{name}[{at}]", item, 0) for at, item in enumerate(given)]
    if (
        not isinstance(given, Tensor)
        or given.dim() != 1
        or given.dtype not in (torch.int32, torch.int64)
        or given.shape[0] == 0
    ):
        raise ParametersInvalid(name, checks.describe(given), allowed)
    # A plain tensor outside of any trace has values; fake, functional and meta tensors have none.
    if torch.compiler.is_compiling() or type(given) is not Tensor or given.is_meta:
        return given
    return numbers(given)


def numbers(starts: Tensor) -> list[int]:
    """The values of a tensor; fetched from a device once, while the tensor is not written to."""
    if not starts.is_cpu:
        fetch = getattr(backend_of(starts), "host_list", None)
        if fetch is not None:
            fetched: list[int] = fetch(starts)
            return fetched
        return _remembered(starts)
    values: list[int] = starts.tolist()
    return values


def _remembered(starts: Tensor) -> list[int]:
    from mindiesd.ops.backends.npu.derived import TABLE

    return list(TABLE.get(starts, "host", lambda: tuple(starts.tolist())))


def lengths_of(name: str, starts: list[int], total: int, bound: int | None) -> list[int]:
    """The sequence lengths that valid cumulative lengths describe."""
    if starts[0] != 0:
        raise ParametersInvalid(name, f"a first entry of {starts[0]}", "0 as the first entry")
    if starts[-1] != total:
        allowed = f"the number of packed tokens, {total}, as the last entry"
        raise ParametersInvalid(name, f"a last entry of {starts[-1]}", allowed)
    lengths = [end - begin for begin, end in pairwise(starts)]
    longest = max(lengths, default=0)
    if min(lengths, default=0) < 0:
        raise ParametersInvalid(name, checks.describe(starts), "entries that do not decrease")
    if bound is not None and bound < longest:
        hint = name.replace("cu_seqlens", "max_seqlen")
        raise ParametersInvalid(hint, bound, f"at least the longest sequence, {longest}")
    return lengths


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: list[int],
    starts_k: list[int],
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    left: int,
    right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Attention with the lengths at hand: one call if they are equal, else one a sequence."""
    lengths_q = lengths_of("cu_seqlens_q", starts_q, q.shape[0], max_seqlen_q)
    lengths_k = lengths_of("cu_seqlens_k", starts_k, k.shape[0], max_seqlen_k)
    batch, heads = len(lengths_q), q.shape[1]
    if len(lengths_k) != batch:
        raise ParametersInvalid(
            "cu_seqlens_k", f"{len(starts_k)} entries", f"{batch + 1}, as in cu_seqlens_q"
        )
    slopes = None
    if alibi_slopes is not None:
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            raise ParametersInvalid(
                "alibi_slopes",
                checks.describe(alibi_slopes),
                f"shape [N] = [{heads}] or [B, N] = [{batch}, {heads}]",
            )
        slopes = alibi_slopes.expand(batch, heads)

    if q.shape[0] == 0:
        return q.new_empty(0, heads, v.shape[-1])
    if all(n == lengths_q[0] for n in lengths_q) and all(n == lengths_k[0] for n in lengths_k):
        packed = (
            q.reshape(batch, lengths_q[0], *q.shape[1:]),
            k.reshape(batch, lengths_k[0], *k.shape[1:]),
            v.reshape(batch, lengths_k[0], *v.shape[1:]),
        )
        out = _batched(*packed, scale, left, right, softcap, slopes)
        return out.reshape(q.shape[0], heads, v.shape[-1]).contiguous()

    if softcap == 0.0 and slopes is None and not q.is_cpu:
        kernel = getattr(backend_of(q), "attention_varlen", None)
        if kernel is not None:
            whole: Tensor | None = kernel(q, k, v, starts_q, starts_k, scale, left, right)
            if whole is not None:
                return whole

    parts = []
    for at in range(batch):
        if lengths_q[at] == 0:
            continue
        rows = slice(starts_q[at], starts_q[at + 1])
        columns = slice(starts_k[at], starts_k[at + 1])
        own_slopes = None if slopes is None else slopes[at : at + 1]
        one = (q[rows].unsqueeze(0), k[columns].unsqueeze(0), v[columns].unsqueeze(0))
        parts.append(_batched(*one, scale, left, right, softcap, own_slopes).squeeze(0))
    return torch.cat(parts).contiguous()


def _batched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    left: int,
    right: int,
    softcap: float,
    slopes: Tensor | None,
) -> Tensor:
    """Attention over sequences of one length: q [B, Sq, N, D], k and v [B, Sk, Nkv, …]."""
    queries, keys = q.shape[1], k.shape[1]
    band = None if left < 0 and right < 0 else Band.window(left, right, queries, keys)
    bias = None if slopes is None else alibi(slopes, queries, keys, q.dtype)
    if softcap == 0.0:
        return attend(q, k, v, bias, scale, band=band, head_first=False)
    mask = attention_mask(bias, band=band)
    return backend_of(q).attention_composed(q, k, v, mask, scale, False, softcap)


def alibi(slopes: Tensor, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
    """The bias [B, N, Sq, Sk] of slopes [B, N], in float32 or better."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    rows = torch.arange(queries, device=slopes.device, dtype=wide)[:, None]
    distance = torch.arange(keys, device=slopes.device, dtype=wide) - (rows + (keys - queries))
    return -slopes.to(wide)[:, :, None, None] * distance.abs()


# Written out, because what torch infers from annotations varies with its version.
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor starts_q, Tensor starts_k, SymInt? max_seqlen_q, "
    "SymInt? max_seqlen_k, float? scale, SymInt left, SymInt right, float softcap, "
    "Tensor? alibi_slopes) -> Tensor"
)


@torch.library.custom_op("mindiesd::attention_varlen", mutates_args=(), schema=_SCHEMA)
def _opaque(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    scale: float | None,
    left: int,
    right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """The same as one operator, for graphs in which the lengths are a tensor."""
    lengths = (numbers(starts_q), numbers(starts_k), max_seqlen_q, max_seqlen_k)
    return _packed(q, k, v, *lengths, scale, left, right, softcap, alibi_slopes)


@_opaque.register_fake
def _shape_only(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """What tracing needs to know of the operator."""
    return q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
