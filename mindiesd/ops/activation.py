"""Activation functions by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.backends import backend_of


class GELU(nn.Module):
    """The Gaussian error linear unit.

    ``"none"`` is x * Φ(x), ``"tanh"`` its tanh approximation (both as in torch), ``"fast"`` is
    x * sigmoid(1.702 x), computed in float32 or better and rounded once. Source: Hendrycks and
    Gimpel (arXiv 1606.08415).

    Attributes:
        approximate: ``"none"``, ``"tanh"`` or ``"fast"``.
    """

    def __init__(self, approximate: str = "none") -> None:
        """Make the activation.

        Args:
            approximate: ``"none"``, ``"tanh"`` or ``"fast"``.

        Raises:
            ParametersInvalid: ``approximate`` is none of these.
        """
        super().__init__()
        self.approximate: str = checks.choice("approximate", approximate, ("none", "tanh", "fast"))

    def forward(self, x: Tensor) -> Tensor:
        """The activation of every element of x, in x's dtype."""
        return backend_of(x).gelu(x, self.approximate)

    def extra_repr(self) -> str:
        """The arguments, as in other modules' repr."""
        return f"approximate={self.approximate!r}"


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "gelu": GELU,
    "relu": nn.ReLU,
    "gelu-tanh": partial(GELU, "tanh"),
    "gelu-fast": partial(GELU, "fast"),
}


def get_activation_layer(act_type: str) -> nn.Module:
    """A new instance of the activation function with that name.

    Every call makes its own: a hook or a ``.half()`` on one must not reach the others.

    Args:
        act_type: ``"swish"``, ``"silu"``, ``"mish"``, ``"gelu"``, ``"relu"``, ``"gelu-tanh"`` or
            ``"gelu-fast"``, in any case.

    Raises:
        ParametersInvalid: the name is not a string, or not one of these.
    """
    make = ACTIVATIONS.get(act_type.lower()) if isinstance(act_type, str) else None
    if make is None:
        raise ParametersInvalid("act_type", checks.describe(act_type), ", ".join(ACTIVATIONS))
    return make()


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU of arguments known to be right.

    Args:
        x: floating.
        approximate: ``"none"``, ``"tanh"`` or ``"fast"``, as in :class:`GELU`.

    Returns:
        Shape and dtype of x.
    """
    return backend_of(x).gelu(x, approximate)


def geglu(x: Tensor, approximate: str = "none") -> Tensor:
    """``a * gelu(b)`` of the halves a, b of the last dimension; arguments are known to be right.

    Source: Shazeer, *GLU Variants Improve Transformer* (arXiv 2002.05202).

    Args:
        x: [..., 2 H], floating.
        approximate: ``"none"`` or ``"tanh"``.

    Returns:
        [..., H] of x's dtype.
    """
    return backend_of(x).geglu(x, approximate)


def swiglu(x: Tensor) -> Tensor:
    """``silu(a) * b`` of the halves a, b of the last dimension; arguments are known to be right.

    The first half is the gate; that of diffusers' ``SwiGLU`` is the second, and needs another
    kernel. Source: Shazeer, as for :func:`geglu`.

    Args:
        x: [..., 2 H], floating.

    Returns:
        [..., H] of x's dtype.
    """
    return backend_of(x).swiglu(x)
