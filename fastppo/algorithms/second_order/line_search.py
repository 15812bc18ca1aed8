"""Backtracking along a direction until the surrogate is better and the policy has not moved too far.

The last paragraph of appendix C of Schulman et al., 2015 (arXiv:1502.05477): start from the longest step and shrink it.
There it shrinks geometrically. Here it does so where the surrogate is no better; a step that is only too long, as every
second one is by a little, shrinks to where its own KL says that the bound lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

_MARGIN = 0.95  # of the length at which a quadratic KL would be exactly at its bound


class Trial(NamedTuple):
    """What a step would do."""

    improvement: float
    """Of the surrogate objective, over that at the start."""
    kl: float
    """Mean KL(π_old ‖ π) over the whole vocabulary, in nats a token."""


class Step(NamedTuple):
    """A step that was accepted."""

    fraction: float
    """Of the full step."""
    trial: Trial
    trials: int


def backtrack(
    evaluate: Callable[[float], Trial],
    *,
    max_kl: float,
    expected_improvement: float,
    accept_ratio: float = 0.1,
    shrink: float = 0.5,
    max_trials: int = 10,
) -> Step | None:
    """The first of a falling sequence of fractions, from 1, whose step is good enough, or None.

    Args:
        evaluate: fraction -> Trial.
        max_kl: the step's KL may not pass it. A NaN in either number is a step that is not good.
        expected_improvement: of the full step, to first order: gᵀs.
        accept_ratio: the least share of what was expected of a fraction that it must bring (Armijo's condition).
        shrink: from one fraction to the next where the improvement is too small, from 0 to 1.
        max_trials: after which the search has failed.
    """
    fraction = 1.0
    for count in range(1, max_trials + 1):
        trial = evaluate(fraction)
        better = trial.improvement > 0.0 and trial.improvement >= accept_ratio * fraction * expected_improvement
        if better and trial.kl <= max_kl:
            return Step(fraction, trial, count)
        too_long = better and math.isfinite(trial.kl)
        fraction *= _MARGIN * math.sqrt(max_kl / trial.kl) if too_long else shrink
    return None
