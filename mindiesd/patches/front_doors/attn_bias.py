"""``xformers.ops.fmha.attn_bias``: masks that are described instead of stored.

Each class says which keys a query sees; ``materialize`` writes it out as an additive tensor.
Source: xformers 0.0.35.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mindiesd.ops.masks import TOP_LEFT_CAUSAL, Band
from mindiesd.patches.front_doors.seqinfo import PaddedSeqLenInfo, SeqLenInfo

Shape = tuple[int, ...]


class AttentionBias:
    """What every bias has."""

    def band(self, queries: int, keys: int) -> Band:
        """The diagonals that may attend where ``queries`` meet ``keys`` of one sequence."""
        return Band()

    def to(self, device: Any) -> Any:
        """The same bias for tensors on another device."""
        return self

    def materialize(
        self, shape: Shape, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        """The bias as a tensor of ``shape`` [..., Sq, Sk]: 0 where it attends, -inf elsewhere."""
        queries, keys = shape[-2:]
        keep = self.band(queries, keys).matrix(queries, keys, torch.device(device))
        return _additive(keep, dtype).expand(shape)


class LowerTriangularMask(AttentionBias):
    """Causal, aligned at the top left: query i sees the keys j <= i."""

    def __init__(self, device: Any = None) -> None:
        """Take a device, which is not used."""

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return TOP_LEFT_CAUSAL

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """The same with a tensor added to the scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, aligned at the top left, with a tensor [B, N, Sq, Sk] added to the scores."""

    def __init__(self, bias: Tensor) -> None:
        """Keep the tensor."""
        self._bias = bias

    def to(self, device: Any) -> LowerTriangularMaskWithTensorBias:
        """The same bias for tensors on another device."""
        return LowerTriangularMaskWithTensorBias(self._bias.to(device))

    def materialize(
        self, shape: Shape, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        """As in the class before."""
        return super().materialize(shape, dtype, device) + self._bias


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal, aligned at the bottom right: the last query sees the last key."""

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return Band.window(-1, 0, queries, keys)

    def make_local_attention(
        self, window_size: int
    ) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """The same with at most ``window_size`` keys for each query."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal, aligned at the bottom right, with at most ``_window_size`` keys for each query."""

    _window_size: int

    def __post_init__(self) -> None:
        """Refuse windows without a key."""
        _positive("window_size", self._window_size)

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return Band.window(self._window_size - 1, 0, queries, keys)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """A window around the diagonal that ends at the bottom right."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        """Refuse negative sides."""
        for name in ("window_left", "window_right"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return Band.window(self.window_left, self.window_right, queries, keys)


class _Blocks(AttentionBias):
    """Sequences packed into one row; queries see only keys of their own."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo

    def to(self, device: Any) -> Any:
        """The same bias for tensors on another device."""
        moved = {"q_seqinfo": self.q_seqinfo.to(device), "k_seqinfo": self.k_seqinfo.to(device)}
        return type(self)(**{**vars(self), **moved})

    def materialize(
        self, shape: Shape, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        """As in the class before."""
        ends = (self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1])
        if tuple(shape[-2:]) != ends:
            raise ValueError(f"shape {tuple(shape)} does not end with {ends}")
        keep = torch.zeros(shape[-2:], dtype=torch.bool, device=device)
        for (first, last), (begin, end) in zip(
            self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True
        ):
            inside = self.band(last - first, end - begin)
            keep[first:last, begin:end] = inside.matrix(last - first, end - begin, keep.device)
        return _additive(keep, dtype).expand(shape)


