"""The functions of flash_attn 2 on any device, with its signatures and meaning.

Source: ``flash_attn.flash_attn_interface`` 2.8.3 (Dao-AILab). Tensors are [B, S, N, D], packed ones
[T, N, D]; ``causal`` and ``window_size`` are aligned at the bottom right; query heads may share key
heads. Two differences, both towards more: float32 and float64 and any head dimension are computed
too; and a row without a key has the log-sum-exp -inf, which it is, where the CUDA kernels of
version 2 write +inf in some of their variants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.attention import check_dimensions, refusal
from mindiesd.patches.front_doors import attention, kvcache, redirecting
from mindiesd.patches.front_doors.attention import rules_of
from mindiesd.patches.front_doors.composed import Result, Rules
from mindiesd.patches.scope import Site

VERSION = "2.8.3"

_site = Site("flash_attn")
_site.arm()


def count_at(site: Site) -> None:
    """Count the calls at this site from now on."""
    global _site
    site.arm()
    _site = site


def redirect(original: Callable[..., Any], site: Site) -> Callable[..., Any]:
    """The replacement of one of flash_attn's own functions."""
    count_at(site)
    return redirecting.off_cuda(original, globals()[original.__name__], site)


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    dropout_p: Any = 0.0,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    deterministic: Any = False,
    return_attn_probs: Any = False,
) -> Any:
    """Attention of q [B, Sq, N, D] to k, v [B, Sk, Nkv, D].

    Returns:
        [B, Sq, N, D]; with ``return_attn_probs`` also the log-sum-exp [B, N, Sq], float32, and what
        dropout did: [B, N, Sq, Sk], negative where it dropped, or an empty tensor without dropout.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    rules = rules_of(
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs
    )
    return _results(_dense(q, k, v, rules, ("q", "k", "v")), q, rules)


def flash_attn_kvpacked_func(
    q: Any,
    kv: Any,
    dropout_p: Any = 0.0,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    deterministic: Any = False,
    return_attn_probs: Any = False,
) -> Any:
    """:func:`flash_attn_func` with keys and values in one tensor [B, Sk, 2, Nkv, D]."""
    rules = rules_of(
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs
    )
    k, v = _unpacked("kv", kv, 5, 2)
    return _results(_dense(q, k, v, rules, ("q", "kv", "kv")), q, rules)


def flash_attn_qkvpacked_func(
    qkv: Any,
    dropout_p: Any = 0.0,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    deterministic: Any = False,
    return_attn_probs: Any = False,
) -> Any:
    """:func:`flash_attn_func` with all three in one tensor [B, S, 3, N, D]."""
    rules = rules_of(
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs
    )
    q, k, v = _unpacked("qkv", qkv, 5, 3)
    return _results(_dense(q, k, v, rules, ("qkv", "qkv", "qkv")), q, rules)


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: Any = 0.0,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    deterministic: Any = False,
    return_attn_probs: Any = False,
    block_table: Any = None,
) -> Any:
    """Attention of packed q [Tq, N, D] to packed k, v [Tk, Nkv, D], sequence by sequence.

    With ``block_table`` [B, blocks] the keys and values are pages [pages, page, Nkv, D].

    Returns:
        [Tq, N, D]; with ``return_attn_probs`` also the log-sum-exp [N, Tq], float32, and what
        dropout did: [B, N, longest Sq, longest Sk], or an empty tensor without dropout.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    rules = rules_of(
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs
    )
    if block_table is not None:
        k, v = kvcache.from_pages(k, v, block_table, cu_seqlens_k)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _results(attention.packed(_site, q, k, v, *lengths, rules), q, rules)


