"""What each launch of the emulated device would cost: bytes, FLOPs, and a lower bound of its time.

Launches and bytes are the trace's. FLOPs are counted for matrix products, convolutions and
attention, two for each multiplication with its addition: torch's formulas
(torch.utils.flop_counter) where it has one, else those below. Everything else is taken to be
limited by memory.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mindiesd.emulator import record
from mindiesd.emulator.ops.layout import heads_of, to_bnsd
from mindiesd.emulator.trace import Trace

KINDS = (
    "matmul",
    "convolution",
    "attention",
    "norm",
    "rope",
    "softmax",
    "activation",
    "copies",
    "elementwise",
)

# Part of an operator's name -> its kind; the first that fits.
_BY_NAME = (
    ("upsample", "elementwise"),
    ("attention", "attention"),
    ("conv", "convolution"),
    ("norm", "norm"),
    ("rotary", "rope"),
    ("rope", "rope"),
    ("softmax", "softmax"),
    ("gelu", "activation"),
    ("geglu", "activation"),
    ("glu", "activation"),
    ("silu", "activation"),
    ("copy", "copies"),
    ("clone", "copies"),
    ("cast", "copies"),
    ("index", "copies"),
    ("embedding", "copies"),
    ("linear", "matmul"),
    ("matmul", "matmul"),
)
_BY_BASE = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "dot", "mv"), "matmul"),
    **dict.fromkeys(("cat", "stack", "repeat", "flip", "roll", "gather"), "copies"),
}


def base_of(name: str) -> str:
    """``"addmm"`` of ``"aten::addmm.out"``."""
    return name.partition("::")[2].partition(".")[0]


def kind_of(name: str) -> str:
    """The kind of operation, out of :data:`KINDS`, that an operator is by its name."""
    base = base_of(name)
    if base in _BY_BASE:
        return _BY_BASE[base]
    return next((kind for part, kind in _BY_NAME if part in base), "elementwise")


def _bound(name: str, inputs: Any) -> dict[str, Any]:
    """The arguments of a launch by name, with the operator's defaults."""
    args, kwargs = inputs
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    operator = getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")
    arguments = operator._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    named = zip((argument.name for argument in arguments), args, strict=False)
    return {**defaults, **dict(named), **kwargs}


def _attention(name: str, inputs: Any) -> int:
    """2 B N Sq Skv (D + Dv), the mask left aside; packed sequences each by its own length."""
    given = _bound(name, inputs)
    layout = str(given.get("input_layout", "BSH")).upper().partition("_")[0]
    heads = next(given[key] for key in ("head_num", "num_heads", "num_query_heads") if key in given)
    query = to_bnsd(name, "query", given["query"], layout, heads)
    dim = query.shape[3]
    kv_heads = heads_of(given["key"], layout, dim)
    key = to_bnsd(name, "key", given["key"], layout, kv_heads)
    value = to_bnsd(name, "value", given["value"], layout, kv_heads)
    batch, _, rows, _ = query.shape
    pairs = batch * rows * key.shape[2]
    if layout in ("TND", "NTD"):
        ends = [
            [0, *map(int, given[side])]
            for sides in (
                ("actual_seq_qlen", "actual_seq_lengths"),
                ("actual_seq_kvlen", "actual_seq_lengths_kv"),
            )
            for side in sides
            if given.get(side) is not None
        ]
        sizes = [[b - a for a, b in pairwise(one)] for one in ends]
        pairs = sum(a * b for a, b in zip(*sizes, strict=True))
    return int(2 * heads * pairs * (dim + value.shape[3]))


def _convolution(name: str, inputs: Any, out: Tensor) -> int:
    """2 x elements of the result (transposed: of the input) x weights that each is a sum over."""
    given = _bound(name, inputs)
    weight = given["weight"]
    if given.get("transposed") or "transpose" in name:
        out = given["input"] if "input" in given else given["self"]
    return int(2 * out.numel() * math.prod(weight.shape[1:]))


