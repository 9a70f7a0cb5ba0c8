"""Which object a tensor is, and what has become of its memory.

What is kept of tensors is found again by this: the very same object (a weak reference, so nothing
is kept alive), unwritten to since (its version counter), at the same address (assigning to
``Tensor.data`` changes no version). Writes *through* ``Tensor.data`` cannot be seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)
"""The types whose versions are counted and whose memory is their own; buffers are tensors."""


class Mark(NamedTuple):
    """A tensor at one moment.

    Attributes:
        tensor: it, as long as it lives.
        version: how often its memory had been written to.
        address: where its memory was.
    """

    tensor: weakref.ref[Tensor]
    version: int
    address: int

    @staticmethod
    def of(tensor: Tensor, forget: Callable[[weakref.ref[Tensor]], None] | None = None) -> Mark:
        """The tensor as it is now.

        Args:
            tensor: no inference tensor, whose versions are not counted.
            forget: called with the reference when the tensor is gone.
        """
        return Mark(weakref.ref(tensor, forget), tensor._version, tensor.data_ptr())

    def holds(self, tensor: Tensor) -> bool:
        """Whether this is that tensor, unwritten to."""
        return (
            self.tensor() is tensor
            and tensor._version == self.version
            and tensor.data_ptr() == self.address
        )
