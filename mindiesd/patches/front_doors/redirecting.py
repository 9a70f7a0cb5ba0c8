"""The redirect of an installed package: what is not on a CUDA device cannot be its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mindiesd.patches.scope import Site

ON_CUDA = "on a CUDA device: the package's own kernel"


def off_cuda(
    original: Callable[..., Any], ours: Callable[..., Any], site: Site
) -> Callable[..., Any]:
    """A function that sends tensors that are not on CUDA to ``ours``, all else to ``original``.

    The package's kernels are CUDA kernels; given anything else it raises. So nothing that it
    computes is ever taken from it. ``ours`` counts its own calls.

    Args:
        original: the package's function; its first argument is a tensor.
        ours: takes the same arguments.
        site: where the calls that go to the original are counted.
    """
    signature = inspect.signature(ours)
    first = next(iter(signature.parameters))

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if site.everywhere or site.in_force():
            tensor = args[0] if args else kwargs.get(first)
            # Not `is_cuda`: transfer_to_npu makes it say yes of tensors on an NPU.
            device = getattr(tensor, "device", None)
            if device is not None and device.type != "cuda":
                return ours(*args, **kwargs)
            site.takes(ON_CUDA)
        return original(*args, **kwargs)

    # Compared with the original's before anything is installed.
    replacement.__signature__ = signature  # type: ignore[attr-defined]
    return replacement
