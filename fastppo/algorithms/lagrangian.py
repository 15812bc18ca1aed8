"""Constraints: keep a reward's mean above a threshold by the multiplier that makes doing so worth it.

    maximize E[R]  subject to  E[C] ≥ d       →       max over the policy, min over λ ≥ 0, of  E[R] + λ (E[C] − d)

The policy climbs R + λ C; after each batch λ descends its own side of the game (Altman, 1999; as in PPO-Lagrangian, Ray
et al., 2019, and Safe RLHF, Dai et al., 2024, arXiv:2310.12773).
"""

from __future__ import annotations


class LagrangeMultiplier:
    """λ ← max(0, λ + learning_rate · (threshold − mean)).

    Args:
        value: where λ starts, at least 0.
        threshold: d, what the mean shall not be below.
        learning_rate: of the dual ascent.
    """

    def __init__(self, value: float, threshold: float, learning_rate: float) -> None:
        if not value >= 0:
            raise ValueError(f"value: a multiplier is at least 0, got {value}")
        self.value, self.threshold, self.learning_rate = value, threshold, learning_rate

    def update(self, mean: float) -> None:
        """Rise while the constraint is violated, fall while it is not."""
        self.value = max(0.0, self.value + self.learning_rate * (self.threshold - mean))

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]
