"""``xformers.ops.memory_efficient_attention`` on any device.

Tensors are [B, S, N, D], [B, S, D] (one head) or [B, S, G, H, D] (G key heads, repeated for H
query heads each). Source: xformers 0.0.35.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.masks import Band, broadcasts
from mindiesd.patches.front_doors import attention, redirecting
from mindiesd.patches.front_doors.attn_bias import EVERY
from mindiesd.patches.front_doors.composed import Result, Rules
from mindiesd.patches.front_doors.flash_attn import check_dense
from mindiesd.patches.scope import Site

VERSION = "0.0.35"

_site = Site("xformers")
_site.arm()


def count_at(site: Site) -> None:
    """Count the calls at this site from now on."""
    global _site
    site.arm()
    _site = site


def redirect(original: Callable[..., Any], site: Site) -> Callable[..., Any]:
    """The replacement of the package's own function."""
    count_at(site)
    return redirecting.off_cuda(original, memory_efficient_attention, site)


def memory_efficient_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: Any = 0.0,
    scale: Any = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> Tensor:
    """Attention with a tensor added to the scores, or a described mask.

    Args:
        query: [B, Sq, N, D], [B, Sq, D] or [B, Sq, G, H, D].
        key: [B, Sk, ...], the same dimensions behind.
        value: [B, Sk, ...], likewise, its last dimension may differ.
        attn_bias: None, a floating tensor that broadcasts to [B, N, Sq, Sk] (to [B, Sq, Sk] or
            [B, G, H, Sq, Sk] for the other forms), or an ``AttentionBias``.
        p: the probability with which a weight is dropped.
        scale: factor on the scores; None is ``D ** -0.5``.
        op: which CUDA kernels to use; changes nothing.
        output_dtype: of the result; None is the query's.

    Returns:
        The dimensions of the query with the last of the value.

    Raises:
        ParametersInvalid: an argument is wrong, or a mask of a kind that is not computed.
    """
    return _attention(query, key, value, attn_bias, p, scale, output_dtype, lse=False).out


