"""How many pictures are right, how sure that is, and whether two columns differ."""

from __future__ import annotations

from math import comb, sqrt
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054  # the 97.5 % point of the normal distribution
SIGNIFICANT = 0.05


def wilson(right: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share, after Wilson (1927): it fits small numbers and shares near 1.

    Args:
        right: how many of them.
        of: how many there are, at least 1.
    """
    share, weight = right / of, _Z * _Z / of
    middle = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * sqrt(share * (1 - share) / of + weight / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


class Paired(NamedTuple):
    """Two columns drawn from the same seeds, picture by picture.

    Attributes:
        lost: pictures that are right in the first only.
        won: pictures that are right in the second only.
        same: pictures that are read as the same digit, right or wrong.
        of: how many pictures.
        p: McNemar's exact test, two-sided: how likely a split of ``lost`` and ``won`` at least as
            uneven is if neither column is better.
    """

    lost: int
    won: int
    same: int
    of: int
    p: float

    @property
    def within_noise(self) -> bool:
        """Whether chance explains the difference, at the level of 5 %."""
        return self.p >= SIGNIFICANT


def paired(first: np.ndarray, second: np.ndarray, truth: np.ndarray) -> Paired:
    """Compare what was read in two columns.

    Args:
        first: [N] digits read in the column to compare with.
        second: [N] digits read in the other, from the same seeds.
        truth: [N] digits that the prompts asked for.
    """
    one, other = first == truth, second == truth
    lost, won = int((one & ~other).sum()), int((~one & other).sum())
    return Paired(lost, won, int((first == second).sum()), len(truth), _mcnemar(lost, won))


def _mcnemar(lost: int, won: int) -> float:
    changed = lost + won
    tail = sum(comb(changed, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**changed)
