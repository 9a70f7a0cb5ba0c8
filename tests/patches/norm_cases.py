"""The RMS-norm classes under test, and what each must compute, from its model's own description."""

from __future__ import annotations

import importlib

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Weights stored around zero.
CENTRED = {
    "Krea2RMSNorm",
    "QwenImage21ZeroCenterRMSNorm",
    "GemmaRMSNorm",
    "Gemma2RMSNorm",
    "Gemma3RMSNorm",
    "Qwen3_5RMSNorm",
    "T5GemmaRMSNorm",
    "T5Gemma2RMSNorm",
}


def make(record, dim: int, dtype: torch.dtype) -> torch.nn.Module:
    """An instance of a record's class with random weights."""
    owner = getattr(importlib.import_module(record.module), record.attribute.split(".")[0])
    module = owner(dim, eps=1e-6)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module.to(dtype)


def unpatched(module: torch.nn.Module):
    """The forward that the class had, patched or not."""
    function = type(module).forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def oracle(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The norm in float64, from the formula."""
    weight = next(module.parameters(), None)
    eps = getattr(module, "eps", None) or module.variance_epsilon
    x = x.double()
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        gain = weight.detach().double()
        y = y * (1 + gain if type(module).__name__ in CENTRED else gain)
    return y


def changes(module: torch.nn.Module):
    """Everything that may happen to a weight between two calls."""
    weight = next(module.parameters())
    shape = weight.shape

    def step() -> None:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        weight.grad = torch.randn(shape, dtype=weight.dtype, device=weight.device)
        optimizer.step()

    def fuse() -> None:  # as peft merges a LoRA
        weight.data += torch.randn(shape, dtype=weight.dtype, device=weight.device)

    def swap() -> None:
        weight.data = torch.randn(shape, dtype=weight.dtype, device=weight.device)

    def swap_back_and_forth() -> None:
        kept = weight.data
        weight.data = torch.zeros_like(kept)
        weight.data = kept.mul_(3)

    def load() -> None:
        state = {key: torch.randn_like(value) for key, value in module.state_dict().items()}
        module.load_state_dict(state)

    def assign() -> None:
        state = {key: torch.randn_like(value) for key, value in module.state_dict().items()}
        module.load_state_dict(state, assign=True)

    @torch.no_grad()
    def in_place() -> None:
        weight.mul_(2)

    def through_a_view() -> None:
        weight.detach()[:3] = 7

    def behind_its_back() -> None:
        weight.data.add_(1)

    def cast() -> None:
        module.to(torch.bfloat16)

    def cast_back() -> None:
        module.to(torch.float32)

    return (
        step, fuse, swap, swap_back_and_forth, load, in_place, through_a_view, behind_its_back,
        cast, fuse, behind_its_back, cast_back, assign,
    )  # fmt: skip