def memory_efficient_attention_forward(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: Any = 0.0,
    scale: Any = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> Tensor:
    """:func:`memory_efficient_attention` without a gradient."""
    with torch.no_grad():
        return _attention(query, key, value, attn_bias, p, scale, output_dtype, lse=False).out


def memory_efficient_attention_forward_requires_grad(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    p: Any = 0.0,
    scale: Any = None,
    *,
    op: Any = None,
    output_dtype: Any = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`memory_efficient_attention_forward` and the log-sum-exp [B, N, Sq], float32."""
    if checks.real("p", p) != 0.0:
        raise ParametersInvalid("p", p, "0.0")
    with torch.no_grad():
        found = _attention(query, key, value, attn_bias, p, scale, output_dtype, lse=True)
    return found.out, found.lse


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any,
    p: Any,
    scale: Any,
    output_dtype: Any,
    lse: bool,
) -> Result:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, tensor, (3, 4, 5))
        if tensor.dim() != query.dim() or tensor.shape[2:-1] != query.shape[2:-1]:
            raise ParametersInvalid(
                name, checks.describe(tensor), f"the inner dimensions of query, {[*query.shape]}"
            )
    dtype = query.dtype if output_dtype is None else output_dtype
    if dtype not in checks.FLOATING:
        raise ParametersInvalid("output_dtype", output_dtype, "None or a floating dtype")
    p = checks.real("p", p, 0.0, 1.0)
    shape = (*query.shape[:-1], value.shape[-1])
    q, k, v = (_with_heads(tensor) for tensor in (query, key, value))
    if query.dim() == 5 and _repeats(key) and _repeats(value):
        # The heads of a group share one key head: no need to touch it once for each.
        k, v = key[:, :, :, 0], value[:, :, :, 0]
    if dtype.itemsize > q.dtype.itemsize:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_dense(q, k, v, ("query", "key", "value"))
    if p == 1.0:
        # Every weight is dropped.
        return Result((q.sum() * 0 + q.new_zeros(shape)).to(dtype))
    rules = Rules(checks.optional_real("scale", scale), dropout_p=p, lse=lse)
    if attn_bias is None or isinstance(attn_bias, Tensor):
        mask = None if attn_bias is None else _mask(attn_bias, query, q, k)
        found = attention.dense(_site, q, k, v, rules, mask)
    elif hasattr(attn_bias, "q_seqinfo"):
        found = _blocks(q, k, v, attn_bias, rules)
    else:
        tensor = getattr(attn_bias, "_bias", None)
        mask = None if tensor is None else _mask(tensor, query, q, k)
        band = _band_of(attn_bias)(q.shape[1], k.shape[1])
        found = attention.dense(_site, q, k, v, rules, mask, band)
    return found._replace(out=found.out.reshape(shape).to(dtype))


def _with_heads(tensor: Tensor) -> Tensor:
    """[B, S, N, D] of any of the three forms."""
    if tensor.dim() == 3:
        return tensor.unsqueeze(2)
    return tensor.flatten(2, 3) if tensor.dim() == 5 else tensor


def _repeats(tensor: Tensor) -> bool:
    """Whether the heads of each group [B, S, G, H, D] are one and the same."""
    return tensor.stride(3) == 0 or tensor.shape[3] == 1


def _mask(bias: Tensor, query: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A tensor that is added to the scores [B, N, Sq, Sk]."""
    if not bias.is_floating_point() or bias.layout is not torch.strided or bias.is_nested:
        raise ParametersInvalid(
            "attn_bias", checks.describe(bias), "None, a floating tensor or an AttentionBias"
        )
    checks.same_device("attn_bias", bias, "query", query)
    scores = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    mask = bias
    if query.dim() == 3 and bias.dim() == 3:
        mask = bias.unsqueeze(1)
    elif query.dim() == 5 and bias.dim() == 5:
        groups = query.shape[2:4]
        mask = bias.expand(bias.shape[0], *groups, *bias.shape[3:]).flatten(1, 2)
    if not broadcasts(mask.shape, *scores):
        raise ParametersInvalid(
            "attn_bias",
            checks.describe(bias),
            f"a shape that broadcasts to [B, N, Sq, Sk] = {list(scores)}",
        )
    if mask.dtype not in (torch.float32, torch.float64, q.dtype):
        return mask.float()
    # Never narrower than it is, and never wider than what it is added to.
    return mask.to(torch.float64 if q.dtype is torch.float64 else mask.dtype)


def _band_of(bias: Any) -> Callable[[int, int], Band]:
    """Which diagonals a bias keeps; those of an installed xformers are known by their names.

    Raises:
        ParametersInvalid: the bias is of an unknown kind.
    """
    kind = EVERY.get(type(bias).__name__)
    if kind is None or kind.__name__ == "AttentionBias":
        names = ", ".join(name for name in EVERY if name != "AttentionBias")
        raise ParametersInvalid("attn_bias", type(bias).__name__, f"None, a tensor, {names}")
    return lambda queries, keys: kind.band(bias, queries, keys)


def _blocks(q: Tensor, k: Tensor, v: Tensor, bias: Any, rules: Rules) -> Result:
    """Attention over sequences packed into one row."""
    band_of = _band_of(bias)
    for name, tensor, info in (("query", q, bias.q_seqinfo), ("key", k, bias.k_seqinfo)):
        if tensor.shape[0] != 1 or tensor.shape[1] != info.seqstart_py[-1]:
            raise ParametersInvalid(
                name,
                checks.describe(tensor),
                f"one row of {info.seqstart_py[-1]} tokens, as attn_bias says",
            )
    rows = list(bias.q_seqinfo.intervals())
    columns = list(bias.k_seqinfo.intervals())
    lengths = [
        (last - first, end - begin)
        for (first, last), (begin, end) in zip(rows, columns, strict=True)
    ]
    window = _window(band_of, lengths)
    if window is None:
        parts = [
            attention.dense(
                _site, q[:, first:last], k[:, begin:end], v[:, begin:end], rules, None, band
            )
            for (first, last), (begin, end), band in zip(
                rows, columns, [band_of(*pair) for pair in lengths], strict=True
            )
        ]
        lse = None
        if rules.lse:
            lse = torch.cat([part.lse for part in parts if part.lse is not None], dim=-1)
        return Result(torch.cat([part.out for part in parts], dim=1), lse)
    key, value = k[0], v[0]
    if columns and [begin for begin, _ in columns[1:]] != [end for _, end in columns[:-1]]:
        # There are gaps between the keys of the sequences.
        key = torch.cat([key[begin:end] for begin, end in columns])
        value = torch.cat([value[begin:end] for begin, end in columns])
    else:
        key, value = (t[: columns[-1][1] if columns else 0] for t in (key, value))
    found = attention.packed(
        _site,
        q[0],
        key,
        value,
        [0, *accumulate(queries for queries, _ in lengths)],
        [0, *accumulate(keys for _, keys in lengths)],
        None,
        None,
        rules._replace(left=window[0], right=window[1]),
    )
    lse = None if found.lse is None else found.lse.unsqueeze(0)
    return Result(found.out.unsqueeze(0), lse)


def _window(
    band_of: Callable[[int, int], Band], lengths: list[tuple[int, int]]
) -> tuple[int, int] | None:
    """The one window from the bottom right that says the bands of all sequences, or None."""
    windows = set()
    for queries, keys in lengths:
        lower, upper = band_of(queries, keys)
        corner = keys - queries
        left = -1 if lower is None else corner - lower
        right = -1 if upper is None else upper - corner
        if (lower is not None and left < 0) or (upper is not None and right < 0):
            return None
        windows.add((left, right))
    if len(windows) > 1:
        return None
    return windows.pop() if windows else (-1, -1)
