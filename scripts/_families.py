"""What each family of patches saves, and what the rest is: writes docs/families.md.

    .venv-npu/bin/python scripts/_families.py [--every 4] [--write docs/families.md]

Launches of one forward of diffusers' transformers (tiny, float32, emulated NPU), with every patch
and with every patch but those of one family. Savings overlap where families share a function, and
do not add up to the whole.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from _coverage import versions  # noqa: E402 - needs the path

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "convolution", "conv")
MOVES = (
    "copy",
    "clone",
    "cat",
    "contiguous",
    "cast",
    "stack",
    "repeat",
    "fill",
    "zero",
    "constant",
)


def kind(operator: str) -> str:
    """What a launch is, in words."""
    namespace, _, name = operator.partition("::")
    base = name.partition(".")[0].strip("_")
    if any(word in base for word in MOVES):
        return "copies, joins and casts"
    if any(base == word or base.startswith(f"{word}_") or word in base for word in PRODUCTS):
        return "matrix products and convolutions"
    if namespace == "npu" or "norm" in base or "attention" in base:
        return "fused kernels (attention, norms, rotary embeddings, GELU)"
    return "single arithmetic operations"


@dataclass
class Subject:
    """A model on the device, and its inputs."""

    name: str
    model: Any
    inputs: Any

    def launches(self) -> Counter[str]:
        """Of its second forward: what is made from parameters is made once."""
        import torch

        from mindiesd.emulator import trace

        with torch.no_grad():
            self.model(**self.inputs)
            with trace() as counted:
                self.model(**self.inputs)
        return Counter(counted.launches)


def subjects(every: int) -> list[Subject]:
    """Every so many-th of the transformers."""
    from mindiesd.emulator import start

    start()
    from tests.emulator.tiny_models import (
        audio,
        images,
        images_more,
        images_recent,
        move,
        videos,
        videos_recent,
    )

    tiny = [
        (name, model)
        for group in (images, images_more, images_recent, videos, videos_recent, audio)
        for name, model in group.MODELS.items()
    ]
    return [
        Subject(
            name,
            model.build().to("npu"),
            move(model.make_inputs(), lambda tensor: tensor.to("npu")),
        )
        for name, model in tiny[::every]
    ]


def total(found: list[Subject], **options: Any) -> Counter[str]:
    """Launches of all of them with patches."""
    import mindiesd

    mindiesd.patch_all(**options)
    try:
        counted: Counter[str] = Counter()
        for subject in found:
            counted += subject.launches()
        return counted
    finally:
        mindiesd.unpatch_all()


def page(every: int) -> str:
    """The page."""
    from mindiesd.patches import registry

    found = subjects(every)
    before: Counter[str] = Counter()
    for subject in found:
        before += subject.launches()
    patched = total(found)
    rows = []
    for family in dict.fromkeys(record.family for record in registry.records()):
        saved = total(found, skip=(family,)).total() - patched.total()
        if saved:
            rows.append((saved, family))
        print(f"{family}: {saved}", file=sys.stderr, flush=True)
    rows.sort(reverse=True)
    saving = "\n".join(
        f"| {family} | {saved} | {saved / before.total():.1%} |" for saved, family in rows
    )
    kinds = list(dict.fromkeys(map(kind, sorted(before))))
    sums = {
        when: Counter({k: sum(n for op, n in counts.items() if kind(op) == k) for k in kinds})
        for when, counts in (("before", before), ("after", patched))
    }
    rest = "\n".join(
        f"| {k} | {sums['before'][k]} | {sums['after'][k]} | "
        f"{sums['after'][k] / patched.total():.0%} |"
        for k in sorted(kinds, key=lambda k: -sums["after"][k])
    )
    most = "\n".join(f"| `{operator}` | {count} |" for operator, count in patched.most_common(12))
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"""# What each family of patches saves

Launches of one forward on the emulated NPU, summed over {len(found)} of diffusers' transformers
(tiny, float32: {", ".join(subject.name for subject in found)}). Counts, not times.

Made by `.venv-npu/bin/python scripts/_families.py --every {every} --write docs/families.md`
with {made}.

{before.total()} launches unpatched, {patched.total()} with every patch
({patched.total() / before.total():.1%}).

## Without one family

How many launches more there are if everything but this family is patched. Families that share a
function take over from each other, so these do not add up to the whole. A family below zero
launches more than what it replaces, and is there for another reason: attention that a model writes
out as products and a softmax makes score matrices of S x S, which a fused kernel does not, but with
a mask that kernel needs the mask prepared.

| family | saves | of unpatched |
|---|---|---|
{saving}

## What the rest is

| launches | unpatched | patched | of the rest |
|---|---|---|---|
{rest}

The most frequent of them, patched:

| operator | launches |
|---|---|
{most}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="take every so many-th model")
    parser.add_argument("--write", type=Path, help="also write the page to this file")
    options = parser.parse_args()
    text = page(options.every)
    print(text)
    if options.write:
        options.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
