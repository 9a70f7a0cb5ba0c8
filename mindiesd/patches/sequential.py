"""``nn.Sequential`` that starts with two layers which are less together than one by one.

* a group norm and a SiLU are one kernel, see :mod:`mindiesd.patches.group_norm`;
* the SiLU of a conditioning that is projected is remembered, see
  :mod:`mindiesd.patches.conditioning`.

A sequence that starts otherwise has nothing to redirect, and is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindiesd.patches.registry import Patch
from mindiesd.patches.scope import Site

RECORDS = (
    Patch(
        name="torch_sequential",
        family="sequential",
        module="torch.nn.modules.container",
        attribute="Sequential.forward",
        after="torch",
        becomes="mindiesd.ops.norm.group_norm_silu",
        build="mindiesd.patches.sequential:build",
        why="one kernel for a group norm and SiLU; one SiLU a step before the projections of temb",
        when="starts with nn.GroupNorm and nn.SiLU (on an NPU), or is nn.SiLU and nn.Linear",
        numerics="one rounding less; a SiLU that is remembered is bitwise equal",
        requires={"torch": ">=2.5"},
        parameters=("self", "input"),
    ),
)


def after_uninstall(replacement: object) -> None:
    """Forget, now that nothing asks any more."""
    from mindiesd.patches.memory import MEMORY

    MEMORY.clear()


def build(original: Any, site: Site) -> Callable[..., Any]:
    """The replacement of ``torch.nn.Sequential.forward``."""
    import torch
    from torch.nn import GroupNorm, Linear, Sequential, SiLU

    from mindiesd.ops import norm as norms
    from mindiesd.patches import conditioning, group_norm
    from mindiesd.patches.memory import SILU

    fused, shared = group_norm.refusal_of_norm_act(), conditioning.refusal_of_projection()
    dynamo = torch.compiler.is_dynamo_compiling

    def forward(self: Any, input: Any) -> Any:
        if (site.everywhere or site.in_force()) and type(self) is Sequential:
            layers = self._modules
            if len(layers) >= 2:
                first, second, *rest = layers.values()
                if type(first) is GroupNorm and type(second) is SiLU:
                    if site.takes(fused(second, first, input)):
                        out: Any = norms.group_norm_silu(
                            input, first.weight, first.bias, first.num_groups, first.eps
                        )
                        for layer in rest:
                            out = layer(out)
                        return out
                elif (
                    type(first) is SiLU
                    and type(second) is Linear
                    and not rest
                    and site.takes(shared(second, first, input))
                    and not dynamo()
                ):
                    return second(SILU(input))
        return original(self, input)

    return forward
