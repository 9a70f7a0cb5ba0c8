"""Attention on an Ascend NPU: which kernel, why, and the call.

A call is described (:mod:`.call`), the kernels of its series are asked in a fixed order whether it
lies inside their documented limits, and the first that says yes takes it. In the ``runtime`` mode
those that say yes are timed, once per kind of call. What no kernel takes is composed of matmul and
softmax in float32: torch_npu's own SDPA would be no better, since it refuses a float32 bias to half
precision and calls kernels beyond their limits (more than 256 heads).
"""

from __future__ import annotations

from collections import OrderedDict
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mindiesd.errors import ParametersInvalid
from mindiesd.ops.backends import native
from mindiesd.ops.backends.npu import clock, fusion, infer, laser, prompt, soc, vendor
from mindiesd.ops.backends.npu.call import Call, describe
from mindiesd.ops.dispatch import MEASURED, OPERATOR_VARIABLE, Chosen, Fastest, Kernel
from mindiesd.ops.masks import AttentionMask

# The static order. FA computes in high precision, takes every mask and any strides; laser attention
# and PFA are considered where they are timed or named.
ORDER: dict[str, tuple[ModuleType, ...]] = {
    soc.A2: (fusion, infer, prompt, laser),
    soc.A3: (fusion, infer, prompt, laser),
    soc.A950: (fusion,),
    soc.I310P: (prompt,),
    soc.UNKNOWN: (),
}
OPERATORS: dict[str, ModuleType] = {
    "prompt_flash_attn": prompt,
    "fused_attn_score": fusion,
    "ascend_laser_attention": laser,
}

PLANS = 1024


class Plan(NamedTuple):
    """What happens to a call, and why.

    Attributes:
        kernel: the operator, ``"composed"`` for matmul and softmax, or ``"none"`` for results that
            need no computation.
        layout: in which it gets query, key and value.
        reason: why it was chosen, in a few words.
        refused: the kernels before it in the order, each with the reason against it.
        module: the module of the kernel, or None.
    """

    kernel: str
    layout: str
    reason: str
    refused: tuple[tuple[str, str], ...] = ()
    module: ModuleType | None = None


class _Run(NamedTuple):
    """A legal way to compute a call."""

    module: ModuleType
    layout: str

    @property
    def name(self) -> str:
        """The operator."""
        return str(self.module.NAME)


_plans: OrderedDict[tuple[Call, Kernel | None], Plan] = OrderedDict()
_fastest: Fastest[_Run] = Fastest()


def _layout(module: ModuleType, call: Call, layout: str) -> str:
    if layout not in module.LAYOUTS:
        return str(module.LAYOUTS[0])
    return prompt.layout_of(call, layout) if module is prompt else layout


def _name(module: ModuleType, call: Call) -> str:
    return fusion.operator(call) if module is fusion else str(module.NAME)


def legal(call: Call) -> tuple[list[_Run], list[tuple[str, str]]]:
    """The kernels inside whose limits a call lies, in static order, and why the others are not."""
    runs, refused = [], []
    for module in ORDER.get(call.series, ()):
        reason = module.refusal(call)
        if reason is None:
            runs.append(_Run(module, _layout(module, call, call.layout)))
        else:
            refused.append((module.NAME, reason))
    return runs, refused


def _static(call: Call) -> Plan:
    refused: list[tuple[str, str]] = []
    for module in ORDER.get(call.series, ()):
        reason = module.refusal(call)
        if reason is not None:
            refused.append((module.NAME, reason))
            continue
        why = "the first kernel of this series whose limits admit the call"
        if module is fusion and fusion.widened(call):
            why = "the bias needs float32, so query, key and value are computed in it"
        layout = _layout(module, call, call.layout)
        return Plan(_name(module, call), layout, why, tuple(refused), module)
    why = "no kernel admits the call" if refused else "no table for this series of Ascend"
    return Plan("composed", call.layout, why, tuple(refused))


def _manual(call: Call, kernel: Kernel) -> Plan:
    module, why = OPERATORS[kernel.operator], "asked for by name"
    if module is laser and min(call.queries, call.keys) < laser.SHORTEST:
        # Vendor rule, so that the environment variable can be set for a whole script.
        module, why = fusion, "ascend_laser_attention is for lengths from 2048 on"
    reason = module.refusal(call)
    if reason is None and kernel.layout not in module.LAYOUTS:
        reason = f"layout {kernel.layout} is not one of {', '.join(module.LAYOUTS)}"
    if reason is None and _layout(module, call, kernel.layout) != kernel.layout:
        reason = f"N * D is too large for layout {kernel.layout}"
    if reason is not None:
        raise ParametersInvalid(
            f"op_type (or {OPERATOR_VARIABLE})",
            f"{kernel.operator} with layout {kernel.layout} on Ascend {call.series or 'unknown'}: "
            f"{reason}",
            "an operator and layout whose limits admit the call, or opt_mode='runtime' or 'static'",
        )
    return Plan(_name(module, call), kernel.layout, why, (), module)


