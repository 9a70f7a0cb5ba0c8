"""What a tiny model is, and what tests do with one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

randn = torch.randn


@dataclass(frozen=True)
class Tiny:
    """One model: how to build it and what to call it with."""

    cls: str | tuple[str, str]  # transformers: configuration and model
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    library: str = "diffusers"
    prepare: Callable[[Any], None] | None = None  # what a pipeline does to the model
    unset: tuple[str, ...] = ()  # parameters whose memory the class leaves as it was
    if_taken: dict[str, Any] = field(default_factory=dict)  # arguments that older versions need

    def build(self) -> torch.nn.Module:
        torch.manual_seed(0)
        if self.library == "transformers":
            import transformers

            config = getattr(transformers, self.cls[0])(**self.config)
            model = getattr(transformers, self.cls[1])(config)
        else:
            import diffusers

            model = getattr(diffusers, self.cls)(**self.config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # Gates and last layers that start as zero would hide everything behind them.
                if not parameter.any() or name.endswith(self.unset):
                    parameter.normal_(0, 0.1)
        if self.prepare is not None:
            self.prepare(model)
        return model.eval()

    def make_inputs(self) -> dict[str, Any]:
        torch.manual_seed(1)
        inputs = self.inputs()
        if self.if_taken:
            import diffusers

            known = inspect.signature(getattr(diffusers, self.cls).forward).parameters
            inputs |= {name: value for name, value in self.if_taken.items() if name in known}
        return inputs


def move(value: Any, to: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``to`` applied to every tensor in it."""
    if isinstance(value, torch.Tensor):
        return to(value)
    if isinstance(value, dict):
        return {key: move(item, to) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(move(item, to) for item in value)
    return value


def first_tensor(output: Any) -> torch.Tensor:
    """The first tensor of a model's output."""
    if isinstance(output, torch.Tensor):
        return output
    items = output.values() if isinstance(output, dict) else output
    return next(first_tensor(item) for item in items if item is not None)


@contextmanager
def without_torch_npu() -> Iterator[None]:
    """Let diffusers believe that there is no torch_npu, so that models run on the CPU as usual.

    With torch_npu importable, diffusers calls its operators on CPU tensors too.
    """
    # Imported in the block, they would leave out `import torch_npu` for good.
    import diffusers.models.transformers
    import diffusers.pipelines.pipeline_utils
    import diffusers.utils.import_utils

    real = diffusers.utils.import_utils.is_torch_npu_available

    def absent() -> bool:
        return False

    _swap_in_diffusers(real, absent)
    try:
        yield
    finally:
        # Modules that were first imported in the block took the stand-in by name.
        _swap_in_diffusers(absent, real)


def _swap_in_diffusers(old: Callable[[], bool], new: Callable[[], bool]) -> None:
    for name, module in [*sys.modules.items()]:
        if name.startswith("diffusers.") and vars(module).get("is_torch_npu_available") is old:
            vars(module)["is_torch_npu_available"] = new