@dataclass
class BlockDiagonalMask(_Blocks):
    """Sequences packed into one row; queries see only keys of their own sequence."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: Any = None,
    ) -> Any:
        """The bias of sequences of these lengths; those of the keys are the queries' if None."""
        q_seqinfo = SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or list(kv_seqlen) == list(q_seqlen):
            return cls(q_seqinfo=q_seqinfo, k_seqinfo=q_seqinfo)
        if len(kv_seqlen) != len(q_seqlen):
            raise ValueError(f"{len(q_seqlen)} query and {len(kv_seqlen)} key sequences")
        k_seqinfo = SeqLenInfo.from_seqlens(kv_seqlen, device=device)
        return cls(q_seqinfo=q_seqinfo, k_seqinfo=k_seqinfo)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """The bias of tensors [B, S, ...], and the tensors in one row [1, T, ...]."""
        bias = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        bias._batch_sizes = [x.shape[0] for x in tensors]
        return bias, _in_one_row(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls,
        tensors_q: Sequence[Tensor],
        tensors_k: Sequence[Tensor],
        tensors_v: Sequence[Tensor] | None = None,
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """The bias of queries and keys [B, S, ...], and each list in one row."""
        bias = cls.from_seqlens(
            [x.shape[1] for x in tensors_q for _ in range(x.shape[0])],
            [x.shape[1] for x in tensors_k for _ in range(x.shape[0])],
        )
        bias._batch_sizes = [x.shape[0] for x in tensors_q]
        values = None if tensors_v is None else _in_one_row(tensors_v)
        return bias, _in_one_row(tensors_q), _in_one_row(tensors_k), values

    def split_queries(self, tensor: Tensor) -> Sequence[Tensor]:
        """The query sequences of a row [1, T, ...]."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> Sequence[Tensor]:
        """The key sequences of a row [1, T, ...]."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """The opposite of :meth:`from_tensor_list`."""
        if self.q_seqinfo is not self.k_seqinfo:
            raise ValueError("queries and keys differ in length: split_queries or split_kv")
        return self.split_queries(tensor)

    def _as(self, kind: Any, **more: Any) -> Any:
        return kind(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, **more)

    def make_causal(self) -> BlockDiagonalCausalMask:
        """The same, causal in each block, aligned at its top left."""
        made: BlockDiagonalCausalMask = self._as(BlockDiagonalCausalMask)
        return made

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """The same, causal in each block, aligned at its bottom right."""
        made: BlockDiagonalCausalFromBottomRightMask = self._as(
            BlockDiagonalCausalFromBottomRightMask
        )
        return made

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        """:meth:`make_causal` with at most ``window_size`` keys for each query."""
        made: BlockDiagonalCausalLocalAttentionMask = self._as(
            BlockDiagonalCausalLocalAttentionMask, _window_size=window_size
        )
        return made

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        """:meth:`make_causal_from_bottomright` with at most ``window_size`` keys."""
        made: BlockDiagonalCausalLocalAttentionFromBottomRightMask = self._as(
            BlockDiagonalCausalLocalAttentionFromBottomRightMask, _window_size=window_size
        )
        return made


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Causal in each block, aligned at its top left."""

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return TOP_LEFT_CAUSAL


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Causal in each block, aligned at its bottom right; no block has more queries than keys."""

    def __post_init__(self) -> None:
        """Refuse blocks with rows that see nothing."""
        for at, ((first, last), (begin, end)) in enumerate(
            zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)
        ):
            if end - begin < last - first:
                raise ValueError(f"block {at}: {last - first} queries and {end - begin} keys")

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return Band.window(-1, 0, queries, keys)


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Query i of a block sees the keys from i - ``_window_size`` + 1 to i of its block."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        """Refuse windows without a key."""
        _positive("window_size", self._window_size)
        for (first, last), (begin, end) in zip(
            self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True
        ):
            if last - first - self._window_size >= end - begin:
                raise RuntimeError(
                    f"{last - first} queries see none of {end - begin} keys through a window of "
                    f"{self._window_size}"
                )

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return Band(1 - self._window_size, 0)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Causal in each block from the bottom right, at most ``_window_size`` keys for each query."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        """Refuse windows without a key."""
        super().__post_init__()
        _positive("window_size", self._window_size)

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return Band.window(self._window_size - 1, 0, queries, keys)


@dataclass
class BlockDiagonalPaddedKeysMask(_Blocks):
    """Packed sequences whose keys have room to grow: what is not occupied is not seen."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: PaddedSeqLenInfo

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,
        *,
        device: Any = None,
    ) -> Any:
        """The bias of sequences whose keys have room for ``kv_padding`` each."""
        return cls(**_padded(q_seqlen, kv_padding, kv_seqlen, device))

    def make_local_attention(
        self, window_left: int, window_right: int
    ) -> BlockDiagonalLocalAttentionPaddedKeysMask:
        """The same with a window around the diagonal that ends at each block's bottom right."""
        return BlockDiagonalLocalAttentionPaddedKeysMask(
            self.q_seqinfo, self.k_seqinfo, window_left, window_right
        )


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Causal in each block, aligned at the bottom right of what is occupied."""

    causal_diagonal: Any = None

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return Band.window(-1, 0, queries, keys)


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """A window in each block, around the diagonal that ends at the bottom right."""

    window_left: int
    window_right: int

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
    ) -> Any:
        """The bias of sequences whose keys have room for ``kv_padding`` each."""
        return cls(
            **_padded(q_seqlen, kv_padding, kv_seqlen, None),
            window_left=window_left,
            window_right=window_right,
        )

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return Band.window(self.window_left, self.window_right, queries, keys)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Causal in each block from the bottom right, at most ``_window_size`` keys for each query."""

    _window_size: int

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_size: int,
    ) -> Any:
        """The bias of sequences whose keys have room for ``kv_padding`` each."""
        return cls(**_padded(q_seqlen, kv_padding, kv_seqlen, None), _window_size=window_size)

    def band(self, queries: int, keys: int) -> Band:
        """As in the class before."""
        return Band.window(self._window_size - 1, 0, queries, keys)


EVERY: dict[str, type[AttentionBias]] = {
    kind.__name__: kind
    for kind in (
        AttentionBias,
        LowerTriangularMask,
        LowerTriangularMaskWithTensorBias,
        LowerTriangularFromBottomRightMask,
        LowerTriangularFromBottomRightLocalAttentionMask,
        LocalAttentionFromBottomRightMask,
        BlockDiagonalMask,
        BlockDiagonalCausalMask,
        BlockDiagonalCausalFromBottomRightMask,
        BlockDiagonalCausalLocalAttentionMask,
        BlockDiagonalCausalLocalAttentionFromBottomRightMask,
        BlockDiagonalPaddedKeysMask,
        BlockDiagonalCausalWithOffsetPaddedKeysMask,
        BlockDiagonalLocalAttentionPaddedKeysMask,
        BlockDiagonalCausalLocalAttentionPaddedKeysMask,
    )
}


def _additive(keep: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, -math.inf)


def _positive(name: str, value: int) -> None:
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def _in_one_row(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], dim=1)


def _padded(
    q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], device: Any
) -> dict[str, Any]:
    if len(q_seqlen) != len(kv_seqlen):
        raise ValueError(f"{len(q_seqlen)} query and {len(kv_seqlen)} key sequences")
    return {
        "q_seqinfo": SeqLenInfo.from_seqlens(q_seqlen, device=device),
        "k_seqinfo": PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device),
    }
