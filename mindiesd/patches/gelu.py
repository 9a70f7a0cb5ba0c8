"""``torch.nn.functional.gelu`` → the GELU that was asked for.

On an Ascend NPU the operator behind it computes the tanh form whatever ``approximate`` says, up to
4.7e-4 away from the erf form that is the default; nothing tells. ``torch.nn.GELU`` and diffusers'
``GELU`` look the function up at call time, so this one target reaches them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindiesd.patches import law
from mindiesd.patches.registry import Patch
from mindiesd.patches.scope import Site

RECORDS = (
    Patch(
        name="gelu",
        family="activation",
        module="torch.nn.functional",
        attribute="gelu",
        after="torch",
        becomes="mindiesd.get_activation_layer",
        build="mindiesd.patches.gelu:build",
        why=(
            "the erf form where it is asked for: the operator of the NPU computes the tanh form "
            "then too"
        ),
        when="half or float32 input, no gradients, no autocast",
        numerics="bitwise equal on CPU and CUDA; on the NPU nearer to the CPU's result",
        requires={"torch": ">=2.5"},
        # The builtin's own home, which the native backend calls.
        keep_in=("torch._C",),
    ),
)


def build(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``F.gelu``."""
    import torch
    from torch import Tensor
    from torch.overrides import handle_torch_function, has_torch_function_variadic

    from mindiesd.ops import activation

    grad_enabled, jit_tracing, autocast = law.context()
    half_or_single = (torch.float32, torch.bfloat16, torch.float16)

    def refusal(input: Any, approximate: Any) -> str | None:
        if jit_tracing() is not None:
            return law.JIT_TRACE
        if not isinstance(input, Tensor) or input.is_nested:
            return law.NOT_A_TENSOR
        if approximate != "none" and approximate != "tanh":
            return law.UNUSUAL_ARGUMENT
        if input.dtype not in half_or_single:
            return law.DTYPE
        if autocast():
            return law.AUTOCAST
        if grad_enabled() and input.requires_grad:
            return law.GRADIENTS
        return None

    def gelu(input: Any, *moved: Any, approximate: str = "none") -> Any:
        if moved and len(moved) == 1 and not isinstance(input, Tensor):
            # The original is a builtin, which does not bind: as an attribute of a class it is
            # called with the tensor alone. This function binds, so the instance came first.
            (input,), moved = moved, ()
        if moved:
            return original(input, *moved, approximate=approximate)
        if has_torch_function_variadic(input):
            return handle_torch_function(site.installed, (input,), input, approximate=approximate)
        if site.everywhere or site.in_force():
            reason = refusal(input, approximate)
            if site.takes(reason):
                return activation.gelu(input, approximate)
        return original(input, approximate=approximate)

    return gelu


def after_install(replacement: Callable[..., Any]) -> None:
    """Let ``torch.jit.script`` compile calls of the replacement to the operator it replaces."""
    from torch.jit import _builtins

    _builtins._register_builtin(replacement, "aten::gelu")


def after_uninstall(replacement: Callable[..., Any]) -> None:
    """Take the replacement out of the table: it is keyed by ``id``, which will be reused."""
    from torch.jit import _builtins

    table: dict[int, str] = _builtins._get_builtin_table()  # type: ignore[no-untyped-call]
    table.pop(id(replacement), None)
