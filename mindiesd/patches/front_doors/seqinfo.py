"""Where the sequences of a packed dimension begin and end, as xformers' block masks have it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass
class SeqLenInfo:
    """Where the sequences of one dimension begin, one behind the other.

    Attributes:
        seqstart: the beginnings and the end, [B + 1] int32.
        max_seqlen: the longest.
        min_seqlen: the shortest.
        seqstart_py: ``seqstart`` as a list.
    """

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Any = None) -> SeqLenInfo:
        """Sequences of these lengths, one behind the other."""
        starts, lengths = [0], list(seqlens)
        for length in lengths:
            starts.append(starts[-1] + length)
        return cls(
            seqstart=torch.tensor(starts, dtype=torch.int32, device=device),
            max_seqlen=max(lengths, default=-1),
            min_seqlen=min(lengths, default=-1),
            seqstart_py=starts,
        )

    def to(self, device: Any) -> Any:
        """The same on another device."""
        return type(self)(**{**vars(self), "seqstart": self.seqstart.to(device)})

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Beginning and end of each sequence."""
        yield from pairwise(self.seqstart_py)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """The sequences of x [1, T, ...]; runs of equal ones, if told, as batches."""
        if x.shape[0] != 1 or x.shape[1] != self.seqstart_py[-1]:
            raise ValueError(f"expected [1, {self.seqstart_py[-1]}, ...], got {tuple(x.shape)}")
        sizes = list(batch_sizes) if batch_sizes is not None else [1] * (len(self.seqstart_py) - 1)
        parts, at = [], 0
        for size in sizes:
            rows = x[:, self.seqstart_py[at] : self.seqstart_py[at + size]]
            parts.append(rows.reshape(size, -1, *x.shape[2:]))
            at += size
        return parts


@dataclass
class PaddedSeqLenInfo(SeqLenInfo):
    """Sequences that each have room for ``padding`` and occupy ``seqlen`` of it."""

    seqlen: Tensor
    seqlen_py: list[int]
    padding: int

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: Any = None
    ) -> PaddedSeqLenInfo:
        """Sequences of these lengths, each in a room of ``padding``."""
        lengths = list(seqlens)
        if any(length > padding for length in lengths):
            raise ValueError(f"lengths {lengths} do not fit into a padding of {padding}")
        starts = list(range(0, len(lengths) * padding + 1, padding))
        return cls(
            seqstart=torch.tensor(starts, dtype=torch.int32, device=device),
            max_seqlen=max(lengths, default=-1),
            min_seqlen=min(lengths, default=-1),
            seqstart_py=starts,
            seqlen=torch.tensor(lengths, dtype=torch.int32, device=device),
            seqlen_py=lengths,
            padding=padding,
        )

    def to(self, device: Any) -> Any:
        """The same on another device."""
        moved = {"seqstart": self.seqstart.to(device), "seqlen": self.seqlen.to(device)}
        return type(self)(**{**vars(self), **moved})

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Beginning and end of what each sequence occupies."""
        for begin, length in zip(self.seqstart_py, self.seqlen_py, strict=False):
            yield begin, begin + length
