"""The functions of FlashAttention 3, ``flash_attn_interface``, on any device.

Source: ``hopper/flash_attn_interface.py`` (Dao-AILab), the releases whose functions have
``return_attn_probs``. Older ones always returned a tuple; that is why nobody is given this module
without asking for it by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.patches.front_doors import attention, redirecting
from mindiesd.patches.front_doors.attention import rules_of
from mindiesd.patches.front_doors.composed import Result, Rules
from mindiesd.patches.front_doors.flash_attn import check_dense
from mindiesd.patches.scope import Site

_site = Site("flash_attn_3")
_site.arm()


def count_at(site: Site) -> None:
    """Count the calls at this site from now on."""
    global _site
    site.arm()
    _site = site


def redirect(original: Callable[..., Any], site: Site) -> Callable[..., Any]:
    """The replacement of one of the package's own functions."""
    count_at(site)
    return redirecting.off_cuda(original, globals()[original.__name__], site)


def flash_attn_func(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: Any = None,
    causal: Any = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: Any = (-1, -1),
    attention_chunk: Any = 0,
    softcap: Any = 0.0,
    num_splits: Any = 1,
    pack_gqa: Any = None,
    deterministic: Any = False,
    sm_margin: Any = 0,
    return_attn_probs: Any = False,
) -> Any:
    """Attention of q [B, Sq, N, D] to k [B, Sk, Nkv, D] and v [B, Sk, Nkv, Dv].

    ``num_splits``, ``pack_gqa``, ``sm_margin`` and ``deterministic`` are matters of CUDA scheduling
    and change nothing.

    Returns:
        [B, Sq, N, Dv]; with ``return_attn_probs`` also the log-sum-exp [B, N, Sq], float32.

    Raises:
        ParametersInvalid: an argument is wrong, or one of ``qv``, the descales (8-bit tensors) and
            ``attention_chunk``, which are not computed.
    """
    _only_scores(qv, q_descale, k_descale, v_descale, attention_chunk)
    rules = rules_of(softmax_scale, causal, window_size, softcap, lse=return_attn_probs)
    check_dense(q, k, v, ("q", "k", "v"))
    return _results(attention.dense(_site, q, k, v, rules), rules)


def flash_attn_varlen_func(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    seqused_q: Any = None,
    seqused_k: Any = None,
    softmax_scale: Any = None,
    causal: Any = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: Any = (-1, -1),
    attention_chunk: Any = 0,
    softcap: Any = 0.0,
    num_splits: Any = 1,
    pack_gqa: Any = None,
    deterministic: Any = False,
    sm_margin: Any = 0,
    return_attn_probs: Any = False,
) -> Any:
    """Attention of packed q [Tq, N, D] to packed k [Tk, Nkv, D] and v [Tk, Nkv, Dv].

    Returns:
        [Tq, N, Dv]; with ``return_attn_probs`` also the log-sum-exp [N, Tq], float32.

    Raises:
        ParametersInvalid: as for :func:`flash_attn_func`; or ``seqused_q`` or ``seqused_k`` is
            given.
    """
    _only_scores(qv, q_descale, k_descale, v_descale, attention_chunk)
    for name, argument in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if argument is not None:
            raise ParametersInvalid(name, checks.describe(argument), "None: it is not computed")
    rules = rules_of(softmax_scale, causal, window_size, softcap, lse=return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _results(attention.packed(_site, q, k, v, *lengths, rules), rules)


def flash_attn_qkvpacked_func(
    qkv: Any,
    softmax_scale: Any = None,
    causal: Any = False,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    window_size: Any = (-1, -1),
    attention_chunk: Any = 0,
    softcap: Any = 0.0,
    deterministic: Any = False,
    num_heads_q: Any = None,
    sm_margin: Any = 0,
    return_attn_probs: Any = False,
) -> Any:
    """:func:`flash_attn_func` of [B, S, 3, N, D], or [B, S, N + 2 Nkv, D] with ``num_heads_q``.

    Returns:
        As :func:`flash_attn_func`.

    Raises:
        ParametersInvalid: as :func:`flash_attn_func`.
    """
    _only_scores(None, q_descale, k_descale, v_descale, attention_chunk)
    rules = rules_of(softmax_scale, causal, window_size, softcap, lse=return_attn_probs)
    checks.tensor("qkv", qkv, (4, 5))
    if qkv.dim() == 5:
        if qkv.shape[2] != 3:
            raise ParametersInvalid("qkv", checks.describe(qkv), "3 in dimension 2")
        q, k, v = qkv.unbind(2)
    else:
        if num_heads_q is None:
            raise ParametersInvalid("num_heads_q", None, "the number of query heads in qkv")
        heads = checks.integer("num_heads_q", num_heads_q, 1)
        rest = qkv.shape[2] - heads
        if rest < 2 or rest % 2:
            raise ParametersInvalid(
                "num_heads_q", num_heads_q, f"what leaves pairs of {qkv.shape[2]} heads"
            )
        q, k, v = qkv.split([heads, rest // 2, rest // 2], dim=2)
    check_dense(q, k, v, ("qkv", "qkv", "qkv"))
    return _results(attention.dense(_site, q, k, v, rules), rules)


def _only_scores(
    qv: Any, q_descale: Any, k_descale: Any, v_descale: Any, attention_chunk: Any
) -> None:
    """None of the arguments that are not computed is given."""
    given = {"qv": qv, "q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    for name, argument in given.items():
        if argument is not None:
            raise ParametersInvalid(name, checks.describe(argument), "None: it is not computed")
    if attention_chunk != 0:
        raise ParametersInvalid("attention_chunk", attention_chunk, "0: it is not computed")


def _results(result: Result, rules: Rules) -> Any:
    return (result.out, result.lse) if rules.lse else result.out