def flops_of(name: str, inputs: Any, outputs: Any) -> int:
    """The FLOPs of one launch; 0 for the kinds that memory limits.

    Raises:
        NotImplementedError: of a kind that has FLOPs, but an operator that has no formula here.
    """
    kind, base = kind_of(name), base_of(name)
    if kind not in ("matmul", "convolution", "attention"):
        return 0
    out = outputs if isinstance(outputs, Tensor) else outputs[0]
    args, kwargs = inputs
    if kind == "attention":
        return _attention(name, inputs)
    if kind == "convolution":
        return _convolution(name, inputs, out)
    formula = flop_registry.get(getattr(torch.ops.aten, base, None))
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=out))
    if base in ("linear", "matmul", "dot", "mv"):
        return 2 * out.numel() * int(args[0].shape[-1])
    raise NotImplementedError(f"no formula for the FLOPs of {name}")


@dataclass(frozen=True)
class Device:
    """The figures of a device that the estimate needs.

    Attributes:
        flops: dense FLOP/s of its matrix units in half precision.
        bandwidth: bytes/s of its memory.
        memory: bytes of it.
        single: how much slower the matrix units are in float32.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    single: float


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        name: its operator.
        flops: of matrix products, convolutions and attention.
        bytes: of its arguments and results.
        written: of its results alone.
        hidden: of copies that CANN makes for it.
        single: whether it computes in float32.
    """

    name: str
    flops: int
    bytes: int
    written: int
    hidden: int
    single: bool

    def seconds(self, device: Device) -> float:
        """At least this long: the matrix units or the memory, whichever takes longer."""
        peak = device.flops / (device.single if self.single else 1)
        return max(self.flops / peak, self.bytes / device.bandwidth) + self.hidden_seconds(device)

    def hidden_seconds(self, device: Device) -> float:
        """The part of it that copies take."""
        return self.hidden / device.bandwidth


class Costs(Trace):
    """A trace that keeps what each launch would cost, in order."""

    def __init__(self) -> None:
        """Start with nothing counted."""
        super().__init__()
        self.each: list[Launch] = []

    def on_launch(self, name: str, inputs: Any, outputs: Any) -> None:
        """Count one kernel (called by the kernels)."""
        launches, read, written = self.total, self.bytes_read, self.bytes_written
        hidden = self.layout_copy_bytes
        super().on_launch(name, inputs, outputs)
        if self.total == launches:
            return
        written = self.bytes_written - written
        args = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 2 else inputs
        first = next((a for a in args if isinstance(a, Tensor)), None)
        self.each.append(
            Launch(
                name=name,
                flops=flops_of(name, inputs, outputs),
                bytes=self.bytes_read - read + written,
                written=written,
                hidden=self.layout_copy_bytes - hidden,
                single=first is not None and first.dtype == torch.float32,
            )
        )

    @property
    def flops(self) -> int:
        """All FLOPs."""
        return sum(launch.flops for launch in self.each)

    @property
    def bytes(self) -> int:
        """All bytes, the hidden copies' included."""
        return sum(launch.bytes + launch.hidden for launch in self.each)

    def seconds(self, device: Device, overhead: float = 0.0) -> float:
        """At least this long.

        Args:
            device: its figures.
            overhead: seconds that each launch costs on top.
        """
        return sum(launch.seconds(device) for launch in self.each) + overhead * len(self.each)

    def by_kind(self, device: Device) -> dict[str, float]:
        """Seconds of each kind of operation; hidden copies are copies."""
        found = dict.fromkeys(KINDS, 0.0)
        for launch in self.each:
            hidden = launch.hidden_seconds(device)
            found[kind_of(launch.name)] += launch.seconds(device) - hidden
            found["copies"] += hidden
        return found


@contextmanager
def costing() -> Iterator[Costs]:
    """Keep what the launches in this block would cost."""
    counted = Costs()
    record.add(counted)
    try:
        yield counted
    finally:
        record.remove(counted)
