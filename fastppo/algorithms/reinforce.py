"""REINFORCE of a language model (Williams, 1992), with a choice of baselines.

    gradient = E[Σ_t ∇log π(a_t|s_t) (G_t − b)]          G_t = Σ_{k ≥ t} γ^(k−t) r_k, the reward to go

    none        b = 0
    batch-mean  b = the mean return of the batch; biased by the factor 1 − 1/B, which only changes the step size
    rloo        b = the mean of the prompt's other completions (Ahmadian et al., 2024, arXiv:2402.14740)
    grpo        b = the mean of all of the prompt's completions; A is divided by their standard deviation
                    (Shao et al., 2024, arXiv:2402.03300)
    learned     b = V(s_t), a critic regressed on G_t (Williams, 1992; Sutton et al., 2000)

The loss is −r A (`Algorithm.loss`), with r the probability ratio to the policy that sampled: at r = 1 its gradient is
that of −A log π. In later mini-batches of a step, r corrects for the policy having moved.
"""

from __future__ import annotations

from torch import Tensor

from fastppo.algorithms.algorithm import Algorithm
from fastppo.algorithms.baselines import reward_to_go, subtract_baseline
from fastppo.algorithms.config import ReinforceConfig
from fastppo.algorithms.experience import Experience


class Reinforce(Algorithm):
    """REINFORCE: one epoch of −r (G − b) on each rollout."""

    config: ReinforceConfig

    @property
    def needs_values(self) -> bool:
        """Only the learned baseline is a critic."""
        return self.config.baseline == "learned"

    @property
    def normalizes_advantages(self) -> bool:
        return self.config.baseline == "grpo" and self.config.scale_rewards != "none"

    def advantages_and_returns(
        self, rewards: Tensor, values: Tensor | None, experience: Experience
    ) -> tuple[Tensor, Tensor | None]:
        """G − b [B, T], and the critic's targets G where the baseline is learned."""
        config, mask = self.config, experience.mask
        returns = reward_to_go(rewards, mask, config.gamma)
        if config.baseline == "learned":
            return (returns - values).masked_fill(~mask, 0.0), returns
        return subtract_baseline(returns, mask, experience.groups, config.baseline, config.scale_rewards), None
