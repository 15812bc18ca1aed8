"""Algorithms whose policy does not move by the optimizer that fits the critic: the policy first, then the critic."""

from __future__ import annotations

from fastppo.algorithms.algorithm import Algorithm, Learner
from fastppo.algorithms.experience import Experience


class PolicyThenCritic(Algorithm):
    """A subclass says how the policy improves; the critic is fit by first-order epochs of its own."""

    def update(self, learner: Learner, experience: Experience) -> dict[str, float]:
        metrics = self.improve_policy(learner, experience)
        return metrics | learner.descend_values(
            experience,
            self.value_loss,
            num_epochs=self.config.num_value_epochs,
            num_mini_batches=self.config.num_mini_batches,
        )

    def improve_policy(self, learner: Learner, experience: Experience) -> dict[str, float]:
        """Move the policy alone; returns metrics."""
        raise NotImplementedError
