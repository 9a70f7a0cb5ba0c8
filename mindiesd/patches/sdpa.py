"""``torch.nn.functional.scaled_dot_product_attention`` → ``attention_forward``.

diffusers and transformers look the function up on ``torch.nn.functional`` at call time, so this one
target reaches nearly all attention of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import law, verify
from mindiesd.patches.registry import Left, Patch
from mindiesd.patches.scope import Site

if TYPE_CHECKING:
    from torch import Tensor

RECORDS = (
    Patch(
        name="sdpa",
        family="sdpa",
        module="torch.nn.functional",
        attribute="scaled_dot_product_attention",
        after="torch",
        becomes="mindiesd.attention_forward",
        build="mindiesd.patches.sdpa:build",
        why=(
            "additive masks, causal attention and odd shapes reach a fused Ascend kernel instead "
            "of a materialised score matrix"
        ),
        when=(
            "4-D query, key and value of one floating dtype and device (on an NPU also of another "
            "number of dimensions); no mask, a bool mask or an additive mask that broadcasts; no "
            "dropout, no gradients, not mask and is_causal together"
        ),
        numerics="bitwise equal on CPU and CUDA",
        requires={"torch": ">=2.5"},
        # The builtin's own home: PyTorch's nested tensors compare with it by identity.
        keep_in=("torch._C",),
        reference="mindiesd.patches.sdpa:reference",
    ),
)

_BEFORE_5 = (
    "before transformers 5 the products are written out, with a bias made between them; since then "
    "it asks scaled_dot_product_attention"
)
LEFT = (
    Left(
        "torch.nn.attention.flex_attention.flex_attention",
        "its mask is a function, compiled into a kernel of its own, and may change the scores; a "
        "dense mask in its place would be as large as the scores",
    ),
    Left(
        "transformers.models.gemma2.modeling_gemma2.eager_attention_forward",
        "bounds the scores by a tanh before the softmax, which no fused kernel does",
    ),
    Left("transformers.models.t5.modeling_t5.T5Attention", _BEFORE_5),
    Left("transformers.models.umt5.modeling_umt5.UMT5Attention", _BEFORE_5),
)


def build(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``F.scaled_dot_product_attention``."""
    import torch
    from torch import Tensor
    from torch.overrides import handle_torch_function, has_torch_function_variadic

    from mindiesd.ops import attention
    from mindiesd.patches import sparse

    plans, tracing = sparse.PLANS, torch.compiler.is_dynamo_compiling
    tell: Callable[[], None] = torch.compiler.assume_constant_result(sparse.traced)  # type: ignore[no-untyped-call]
    grad_enabled, jit_tracing, _ = law.context()

    def scaled_dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if has_torch_function_variadic(query, key, value, attn_mask):
            if not any(isinstance(t, Tensor) and t.is_nested for t in (query, key, value)):
                # Modes and subclasses compare the function they are given with the public name
                # (diffusers' layer skipping does), so they must see this function.
                result: Tensor = handle_torch_function(
                    site.installed,
                    (query, key, value, attn_mask),
                    query,
                    key,
                    value,
                    attn_mask=attn_mask,
                    dropout_p=dropout_p,
                    is_causal=is_causal,
                    scale=scale,
                    enable_gqa=enable_gqa,
                )
                return result
        elif not isinstance(query, Tensor) and _is_bound(query, site.installed):
            return scaled_dot_product_attention(
                key, value, *_shifted(attn_mask, dropout_p, is_causal, scale, enable_gqa)
            )
        elif site.everywhere or site.in_force():
            reason: str | None
            if dropout_p != 0.0:
                reason = law.DROPOUT
            elif not (scale is None or type(scale) is float) or (
                is_causal is not False and is_causal is not True
            ):
                reason = law.UNUSUAL_ARGUMENT
            elif jit_tracing() is not None:
                reason = law.JIT_TRACE
            elif not (
                isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)
            ):
                reason = law.NOT_A_TENSOR
            else:
                reason = attention.refusal(query, key, value, attn_mask, is_causal, enable_gqa)
                if (
                    reason is None
                    and grad_enabled()
                    and (
                        query.requires_grad
                        or key.requires_grad
                        or value.requires_grad
                        or (attn_mask is not None and attn_mask.requires_grad)
                    )
                ):
                    reason = law.GRADIENTS
                elif (
                    # The first two are cheap, and say no for most calls.
                    reason is not None and not query.is_cpu and query.device.type == "npu"
                ):
                    # Its own kernels are 4-D, and so every other rank is computed in pieces.
                    four = _four(query, key, value, attn_mask, enable_gqa)
                    if four is not None and attention.refusal(*four, is_causal) is None:
                        if grad_enabled() and any(t is not None and t.requires_grad for t in four):
                            reason = law.GRADIENTS
                        elif site.takes(None):
                            out = attention.attend(*four, scale, is_causal)
                            return out.reshape(*query.shape[:-1], value.shape[-1])
            if plans and reason is None:
                if tracing():
                    tell()
                else:
                    partly = sparse.attend(query, key, value, attn_mask, scale, is_causal)
                    if partly is not None:
                        return partly
            if site.takes(reason):
                return attention.attend(query, key, value, attn_mask, scale, is_causal)
        kept: Tensor = original(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return kept

    return scaled_dot_product_attention


def _four(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """The same call in four dimensions; None if it has them, or is not said as simply.

    Args:
        query: [B, Sq, D], or [..., N, Sq, D] with more than one batch dimension.
        key: likewise.
        value: likewise.
        mask: broadcastable to the scores; no batch dimensions with more than one of the query's.
        enable_gqa: grouped heads need a dimension of heads.
    """
    rank = query.dim()
    if query.is_nested or key.dim() != rank or value.dim() != rank or 0 in query.shape:
        return None
    if rank == 3 and not enable_gqa:
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        return query[:, None], key[:, None], value[:, None], mask
    if rank > 4 and query.shape[:-3] == key.shape[:-3] == value.shape[:-3]:
        if mask is not None and mask.dim() > 3:
            return None
        last = rank - 4
        return query.flatten(0, last), key.flatten(0, last), value.flatten(0, last), mask
    return None


def _is_bound(instance: object, function: object) -> bool:
    """Whether a call got ``instance`` because ``function`` is an attribute of its class.

    The original is a builtin, which does not bind: ``attend = F.scaled_dot_product_attention`` in
    a class body and ``self.attend(q, k, v)`` are fine with it. A class defined while we are in
    place holds a Python function, which binds.
    """
    return any(
        value is function for kind in type(instance).__mro__ for value in vars(kind).values()
    )


def _shifted(attn_mask: Any, dropout_p: Any, is_causal: Any, scale: Any, enable_gqa: Any) -> Any:
    """The arguments from ``value`` on of a call whose positional ones moved up by one.

    Each parameter holds what was given for it by keyword, or what was meant for the one before it;
    their types differ, so one look tells. The original takes ``scale`` by keyword only.
    """
    value, mask, dropout, causal = attn_mask, None, dropout_p, is_causal
    if dropout_p is None or hasattr(dropout_p, "dtype"):
        mask, dropout = dropout_p, 0.0
        if type(is_causal) is not bool:
            dropout, causal = is_causal, False
            if type(scale) is bool:
                causal, scale = scale, None
    return value, mask, dropout, causal, scale, enable_gqa


_REFERENCE_WORK = 2**28
"""Multiplications that the reference of one call may take; more query rows are left out."""


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Attention in float64, from its formula, for some of the query rows of one call.

    ``softmax(query · keyᵀ · scale + mask) · value``; a row that sees no key gives zeros.

    Returns:
        The result of those rows, ``[B, N, rows, D]`` on the CPU, and what picks them from a whole
        result.
    """
    import torch

    def exact(tensor: Tensor) -> Tensor:
        return tensor.detach().cpu().double()

    batch, heads, length, head_dim = query.shape
    keys = key.shape[2]
    row_work = max(1, batch * heads * keys * (head_dim + value.shape[3]))
    rows = torch.tensor(verify.sample_rows(length, max(2, _REFERENCE_WORK // row_work)))
    share = heads // key.shape[1]
    key = exact(key).repeat_interleave(share, dim=1)
    value = exact(value).repeat_interleave(share, dim=1)
    scores = exact(query[:, :, rows.to(query.device)]) @ key.transpose(2, 3)
    scores *= head_dim**-0.5 if scale is None else scale
    if attn_mask is not None:
        mask = attn_mask.detach().cpu()
        if mask.dim() > 1 and mask.shape[-2] == length and length > 1:
            mask = mask[..., rows, :]
        if mask.dtype is torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask.double()
    if is_causal:
        scores = scores.masked_fill(rows[:, None] < torch.arange(keys), -torch.inf)
    weights = scores.softmax(dim=-1).masked_fill((scores == -torch.inf).all(-1, True), 0.0)
    return weights @ value, lambda whole: whole[:, :, rows.to(whole.device)]


def after_install(replacement: Callable[..., Any]) -> None:
    """Let ``torch.jit.script`` compile calls of the replacement to the operator it replaces."""
    from torch.jit import _builtins

    _builtins._register_builtin(replacement, "aten::scaled_dot_product_attention")


def after_uninstall(replacement: Callable[..., Any]) -> None:
    """Take the replacement out of the table: it is keyed by ``id``, which will be reused."""
    from torch.jit import _builtins

    table: dict[int, str] = _builtins._get_builtin_table()  # type: ignore[no-untyped-call]
    table.pop(id(replacement), None)
