"""Sparse attention: the public function and the strategies behind it."""

from mindiesd.ops.sparse.entry import sparse_attention

__all__ = ["sparse_attention"]
