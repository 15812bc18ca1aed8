"""REINFORCE of a language model (Williams, 1992), with a choice of baselines.

    gradient = E[Σ_t ∇log π(y_t | s_t) · (G_t − b)]        G_t = Σ_{k ≥ t} γ^(k−t) r_k, the reward to go

    none        b = 0
    batch-mean  b = the mean return of the batch; biased by 1 − 1/B, which is a change of step size
    rloo        b = the mean of the prompt's other completions (Ahmadian et al., 2024, arXiv:2402.14740)
    grpo        b = the mean of all of the prompt's completions, and divided by their deviation (arXiv:2402.03300)
    learned     b = V(s_t), a critic regressed on G_t (Williams, 1992; Sutton et al., 2000)

The loss is −r A with the probability ratio r to the policy that sampled, whose gradient at r = 1 is that of −A log π.
With several mini-batches in a step it corrects for the policy having moved, by importance weights.
"""

from __future__ import annotations

from torch import Tensor

from fastppo.algorithms.algorithm import Algorithm, Head, StepOutput
from fastppo.algorithms.baselines import reward_to_go, subtract_baseline
from fastppo.algorithms.experience import Experience


class Reinforce(Algorithm):
    """See `fastppo.training.config.ReinforceConfig` for its options."""

    @property
    def needs_values(self) -> bool:
        """Only the learned baseline is a critic's."""
        return self.config.baseline == "learned"

    @property
    def normalizes_advantages(self) -> bool:
        return self.config.baseline == "grpo" and self.config.scale_rewards != "none"

    def advantages_and_returns(
        self, rewards: Tensor, values: Tensor | None, experience: Experience
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T] reward to go less its baseline, and what a critic is regressed on."""
        returns = reward_to_go(rewards, experience.mask, self.config.gamma)
        if self.config.baseline == "learned":
            return (returns - values).masked_fill(~experience.mask, 0.0), returns
        return subtract_baseline(
            returns,
            experience.mask,
            experience.groups,
            baseline=self.config.baseline,
            scale_rewards=self.config.scale_rewards,
        ), None

    def loss(
        self, batch: Experience, hidden: Tensor, head: Head, values: Tensor | None, ref_head: Head | None
    ) -> StepOutput:
        """−r A, plus the critic's regression; see `Algorithm.loss` for the arguments."""
        loss, metrics = self.policy_gradient_loss(batch, hidden, head, ref_head)
        if values is None:
            return StepOutput(loss, metrics)
        critic = self.value_loss(batch, values)
        return StepOutput(loss + self.config.vf_coef * critic.loss, metrics | critic.metrics)
