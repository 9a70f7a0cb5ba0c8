"""RMS norm and layer norm.

    rms_norm(x)   = x / sqrt(mean(x²) + eps) * weight
    layer_norm(x) = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

Statistics and the affine step are float32 or better, half precision is rounded once, and the
result has the dtype of x whatever the parameters' is. Sources: Zhang and Sennrich (arXiv
1910.07467); Ba et al. (arXiv 1607.06450). RMSNorm is T5's layer norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mindiesd.errors import ParametersInvalid
from mindiesd.ops import checks
from mindiesd.ops.backends import backend_of, native


class RMSNorm(nn.Module):
    """RMS norm over the last dimension, with a learned weight.

    Attributes:
        weight: [hidden_size], ones at first.
        variance_epsilon: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        """Make the norm.

        Args:
            hidden_size: size of the last dimension.
            eps: added to the mean square.

        Raises:
            ParametersInvalid: an argument is wrong.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.ones(checks.integer("hidden_size", hidden_size, 1)))
        self.variance_epsilon = checks.real("eps", eps, low=0.0)

    def forward(self, hidden_states: Tensor, if_fused: bool = True) -> Tensor:
        """Normalise.

        Args:
            hidden_states: [..., hidden_size], 2 to 8 dimensions, floating.
            if_fused: True uses the best kernel of the device; False ATen's.

        Returns:
            Shape and dtype of ``hidden_states``.

        Raises:
            ParametersInvalid: an argument is wrong.
        """
        weight = self.weight
        if if_fused is True and fits(hidden_states, weight):
            if hidden_states.is_cpu:
                return native.rms_norm(hidden_states, weight, self.variance_epsilon)
            return rms_norm(hidden_states, weight, self.variance_epsilon)
        # Slower, and exact about what is wrong; it may also find that nothing is.
        checks.tensor("hidden_states", hidden_states, tuple(range(2, 9)))
        checks.boolean("if_fused", if_fused)
        hidden = weight.shape[0]
        if hidden_states.shape[-1] != hidden:
            shown = checks.describe(hidden_states)
            raise ParametersInvalid("hidden_states", shown, f"a last dimension of {hidden}")
        checks.same_device("hidden_states", hidden_states, "weight", weight)
        norm = rms_norm if if_fused else native.rms_norm
        return norm(hidden_states, weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        """The arguments, as in other modules' repr."""
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


NO_GROUP_NORM_SILU = "no kernel of group norm and SiLU but on an Ascend NPU"

_FLOATING = frozenset(checks.FLOATING)
_STRIDED = torch.strided


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether x is as it usually is: a dense tensor, floating, on the device of the weight [H]."""
    if not isinstance(x, Tensor) or x.is_nested or x.layout is not _STRIDED:
        return False
    shape = x.shape
    return (
        2 <= len(shape) <= 8
        and shape[-1] == weight.shape[0]
        and x.dtype in _FLOATING
        and ((x.is_cpu and weight.is_cpu) or x.device == weight.device)
    )


def fast_layernorm(norm: nn.LayerNorm, x: Tensor, impl_mode: int = 0, fused: bool = True) -> Tensor:
    """Layer norm with the parameters of a module.

    Args:
        norm: the module whose weight, bias, eps and normalized_shape are used.
        x: [B, S, H], floating.
        impl_mode: 0 high precision; 1 high performance; 2 float16, for x, weight and bias of that
            dtype. A backend with one implementation uses it for all three.
        fused: True uses the best kernel of the device; False calls the module.

    Returns:
        Shape and dtype of x.

    Raises:
        ParametersInvalid: an argument is wrong.
    """
    if fused is True and type(impl_mode) is int and 0 <= impl_mode <= 1:
        weight = getattr(norm, "weight", None)
        if (
            type(norm) is nn.LayerNorm
            and weight is not None
            and weight.dim() == 1
            and fits(x, weight)
            and x.dim() == 3
        ):
            backend = native if x.is_cpu else backend_of(x)
            return backend.layer_norm(x, norm.normalized_shape, weight, norm.bias, norm.eps)
    # Slower, and exact about what is wrong; it may also find that nothing is.
    check_layer_norm("norm", norm, x)
    checks.choice("impl_mode", impl_mode, (0, 1, 2))
    checks.boolean("fused", fused)
    if impl_mode == 2:
        named = {"x": x, "norm.weight": norm.weight, "norm.bias": norm.bias}
        for name, value in named.items():
            if value is not None and value.dtype is not torch.float16:
                raise ParametersInvalid(
                    name, checks.describe(value), "torch.float16, with impl_mode=2"
                )
    if not fused:
        out: Tensor = norm(x)
        return out
    return layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def check_layer_norm(name: str, norm: object, x: object) -> None:
    """``norm`` is a LayerNorm that fits ``x``, a tensor [B, S, H]."""
    if not isinstance(norm, nn.LayerNorm):
        raise ParametersInvalid(name, checks.describe(norm), "a torch.nn.LayerNorm")
    tensor = checks.tensor("x", x, 3)
    shape = tuple(norm.normalized_shape)
    if len(shape) > 3 or tuple(tensor.shape[3 - len(shape) :]) != shape:
        allowed = f"trailing dimensions {list(shape)}, the normalized_shape of {name}"
        raise ParametersInvalid("x", checks.describe(x), allowed)
    if norm.weight is not None:
        checks.same_device("x", tensor, f"{name}.weight", norm.weight)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, as_is: bool = False) -> Tensor:
    """RMS norm of arguments known to be right.

    Args:
        x: [..., H], floating.
        weight: [H], any floating dtype, or None for ones.
        eps: added to the mean square.
        as_is: whether the caller stands for one that hands x to a kernel with any strides.

    Returns:
        Shape and dtype of x.
    """
    return backend_of(x).rms_norm(x, weight, eps, as_is)


def centred_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm whose weight is stored around zero: ``x / sqrt(mean(x²) + eps) * (1 + weight)``.

    ``1 + weight`` is float32 or better whatever the weight's dtype is. Arguments are known to be
    right.

    Args:
        x: [..., H], floating.
        weight: [H], any floating dtype.
        eps: added to the mean square.

    Returns:
        Shape and dtype of x.
    """
    return backend_of(x).centred_rms_norm(x, weight, eps)


