"""Selection, then attention over it: what every sparse call comes to, also inside of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindiesd.ops.marks import PLAIN
from mindiesd.ops.sparse import adaptive, compiled, gathered, rainfusion, threaded
from mindiesd.ops.sparse.rearrange import latent_of
from mindiesd.ops.sparse.selection import Selection
from mindiesd.ops.sparse.workers import WORKERS


def attend_sparsely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse_type: str,
    sparsity: float,
    scale: float | None = None,
    is_causal: bool = False,
    head_first: bool = True,
    inner_precise: int = 0,
    text_q: int = 0,
    text_k: int = 0,
    text_last: bool = False,
    latent_q: Sequence[int] = (),
    latent_k: Sequence[int] = (),
    protect_first_frame: bool = False,
    keep_sink: bool = True,
    keep_recent: bool = True,
    cdf_threshold: float = 1.0,
) -> Tensor:
    """Sparse attention of arguments known to be right.

    Args:
        q: [B, N, Sq, D], or [B, Sq, N, D] unless ``head_first``; no dimension is 0.
        k: [B, Nkv, Skv, D] likewise; N is a multiple of Nkv.
        v: [B, Nkv, Skv, Dv] likewise.
        sparse_type: ``"rf_v2"`` or ``"ada_bsa"``.
        sparsity: share of the key blocks to drop.
        scale: factor on the scores; None is ``D ** -0.5``.
        is_causal: top-left causal; ada_bsa only.
        head_first: whether heads come before the sequence.
        inner_precise: 1 allows a device's kernel to sum in half precision.
        text_q: rf_v2: text tokens among the queries.
        text_k: rf_v2: text tokens among the keys.
        text_last: rf_v2: whether the text follows the video; else it comes first.
        latent_q: rf_v2: (t, h, w) of the queries beside the text.
        latent_k: rf_v2: (t, h, w) of the keys beside the text.
        protect_first_frame: rf_v2: keep the blocks of the first frame as well.
        keep_sink: ada_bsa: always keep the first key block.
        keep_recent: ada_bsa: always keep the last key block a query block may see.
        cdf_threshold: ada_bsa: share of the estimated attention that is enough.

    Returns:
        Attention in the query's layout and dtype.
    """
    kind = q.device.type
    if q.dtype is not torch.float64 and not q.is_meta and torch.is_autocast_enabled(kind):
        # As for dense attention: autocast decides the dtype.
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out: Tensor = (_operator if _traced(q) else _compute)(
        q,
        k,
        v,
        sparse_type,
        sparsity,
        q.shape[-1] ** -0.5 if scale is None else scale,
        is_causal,
        head_first,
        inner_precise,
        text_q,
        text_k,
        text_last,
        list(latent_q),
        list(latent_k),
        protect_first_frame,
        keep_sink,
        keep_recent,
        cdf_threshold,
    )
    return out


def _traced(tensor: Tensor) -> bool:
    """Whether the blocks cannot be looked at now: the call is compiled, exported, fake or meta."""
    return torch.compiler.is_compiling() or type(tensor) not in PLAIN or tensor.is_meta


def _compute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sparse_type: str,
    sparsity: float,
    scale: float,
    is_causal: bool,
    head_first: bool,
    inner_precise: int,
    text_q: int,
    text_k: int,
    text_last: bool,
    latent_q: Sequence[int],
    latent_k: Sequence[int],
    protect_first_frame: bool,
    keep_sink: bool,
    keep_recent: bool,
    cdf_threshold: float,
) -> Tensor:
    query, key = (q, k) if head_first else (q.transpose(1, 2), k.transpose(1, 2))

    def select() -> Selection:
        if sparse_type == "rf_v2":
            shapes = latent_of(latent_q), latent_of(latent_k)
            return rainfusion.select(
                query, key, scale, *shapes, text_q, text_k, text_last, sparsity, protect_first_frame
            )
        return adaptive.select(
            query, key, scale, is_causal, keep_sink, keep_recent, cdf_threshold, sparsity
        )

    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        selection = WORKERS.alone(select) if q.is_cpu else select()
        return over_blocks(q, k, v, selection, scale, head_first, inner_precise)


def over_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    scale: float,
    head_first: bool = True,
    inner_precise: int = 0,
) -> Tensor:
    """Attention over selected blocks, by the kernel of the device.

    Args:
        q: as for :func:`attend_sparsely`, and so are the others.
        k: likewise.
        v: likewise.
        selection: which blocks.
        scale: factor on the scores.
        head_first: likewise.
        inner_precise: likewise.
    """
    if q.is_cpu:
        if compiled.fits(q, k, v):
            return compiled.attention(q, k, v, selection, scale, head_first)
        return threaded.attention(q, k, v, selection, scale, head_first)
    if q.device.type == "npu":
        from mindiesd.ops.backends.npu import block_sparse

        return block_sparse.attention(q, k, v, selection, scale, head_first, inner_precise)
    return gathered.attention(q, k, v, selection, scale, head_first)


# Which blocks are kept is read from the data, a step no tracer can look into; the custom operator
# hides it. Written out, because what torch infers from annotations varies with its version.
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, str sparse_type, float sparsity, float scale, bool is_causal, "
    "bool head_first, SymInt inner_precise, SymInt text_q, SymInt text_k, bool text_last, "
    "SymInt[] latent_q, SymInt[] latent_k, bool protect_first_frame, bool keep_sink, "
    "bool keep_recent, float cdf_threshold) -> Tensor"
)


@torch.library.custom_op("mindiesd::sparse_attention", mutates_args=(), schema=_SCHEMA)
def _operator(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    """The same as one operator, for graphs."""
    return _compute(q, k, v, *rest).contiguous()  # type: ignore[arg-type]


@_operator.register_fake
def _shape_only(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """What tracing needs to know of the operator."""
    return q.new_empty(*q.shape[:-1], v.shape[-1])
