"""Constraints: keep a reward's mean above a threshold by a Lagrange multiplier.

    maximize E[R]  subject to  E[C] ≥ d       →       max over the policy, min over λ ≥ 0, of  E[R] + λ (E[C] − d)

The policy maximizes R + λ C; λ is updated after each batch (Altman, 1999; PPO-Lagrangian: Ray et al., 2019; Safe RLHF:
Dai et al., 2024, arXiv:2310.12773).
"""

from __future__ import annotations

import math

from fastppo.ops.checks import NonFiniteValue


class LagrangeMultiplier:
    """λ, from `value` (at least 0) on, for the constraint that a mean is at least `threshold`."""

    def __init__(self, value: float, threshold: float, learning_rate: float) -> None:
        if not value >= 0:
            raise ValueError(f"value: a multiplier is at least 0, got {value}")
        self.value, self.threshold, self.learning_rate = value, threshold, learning_rate

    def update(self, mean: float) -> None:
        """λ ← max(0, λ + learning_rate · (threshold − mean))."""
        value = self.value + self.learning_rate * (self.threshold - mean)
        if not math.isfinite(value):
            raise NonFiniteValue(f"multiplier: {value} after {self.value:.4g}, at a mean of {mean:.4g}")
        self.value = max(0.0, value)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]
