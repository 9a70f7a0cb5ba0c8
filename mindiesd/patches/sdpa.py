"""``torch.nn.functional.scaled_dot_product_attention`` → ``attention_forward``.

diffusers and transformers look the function up on ``torch.nn.functional`` at call time, so this one
target reaches nearly all attention of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mindiesd.patches import law
from mindiesd.patches.registry import Patch
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
            "4-D query, key and value of one floating dtype and device; no mask, a bool mask or "
            "an additive mask that broadcasts; no dropout, no gradients, not mask and is_causal "
            "together"
        ),
        numerics="bitwise equal on CPU and CUDA",
        requires={"torch": ">=2.5"},
        # The builtin's own home: PyTorch's nested tensors compare with it by identity.
        keep_in=("torch._C",),
    ),
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
                    scaled_dot_product_attention,
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
        elif not isinstance(query, Tensor) and _is_bound(query, scaled_dot_product_attention):
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


def after_install(replacement: Callable[..., Any]) -> None:
    """Let ``torch.jit.script`` compile calls of the replacement to the operator it replaces."""
    from torch.jit import _builtins

    _builtins._register_builtin(replacement, "aten::scaled_dot_product_attention")


def after_uninstall(replacement: Callable[..., Any]) -> None:
    """Take the replacement out of the table: it is keyed by ``id``, which will be reused."""
    from torch.jit import _builtins

    table: dict[int, str] = _builtins._get_builtin_table()  # type: ignore[no-untyped-call]
    table.pop(id(replacement), None)
