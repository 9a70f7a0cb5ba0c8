"""``rf_v2``: blocks of compact regions of a video, chosen by the attention between their means.

1. The video tokens are put into tile order, the text behind them (:mod:`.rearrange`).
2. q̂_i and k̂_j are the means of 128 consecutive tokens.
3. Of each row of ``scale * q̂ k̂ᵀ`` the ``ceil(n * (1 - sparsity))`` largest are kept. Softmax keeps
   the order of a row, so the scores are ranked themselves, in float32.
4. Every block with a text token in it is kept too, as keys and as queries: text attends to all and
   is attended by all.

Source: RainFusion2.0, arXiv 2512.24086. It also keeps the first frame on top of the share;
``protect_first_frame`` asks for that.
"""

from __future__ import annotations

from torch import Tensor

from mindiesd.ops.sparse.pooling import block_means
from mindiesd.ops.sparse.rearrange import sequence_order
from mindiesd.ops.sparse.selection import BLOCK, Selection, blocks_of, kept, largest


def select(
    query: Tensor,
    key: Tensor,
    scale: float,
    latent_q: tuple[int, int, int],
    latent_k: tuple[int, int, int],
    text_q: int,
    text_k: int,
    text_last: bool,
    sparsity: float,
    protect_first_frame: bool = False,
) -> Selection:
    """The blocks that rf_v2 keeps.

    Args:
        query: [B, N, Sq, D].
        key: [B, Nkv, Skv, D]; N is a multiple of Nkv.
        scale: factor on the scores.
        latent_q: (t, h, w) of the queries beside the text.
        latent_k: (t, h, w) of the keys beside the text.
        text_q: text tokens among the queries.
        text_k: text tokens among the keys.
        text_last: whether the text follows the video; else it comes first.
        sparsity: share of the key blocks to drop.
        protect_first_frame: keep the blocks of the first frame too, as keys and as queries.
    """
    order_q = sequence_order(latent_q, text_q, text_last, query.device)
    order_k = sequence_order(latent_k, text_k, text_last, key.device)
    means_q, means_k = block_means(query, order_q), block_means(key, order_k)
    groups = query.shape[1] // key.shape[1]
    if groups != 1:
        means_k = means_k.repeat_interleave(groups, 1)
    scores = means_q @ (means_k.transpose(-1, -2) * scale)
    keep = largest(scores, kept(scores.shape[-1], sparsity))
    sides = (
        (keep, latent_q, query.shape[2], text_q),
        (keep.transpose(-1, -2), latent_k, key.shape[2], text_k),
    )
    for chosen, latent, length, text in sides:
        if text:
            chosen[..., (length - text) // BLOCK :, :] = True
        if protect_first_frame:
            chosen[..., : blocks_of(latent[1] * latent[2]), :] = True
    return Selection(keep, order_q, order_k)