def unit_norm(
    x: Tensor, dim: int, scale: float, weight: Tensor, bias: Tensor | None, eps: float = 1e-12
) -> Tensor:
    """``x / max(‖x‖₂ over dim, eps) * scale * weight + bias``, in float32 and rounded once.

    With ``scale`` the root of the dimension's size it is an RMS norm without an eps in the root, as
    autoencoders have it over their channels. No kernel normalises a dimension that is not the last,
    and moving it there would copy x twice. So it is composed, of as few passes over x as there can
    be: one for the norms, one for each factor, and nothing else of x's size is written.

    Args:
        x: float32, bfloat16 or float16.
        dim: the dimension that is normalised.
        scale: factor.
        weight: broadcasts with x without enlarging it; float32, bfloat16 or float16.
        bias: likewise, or None for zeros.
        eps: the least norm that is divided by.

    Returns:
        Shape of x, and the dtype that x, weight and bias promote to.
    """
    wanted = torch.promote_types(x.dtype, weight.dtype)
    # Half precision is read as it is and summed in float32, not copied to float32 before; the
    # factor goes to the norms, which are few.
    norms: Tensor = torch.linalg.vector_norm(x, 2, dim, keepdim=True, dtype=torch.float32)
    out = x / (norms.clamp_min(eps) / scale)
    if bias is None:
        return (out * weight).to(wanted)
    return torch.addcmul(bias.float(), out, weight.float()).to(
        torch.promote_types(wanted, bias.dtype)
    )


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Layer norm of arguments known to be right.

    Args:
        x: [..., *normalized_shape], floating.
        normalized_shape: the trailing dimensions that are normalised together.
        weight: of that shape, any floating dtype, or None for ones.
        bias: of that shape, any floating dtype, or None for zeros.
        eps: added to the variance.

    Returns:
        Shape and dtype of x.
    """
    return backend_of(x).layer_norm(x, normalized_shape, weight, bias, eps)


def group_norm_silu_refusal(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> str | None:
    """Why the device has no kernel for ``silu(group_norm(x))`` of these; None if it has one.

    Args:
        x: [B, C, ...].
        weight: [C], or None.
        bias: [C], or None.
        groups: of channels.
        eps: added to the variance.
    """
    refusal = getattr(backend_of(x), "group_norm_silu_refusal", None)
    if refusal is None:
        return NO_GROUP_NORM_SILU
    reason: str | None = refusal(x, weight, bias, groups, eps)
    return reason


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """``silu(group_norm(x))`` in one kernel, rounded once.

    Source: Wu and He (arXiv 1803.08494), followed by ``y * sigmoid(y)``.

    Args:
        x: [B, C, ...], not refused by :func:`group_norm_silu_refusal`.
        weight: [C], of x's dtype.
        bias: [C], of x's dtype.
        groups: of channels.
        eps: added to the variance.

    Returns:
        Shape and dtype of x.
    """
    out: Tensor = backend_of(x).group_norm_silu(x, weight, bias, groups, eps)  # type: ignore[attr-defined]
    return out
