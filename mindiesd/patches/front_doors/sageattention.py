"""The functions of sageattention on any device.

The original rounds queries and keys to 8 bits; the exact result is within its contract. Source:
sageattention 1.0.6; arXiv 2410.02367.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.varlen import numbers, starts_of
from mindiesd.patches.front_doors import attention, redirecting
from mindiesd.patches.front_doors.attention import rules_of
from mindiesd.patches.front_doors.flash_attn import check_dense
from mindiesd.patches.scope import Site

# How to quantise, which is not done, and what is returned besides.
_QUANTISING = frozenset({"qk_quant_gran", "pv_accum_dtype", "smooth_v", "quantization_backend"})

_site = Site("sageattention")
_site.arm()


def count_at(site: Site) -> None:
    """Count the calls at this site from now on."""
    global _site
    site.arm()
    _site = site


def redirect(original: Callable[..., Any], site: Site) -> Callable[..., Any]:
    """The replacement of one of sageattention's own functions."""
    count_at(site)
    return redirecting.off_cuda(original, globals()[original.__name__], site)


def sageattn(
    q: Any,
    k: Any,
    v: Any,
    tensor_layout: Any = "HND",
    is_causal: Any = False,
    sm_scale: Any = None,
    smooth_k: Any = True,
    **kwargs: Any,
) -> Any:
    """Attention, exact.

    Args:
        q: [B, N, Sq, D] ("HND") or [B, Sq, N, D] ("NHD").
        k: [B, Nkv, Sk, D], likewise.
        v: [B, Nkv, Sk, D], likewise.
        tensor_layout: ``"HND"`` or ``"NHD"``.
        is_causal: needs as many keys as queries, as upstream does.
        sm_scale: factor on the scores; None is ``D ** -0.5``.
        smooth_k: how to quantise; changes nothing.
        **kwargs: ``return_lse``: whether the log-sum-exp [B, N, Sq] is returned too; and more about
            quantising.

    Returns:
        Shape and dtype of q.

    Raises:
        ParametersInvalid: an argument is wrong or unknown. Upstream drops those it does not know, a
            mask for one.
    """
    wants_lse = _extras(kwargs)
    checks.choice("tensor_layout", tensor_layout, ("HND", "NHD"))
    rules = rules_of(sm_scale, _causal(is_causal), (-1, -1), lse=wants_lse, lse_name="return_lse")
    head_first = tensor_layout == "HND"
    check_dense(q, k, v, ("q", "k", "v"), head_first)
    sequence = 2 if head_first else 1
    if is_causal and q.shape[sequence] != k.shape[sequence]:
        raise _not_square(q.shape[sequence], k.shape[sequence])
    result = attention.dense(_site, q, k, v, rules, head_first=head_first)
    return (result.out, result.lse) if wants_lse else result.out


def sageattn_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    is_causal: Any = False,
    sm_scale: Any = None,
    smooth_k: Any = True,
    **kwargs: Any,
) -> Any:
    """Attention of packed q [Tq, N, D] to packed k, v [Tk, Nkv, D], exact.

    Args:
        q: the queries.
        k: the keys.
        v: the values.
        cu_seqlens_q: where each query sequence begins, and Tq.
        cu_seqlens_k: the same for keys.
        max_seqlen_q: an upper bound of the query lengths.
        max_seqlen_k: an upper bound of the key lengths.
        is_causal: needs as many keys as queries in each sequence, as upstream does.
        sm_scale: factor on the scores; None is ``D ** -0.5``.
        smooth_k: how to quantise; changes nothing.
        **kwargs: as for :func:`sageattn`.

    Returns:
        Shape and dtype of q.

    Raises:
        ParametersInvalid: an argument is wrong or unknown.
    """
    if _extras(kwargs):
        raise ParametersInvalid("return_lse", True, "False: packed sequences have none upstream")
    rules = rules_of(sm_scale, _causal(is_causal), (-1, -1))
    if is_causal and cu_seqlens_q is not cu_seqlens_k:
        every = []
        for name, given in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            starts = starts_of(name, given)
            every.append(starts if isinstance(starts, list) else numbers(starts))
        if every[0] != every[1]:
            raise _not_square("cu_seqlens_q", "cu_seqlens_k")
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attention.packed(_site, q, k, v, *lengths, rules).out


def _causal(is_causal: Any) -> bool:
    return checks.boolean("is_causal", is_causal)


def _not_square(queries: object, keys: object) -> ParametersInvalid:
    received = f"True with {queries} queries and {keys} keys"
    return ParametersInvalid("is_causal", received, "True only for as many keys as queries")


def _extras(given: dict[str, Any]) -> bool:
    """Whether the log-sum-exp is asked for; no unknown keyword is given."""
    for name in given:
        if name != "return_lse" and name not in _QUANTISING:
            allowed = ", ".join(["return_lse", *sorted(_QUANTISING)])
            raise ParametersInvalid(name, "an unknown keyword argument", allowed)
    return checks.boolean("return_lse", given.get("return_lse", False))
