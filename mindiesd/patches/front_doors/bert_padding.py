"""``flash_attn.bert_padding``: taking the padding out of a batch and putting it back.

Plain indexing, so every function is differentiable. Source: flash_attn 2.8.3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` [T] of ``input`` [R, ...]: [T, ...]."""
    return input.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """[first_axis_dim, ...] with ``values`` [T, ...] at the rows ``indices`` [T], zeros between."""
    empty = values.new_zeros(first_axis_dim, *values.shape[1:])
    return empty.index_put((indices,), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`index_first_axis` and the input itself, both of which pass gradients on."""
    # A view, so that the caller may change one without the other's history.
    return input.index_select(0, indices), input.view_as(input)


def unpad_input(
    hidden_states: Any, attention_mask: Any, unused_mask: Any = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a mask keeps, packed.

    Args:
        hidden_states: [B, S, ...].
        attention_mask: [B, S], bool or integer, 1 for tokens.
        unused_mask: [B, S], 1 for tokens that are allocated but not used; or None.

    Returns:
        The tokens [T, ...] of both masks; their positions [T] in the flattened batch; where each
        sequence begins, and T, [B + 1] int32; the longest sequence; the tokens of
        ``attention_mask`` alone, [B] int32.
    """
    every = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = every.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(every.flatten(), as_tuple=False).flatten()
    starts = F.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, starts, int(lengths.max().item()), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Any, attention_mask_in_length: Any
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of rows into which several sequences were put one after another.

    Args:
        hidden_states: [B, S, ...].
        attention_mask_in_length: [B, S] integers: the lengths of a row's sequences, then zeros.

    Returns:
        The tokens [T, ...]; their positions [T] in the flattened batch; where each sequence begins,
        and T, int32; the longest sequence.
    """
    total = attention_mask_in_length.sum(dim=-1)
    steps = torch.arange(attention_mask_in_length.shape[-1], device=total.device, dtype=total.dtype)
    indices = torch.nonzero((steps < total[:, None]).flatten(), as_tuple=False).flatten()
    flat = attention_mask_in_length.flatten()
    lengths = flat[torch.nonzero(flat, as_tuple=False).flatten()]
    starts = F.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, starts, int(lengths.max().item())


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> Tensor:
    """The opposite of :func:`unpad_input`: [batch, seqlen, ...] with zeros as padding."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *padded.shape[1:])
