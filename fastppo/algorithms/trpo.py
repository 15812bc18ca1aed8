"""Trust region policy optimization (Schulman et al., 2015, arXiv:1502.05477).

    maximize L(θ)   subject to   KL(θ) = E_s [KL(π_old(·|s) ‖ π(·|s))] ≤ δ                               (eq. 14)

    the natural gradient's step of KL δ, as far as a quadratic model goes                               (appendix C)
    the first of ever shorter fractions of it at which L has really risen and the KL really is ≤ δ

Both are measured, the KL over the whole vocabulary at every sampled state. If no fraction will do, the parameters stay
what they were, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

from fastppo.algorithms.npg import NaturalPolicyGradient, NaturalStep
from fastppo.algorithms.second_order.line_search import Trial, backtrack


class TRPO(NaturalPolicyGradient):
    """See `fastppo.training.config.TRPOConfig` for its options."""

    def choose(self, evaluate: Callable[[float], Trial], step: NaturalStep) -> tuple[float, Trial]:
        """The line search."""
        found = backtrack(
            evaluate,
            max_kl=self.config.max_kl,
            expected_improvement=step.expected_improvement,
            accept_ratio=self.config.accept_ratio,
            shrink=self.config.line_search_shrink,
            max_trials=self.config.line_search_steps,
        )
        return (0.0, Trial(0.0, 0.0)) if found is None else (found.fraction, found.trial)
