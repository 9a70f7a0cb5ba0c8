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
