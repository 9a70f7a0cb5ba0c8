"""A redirected function beside its original, without installing anything."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch

from mindiesd.patches import law
from mindiesd.patches.registry import select
from mindiesd.patches.scope import Site

RECORDS = {record.name: record for record in select("rope")}


class Pair:
    """An original and its replacement, in force, with nothing installed."""

    def __init__(self, name: str, **changes: Any) -> None:
        record = RECORDS[name]
        self.original = getattr(importlib.import_module(record.module), record.attribute)
        self.site = Site(name)
        self.site.everywhere = True
        self.site.arm()
        module, _, attribute = record.build.partition(":")
        build = getattr(importlib.import_module(module), attribute)
        self.family = replace(build, **changes) if changes else build
        self.ours = self.family(self.original, self.site)
        law.dress(self.ours, self.original, record.module, record.attribute)

    def counts(self) -> tuple[int, int, dict[str, int]]:
        return self.site._own.snapshot()


PAIRS: dict[str, Pair] = {}


def pair(name: str) -> Pair:
    if name not in PAIRS:
        PAIRS[name] = Pair(name)
    return PAIRS[name]


def listed(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, tuple) else [result]
