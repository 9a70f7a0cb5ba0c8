"""What a user asks for with ``sparse=``: plain data, checked, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from mindiesd.errors import ParametersInvalid

STRATEGIES = ("rf_v2", "ada_bsa")
_ALLOWED = "None, SparseOptions, a mapping of its fields, or a text like 'rf_v2:0.75'"


@dataclass(frozen=True, kw_only=True)
class SparseOptions:
    """Sparse attention for the long self-attentions of video models: an approximation.

    Attributes:
        strategy: ``"rf_v2"`` (RainFusion) or ``"ada_bsa"`` (adaptive block sparse).
        sparsity: share of the key blocks that each query block drops, over 0, up to 1.
        cdf_threshold: ada_bsa: share of the estimated attention that is enough, in [0, 1].
        protect_first_frame: rf_v2: keep the blocks of the first frame on top of the share.
        first_steps: denoising steps at the beginning that stay dense.
        last_steps: denoising steps at the end that stay dense; needs ``steps``.
        steps: denoising steps in all, needed to know which are the last.
        first_layers: layers at the beginning of each forward that stay dense.
        last_layers: layers at the end of each forward that stay dense.
        min_sequence: shorter sequences stay dense; estimating costs more than it saves there.
    """

    strategy: str = "rf_v2"
    sparsity: float = 0.75
    cdf_threshold: float = 1.0
    protect_first_frame: bool = False
    first_steps: int = 0
    last_steps: int = 0
    steps: int | None = None
    first_layers: int = 0
    last_layers: int = 0
    min_sequence: int = 4096

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ParametersInvalid: one is not allowed.
        """
        if self.strategy not in STRATEGIES:
            _refuse("strategy", self.strategy, " or ".join(map(repr, STRATEGIES)))
        if not _is_number(self.sparsity) or not 0 < self.sparsity <= 1:
            _refuse("sparsity", self.sparsity, "a number over 0, up to 1")
        if not _is_number(self.cdf_threshold) or not 0 <= self.cdf_threshold <= 1:
            _refuse("cdf_threshold", self.cdf_threshold, "a number from 0 to 1")
        flag: Any = self.protect_first_frame
        if type(flag) is not bool:
            _refuse("protect_first_frame", self.protect_first_frame, "True or False")
        for name in ("first_steps", "last_steps", "first_layers", "last_layers", "min_sequence"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                _refuse(name, getattr(self, name), "a whole number, 0 or more")
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            _refuse("steps", self.steps, "None or a whole number, 1 or more")
        if self.last_steps and self.steps is None:
            _refuse("steps", None, "the number of all steps, since last_steps is given")

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data."""
        return asdict(self)


def read(value: object) -> SparseOptions | None:
    """The options that a user's ``sparse=`` means.

    Args:
        value: None; SparseOptions; a mapping of their fields; or ``"strategy"``,
            ``"strategy:sparsity"``.

    Raises:
        ParametersInvalid: it means none.
    """
    if value is None or isinstance(value, SparseOptions):
        return value
    if isinstance(value, str):
        strategy, colon, share = value.partition(":")
        given: dict[str, Any] = {"strategy": strategy.strip()}
        if colon:
            try:
                given["sparsity"] = float(share)
            except ValueError:
                raise ParametersInvalid("sparse", value, _ALLOWED) from None
        return SparseOptions(**given)
    if isinstance(value, Mapping):
        known = [field.name for field in fields(SparseOptions)]
        for name in value:
            if name not in known:
                raise ParametersInvalid("sparse", f"a field {name!r}", "of " + ", ".join(known))
        return SparseOptions(**value)
    raise ParametersInvalid("sparse", value, _ALLOWED)


def _refuse(name: str, received: object, allowed: str) -> None:
    raise ParametersInvalid(f"sparse.{name}", received, allowed)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)