def plan(call: Call, kernel: Kernel | None) -> Plan:
    """What happens to a call that has something to compute.

    Args:
        call: the call.
        kernel: what was asked for: None, a kernel by name, or MEASURED. The last is answered as
            None here; measuring needs tensors.

    Raises:
        ParametersInvalid: the kernel asked for by name is not for this call.
    """
    asked = None if _to_be_timed(kernel) else kernel
    if call.frozen:
        return _static(call) if asked is None else _manual(call, asked)
    key = (call, asked)
    found = _plans.get(key)
    if found is None:
        vendor.load()
        found = _static(call) if asked is None else _manual(call, asked)
        if len(_plans) >= PLANS:
            _plans.clear()
        _plans[key] = found
    return found


def _to_be_timed(kernel: Kernel | None) -> bool:
    # By value: while a call is traced, constants are not the objects they were.
    return kernel is not None and kernel.operator == MEASURED.operator


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the result is zeros or empty, for which no kernel is called."""
    return 0 in query.shape or 0 in key.shape or 0 in value.shape


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None,
    scale: float | None,
    head_first: bool,
    kernel: Kernel | None = None,
) -> Tensor:
    """Attention by a kernel whose documented limits admit the call, or composed.

    Args:
        query: [B, N, Sq, D], or [B, Sq, N, D] unless ``head_first``.
        key: [B, Nkv, Skv, D] likewise; N is a multiple of Nkv.
        value: [B, Nkv, Skv, Dv] likewise.
        mask: what is masked, or None.
        scale: factor on the scores; None is D ** -0.5.
        head_first: whether heads come before the sequence.
        kernel: None takes the first legal kernel, MEASURED the fastest, else the one named.

    Returns:
        Attention in the query's layout and dtype, or autocast's dtype; a transposed view where
        that saves a copy.

    Raises:
        ParametersInvalid: the kernel named is not for this call.
    """
    if torch.is_autocast_enabled("npu"):
        # It knows PyTorch's attention, and casts its arguments; of torch_npu's operators, none.
        dtype = torch.get_autocast_dtype("npu")
        with torch.autocast("npu", enabled=False):
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            return attention(query, key, value, _as(mask, dtype), scale, head_first, kernel)
    if _nothing(query, key, value):
        # Also D == 0, where every score is 0: then there is a value to average.
        if 0 in value.shape or 0 in query.shape[:3]:
            return query.new_zeros(*query.shape[:3], value.shape[-1])
        return native.attention_composed(query, key, value, mask, scale, head_first)
    call = describe(query, key, value, mask, scale, head_first)
    chosen = plan(call, kernel)
    if _to_be_timed(kernel) and not call.frozen and chosen.module is not None:
        chosen = _measured(call, query, key, value, mask)
    if chosen.module is None:
        return native.attention_composed(query, key, value, mask, scale, head_first)
    out: Tensor = chosen.module.launch(call, chosen.layout, query, key, value, mask)
    return out


def _as(mask: AttentionMask | None, dtype: torch.dtype) -> AttentionMask | None:
    """A mask whose bias, if any, is of another dtype."""
    if mask is None or mask.bias is None:
        return mask
    return mask._replace(bias=mask.bias.to(dtype))


def _measured(
    call: Call, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask | None
) -> Plan:
    """The plan of the fastest legal kernel, timed at the first call of its kind."""
    runs, refused = legal(call)
    if laser in (run.module for run in runs) and (
        call.queries != call.keys or call.keys < laser.AUTOMATIC
    ):
        runs = [run for run in runs if run.module is not laser]
        refused.append((laser.NAME, "not one long sequence attending to itself"))
    if len(runs) == 1:
        return _static(call)
    if not clock.ticks(query.device):
        return _static(call)._replace(reason="the static choice: this device has no clock")

    def time(run: _Run) -> float:
        return clock.milliseconds(
            query.device,
            lambda: run.module.launch(call, run.layout, query, key, value, mask),
        )

    chosen: Chosen[_Run] = _fastest.of(call, runs, time)
    refused += [(run.name, why) for run, why in chosen.dropped]
    if chosen.winner is None:
        return Plan("composed", call.layout, "every kernel failed", tuple(refused))
    module, layout = chosen.winner
    return Plan(_name(module, call), layout, "the fastest when timed", tuple(refused), module)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: AttentionMask | None = None,
    scale: float | None = None,
    head_first: bool = True,
    kernel: Kernel | None = None,
) -> Plan:
    """What :func:`attention` would do with these arguments, and why; nothing is computed.

    Args:
        query: as for :func:`attention`, and so are the others.
        key: likewise.
        value: likewise.
        mask: likewise.
        scale: likewise.
        head_first: likewise.
        kernel: likewise; for MEASURED the answer is the measured one if there is one already.
    """
    if _nothing(query, key, value):
        return Plan("none", "", "nothing to attend to")
    call = describe(query, key, value, mask, scale, head_first)
    found = plan(call, kernel)
    if _to_be_timed(kernel):
        chosen = _fastest.known(call)
        if chosen is not None and chosen.winner is not None:
            module, layout = chosen.winner
            dropped = tuple((run.name, why) for run, why in chosen.dropped)
            name = _name(module, call)
            return Plan(name, layout, "the fastest when timed", dropped, module)
    return found
