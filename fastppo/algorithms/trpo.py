"""Trust region policy optimization (Schulman et al., 2015, arXiv:1502.05477).

    maximize L(θ) = E[π(a|s) / π_old(a|s) · A]   subject to   E_s[KL(π_old(·|s) ‖ π(·|s))] ≤ δ            (eq. 14)

    1. the natural gradient's step, whose KL is δ to second order: `NaturalPolicyGradient`                (appendix C)
    2. a line search: shrink the step until L has risen and the KL is at most δ                           (appendix C)

L and the KL are measured, the KL over the whole vocabulary at every sampled state. If every step length fails, the
parameters are unchanged, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fastppo.algorithms.config import TRPOConfig
from fastppo.algorithms.npg import NaturalPolicyGradient, Trial

_MARGIN = 0.95  # of the length at which a quadratic KL would be exactly at its bound


class TRPO(NaturalPolicyGradient):
    """The natural gradient's step with a line search, so that no step's KL exceeds `max_kl`."""

    config: TRPOConfig

    def choose(self, evaluate: Callable[[float], Trial], expected_improvement: float) -> tuple[float, Trial]:
        """The line search: the first of a decreasing sequence of fractions whose step is accepted; 0 if none is.

        The paper shrinks the step geometrically. Here a step that improves L and is only too long, as every second one
        is by a little, shrinks to the length at which its own KL puts the bound. A NaN in a trial is never accepted.
        """
        config, fraction = self.config, 1.0
        for _ in range(config.line_search_steps):
            trial = evaluate(fraction)
            needed = config.accept_ratio * fraction * expected_improvement  # Armijo's condition
            better = trial.improvement > 0.0 and trial.improvement >= needed
            if better and trial.kl <= config.max_kl:
                return fraction, trial
            too_long = better and math.isfinite(trial.kl)
            fraction *= _MARGIN * math.sqrt(config.max_kl / trial.kl) if too_long else config.line_search_shrink
        return 0.0, Trial(0.0, 0.0)
