"""The public face of sparse attention: checks every argument.

A strategy keeps a part of the key blocks for each query block and attends to those exactly, with a
softmax over their tokens alone: :mod:`.rainfusion`, :mod:`.adaptive`. With nothing to drop, the
result is that of dense attention, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.attention import attend, check_dimensions
from mindiesd.ops.sparse.kernel import attend_sparsely
from mindiesd.ops.sparse.selection import BLOCK

TYPES = (None, "rf_v2", "ada_bsa")
LAYOUTS = ("BNSD", "BSND")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    head_num: int = 1,
    input_layout: str = "BNSD",
    inner_precise: int = 0,
    sparse_type: str | None = None,
    txt_len: int = 0,
    block_size: int = 128,
    latent_shape_q: Sequence[int] | None = None,
    latent_shape_k: Sequence[int] | None = None,
    keep_sink: bool = True,
    keep_recent: bool = True,
    cdf_threshold: float = 1.0,
    sparsity: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """Attention forward over a chosen part of the key blocks.

    Args:
        q: [B, N, Sq, D], or [B, Sq, N, D] with ``input_layout="BSND"``; floating.
        k: [B, Nkv, Skv, D], likewise; N is a multiple of Nkv; same dtype and device.
        v: [B, Nkv, Skv, Dv], likewise.
        attn_mask: reserved; only None.
        scale: factor on the scores; None is ``D ** -0.5``.
        is_causal: query i sees the keys j <= i. Not with rf_v2, whose blocks have no such order.
        head_num: 1 (unspecified) or N.
        input_layout: ``"BNSD"`` or ``"BSND"``, of the tensors and of the result.
        inner_precise: 0 high precision; 1 lets a kernel that can sum in float16, where the
            tensors are float16. The softmax of every other kernel is float32 either way.
        sparse_type: None, ``"rf_v2"`` (RainFusion) or ``"ada_bsa"`` (adaptive block sparse).
        txt_len: rf_v2: text tokens at the front of both sequences; always attended, and attending
            to everything.
        block_size: only 128.
        latent_shape_q: rf_v2, required: (t, h, w) of the queries after the text.
        latent_shape_k: rf_v2: (t, h, w) of the keys after the text; None is that of the queries.
        keep_sink: ada_bsa: always keep the first key block.
        keep_recent: ada_bsa: always keep the last key block a query block may see.
        cdf_threshold: ada_bsa: share of the estimated attention to keep, in [0, 1].
        sparsity: share of the key blocks to drop, in [0, 1]; 0 is dense attention. Of n blocks,
            each query block keeps ceil(n * (1 - sparsity)), and one at least.
        **kwargs: ``protect_first_frame`` (default False): rf_v2: keep the blocks of the first frame
            on top of that share, as keys and as queries.

    Returns:
        [B, N, Sq, Dv], or [B, Sq, N, Dv]; dtype of q.

    Raises:
        ParametersInvalid: an argument is wrong, or a gradient is needed.
    """
    protect_first_frame = checks.boolean(
        "protect_first_frame", kwargs.pop("protect_first_frame", False)
    )
    if kwargs:
        allowed = "no other than protect_first_frame"
        raise ParametersInvalid(next(iter(kwargs)), "an unknown keyword argument", allowed)
    checks.tensor("q", q, 4)
    for name, other in (("k", k), ("v", v)):
        checks.tensor(name, other, 4)
        checks.same_kind(name, other, "q", q)
        if other.shape[0] != q.shape[0]:
            shown = checks.describe(other)
            raise ParametersInvalid(name, shown, f"the batch size of q, {q.shape[0]}")
    head_first = checks.choice("input_layout", input_layout, LAYOUTS) == "BNSD"
    sequence, head = (2, 1) if head_first else (1, 2)
    check_dimensions(q, k, v, ("q", "k", "v"), sequence, head)
    checks.forward_only(q=q, k=k, v=v)
    if attn_mask is not None:
        raise ParametersInvalid("attn_mask", checks.describe(attn_mask), "None: it is reserved")
    scale = checks.optional_real("scale", scale)
    checks.boolean("is_causal", is_causal)
    if checks.integer("head_num", head_num, 1) not in (1, q.shape[head]):
        allowed = f"1 or the head count of q, {q.shape[head]}"
        raise ParametersInvalid("head_num", head_num, allowed)
    checks.choice("inner_precise", inner_precise, (0, 1))
    checks.choice("sparse_type", sparse_type, TYPES)
    checks.integer("txt_len", txt_len, 0)
    checks.choice("block_size", block_size, (BLOCK,))
    checks.boolean("keep_sink", keep_sink)
    checks.boolean("keep_recent", keep_recent)
    checks.real("cdf_threshold", cdf_threshold, 0.0, 1.0)
    checks.real("sparsity", sparsity, 0.0, 1.0)
    latents = (("latent_shape_q", latent_shape_q, q), ("latent_shape_k", latent_shape_k, k))
    for name, latent, tensor in latents:
        if latent is not None:
            # Only rf_v2 reads it, so only there it has to fit the sequence.
            length = tensor.shape[sequence] - txt_len if sparse_type == "rf_v2" else None
            _check_latent(name, latent, length)

    if sparse_type is None or sparsity == 0:
        return attend(q, k, v, None, scale, is_causal, head_first=head_first)
    latent_q, latent_k = latent_shape_q or (), latent_shape_k or ()
    if sparse_type == "rf_v2":
        if is_causal:
            raise ParametersInvalid("is_causal", True, "False with sparse_type='rf_v2'")
        latent_q, latent_k = _latents(q, k, latent_q, latent_k, sequence)
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        return attend(q, k, v, None, scale, is_causal, head_first=head_first)
    return attend_sparsely(
        q,
        k,
        v,
        sparse_type,
        sparsity,
        scale,
        is_causal,
        head_first,
        inner_precise,
        txt_len,
        txt_len,
        False,
        latent_q,
        latent_k,
        protect_first_frame,
        keep_sink,
        keep_recent,
        cdf_threshold,
    )


def _latents(
    q: Tensor, k: Tensor, latent_q: Sequence[int], latent_k: Sequence[int], sequence: int
) -> tuple[Sequence[int], Sequence[int]]:
    """The latent shapes of rf_v2; those of the keys are the queries' unless given."""
    if not latent_q:
        raise ParametersInvalid(
            "latent_shape_q", None, "[t, h, w] of the queries with sparse_type='rf_v2'"
        )
    if not latent_k:
        if q.shape[sequence] != k.shape[sequence]:
            raise ParametersInvalid(
                "latent_shape_k",
                None,
                "[t, h, w] of the keys, which are not as many as the queries",
            )
        latent_k = latent_q
    return latent_q, latent_k


def _check_latent(name: str, latent: object, length: int | None) -> None:
    """A latent shape is three positive ints, whose product is the length if that is known."""
    if not isinstance(latent, tuple | list) or len(latent) != 3:
        raise ParametersInvalid(name, checks.describe(latent), "None or three ints [t, h, w]")
    t, h, w = (checks.integer(f"{name}[{at}]", size, 1) for at, size in enumerate(latent))
    if length is not None and t * h * w != length:
        raise ParametersInvalid(
            name, checks.describe(latent), f"t * h * w = sequence length - txt_len = {length}"
        )