def flash_attn_varlen_kvpacked_func(
    q: Any,
    kv: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: Any = 0.0,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    deterministic: Any = False,
    return_attn_probs: Any = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with keys and values in one tensor [Tk, 2, Nkv, D]."""
    rules = rules_of(
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs
    )
    k, v = _unpacked("kv", kv, 4, 2)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _results(attention.packed(_site, q, k, v, *lengths, rules), q, rules)


def flash_attn_varlen_qkvpacked_func(
    qkv: Any,
    cu_seqlens: Any,
    max_seqlen: Any,
    dropout_p: Any = 0.0,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    alibi_slopes: Any = None,
    deterministic: Any = False,
    return_attn_probs: Any = False,
) -> Any:
    """:func:`flash_attn_varlen_func` with all three in one tensor [T, 3, N, D]."""
    rules = rules_of(
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p, return_attn_probs
    )
    q, k, v = _unpacked("qkv", qkv, 4, 3)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _results(attention.packed(_site, q, k, v, *lengths, rules), q, rules)


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    softcap: Any = 0.0,
    rotary_interleaved: Any = True,
    alibi_slopes: Any = None,
    num_splits: Any = 0,
    return_softmax_lse: Any = False,
) -> Any:
    """Attention of q [B, Sq, N, D] to a cache, after new keys and values were written into it.

    Args:
        q: the queries.
        k_cache: [Bc, Sc, Nkv, D], or pages [pages, page, Nkv, D] with ``block_table``.
        v_cache: likewise.
        k: [B, Snew, Nkv, D], written in place behind each sequence; or None.
        v: likewise.
        rotary_cos: [S, R / 2] with R <= D: new keys are rotated by their position, queries by the
            position of the first new key, counting on if ``causal`` or a window is given.
        rotary_sin: likewise.
        cache_seqlens: how much of the cache each sequence occupies: an int or [B] integers; None:
            all of it.
        cache_batch_idx: [B], the row of the cache of each sequence; None: its own.
        cache_leftpad: [B], where each sequence begins in its row; None: at 0.
        block_table: [B, blocks], the pages of each sequence.
        softmax_scale: factor on the scores; None is ``D ** -0.5``.
        causal: aligned at the bottom right.
        window_size: (left, right), likewise.
        softcap: c > 0 caps the scores.
        rotary_interleaved: neighbouring pairs instead of halves.
        alibi_slopes: [N] or [B, N].
        num_splits: any; a matter of CUDA scheduling.
        return_softmax_lse: whether the log-sum-exp is returned too.

    Returns:
        [B, Sq, N, D]; with ``return_softmax_lse`` also the log-sum-exp [B, N, Sq], float32.

    Raises:
        ParametersInvalid: an argument is wrong, or a gradient is asked for.
    """
    rules = rules_of(
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        lse=return_softmax_lse,
        lse_name="return_softmax_lse",
    )
    cache = kvcache.Cache(
        k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table
    )
    rotary = kvcache.Rotary(rotary_cos, rotary_sin, rotary_interleaved)
    result = kvcache.attend(_site, q, k, v, cache, rotary, rules)
    return (result.out, result.lse) if rules.lse else result.out


def _dense(q: Any, k: Any, v: Any, rules: Rules, names: tuple[str, str, str]) -> Result:
    """Attention over sequences of one length, with its checks."""
    check_dense(q, k, v, names)
    attention.check_slopes(rules.slopes, q.shape[0], q.shape[2], names[0], q)
    return attention.dense(_site, q, k, v, rules)


def check_dense(
    q: Any, k: Any, v: Any, names: tuple[str, str, str], head_first: bool = False
) -> None:
    """The three tensors [B, S, N, D] (or [B, N, S, D]) of one call fit together.

    Raises:
        ParametersInvalid: they do not.
    """
    if (
        isinstance(q, Tensor)
        and isinstance(k, Tensor)
        and isinstance(v, Tensor)
        and refusal(q, k, v, None, False, True, head_first) is None
    ):
        return
    # Slower, and exact about what is wrong; it may also find that nothing is.
    checks.tensor(names[0], q, 4)
    for name, other in zip(names[1:], (k, v), strict=True):
        checks.tensor(name, other, 4)
        checks.same_kind(name, other, names[0], q)
        if other.shape[0] != q.shape[0]:
            raise ParametersInvalid(
                name, checks.describe(other), f"the batch size of {names[0]}, {q.shape[0]}"
            )
    sequence, head = (2, 1) if head_first else (1, 2)
    check_dimensions(q, k, v, names, sequence, head)


def _unpacked(name: str, packed: Any, rank: int, parts: int) -> tuple[Tensor, ...]:
    """The tensors in a packed one, as views."""
    checks.tensor(name, packed, rank)
    if packed.shape[rank - 3] != parts:
        raise ParametersInvalid(name, checks.describe(packed), f"{parts} in dimension {rank - 3}")
    return tuple(packed.unbind(rank - 3))


def _results(result: Result, q: Tensor, rules: Rules) -> Any:
    """What upstream returns."""
    if not rules.lse:
        return result.out
    weights = q.new_empty(0) if result.weights is None else result.weights
    return result.out, result.lse, weights
