"""REINFORCE of a language model (Williams, 1992), and baselines without a critic.

    gradient = E[Σ_t ∇log π(a_t|s_t) (G_t − b)]          G_t = Σ_{k ≥ t} γ^(k−t) r_k, the reward to go

    none        b = 0
    batch-mean  b = the mean return of the batch; biased by the factor 1 − 1/B, which only changes the step size
    rloo        b = the mean of the prompt's other completions (Kool et al., 2019; Ahmadian et al., 2024,
                    arXiv:2402.14740); it does not depend on the completion itself, so the gradient is unbiased
    grpo        b = the mean of all of the prompt's completions; A is divided by their standard deviation
                    (Shao et al., 2024, arXiv:2402.03300), or the batch's, or by nothing (Dr. GRPO, arXiv:2503.20783)
    learned     b = V(s_t), a critic regressed on G_t (Williams, 1992; Sutton et al., 2000)

The loss is −r A (`Algorithm.policy_loss`), with r the probability ratio to the policy that sampled: at r = 1 its
gradient is that of −A log π. In later mini-batches of a step, r corrects for the policy having moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.algorithms.algorithm import Algorithm
from fastppo.algorithms.config import ReinforceConfig
from fastppo.algorithms.experience import Experience
from fastppo.ops.gae import gae


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


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = Σ_{k ≥ t} γ^(k−t) r_k, [B, T] from rewards [B, T] and mask [B, T]: GAE with λ = 1 and no values."""
    return gae(rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0, mask=mask).advantages


def subtract_baseline(
    returns: Tensor, mask: Tensor, groups: Tensor | None, baseline: str, scale_rewards: str = "group"
) -> Tensor:
    """Advantages [B, T]: rewards to go, minus a baseline of whole completions' returns.

    With one reward at the end and γ = 1 all tokens of a completion have the same advantage, as in the papers.
    Statistics are float64, so that completions with equal returns get an advantage of exactly 0: in float32 it would be
    rounding divided by a standard deviation of rounding.

    Args:
        returns: [B, T] rewards to go; a completion's first is its return.
        mask: [B, T] bool.
        groups: [B] int64, equal for completions of the same prompt; needed for rloo and grpo.
        baseline: none, batch-mean, rloo or grpo.
        scale_rewards: with grpo, divide by the standard deviation of the `group` or `batch`, or by nothing (`none`).

    Raises:
        ValueError: no groups, or rloo with a group of one.
    """
    if baseline == "none":
        return returns
    if baseline in ("rloo", "grpo") and groups is None:
        raise ValueError(f"groups: needed for the baseline {baseline}")
    whole, whole_batch = returns[:, 0].double(), torch.zeros(len(returns), dtype=torch.int64, device=returns.device)
    total, count = _sums(whole, whole_batch if baseline == "batch-mean" else groups)
    if baseline == "rloo":
        if (count < 2).any():
            raise ValueError("groups: leave-one-out needs at least two completions of every prompt")
        average = (total - whole) / (count - 1)
    else:
        average = total / count
    advantages = returns.double() - average[:, None]
    if baseline == "grpo" and scale_rewards != "none":
        deviation = standard_deviation(whole, groups if scale_rewards == "group" else whole_batch)
        advantages = advantages / (deviation + 1e-6)[:, None]
    return advantages.to(returns.dtype).masked_fill(~mask, 0.0)


def standard_deviation(returns: Tensor, groups: Tensor) -> Tensor:
    """[B] float64: that of each member's group, unbiased as in GRPO's implementations; 0 for a group of one."""
    total, count = _sums(returns, groups)
    squares, _ = _sums((returns - total / count).square(), groups)
    return (squares / (count - 1).clamp(min=1)).sqrt()


def _sums(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """[B] each, of x [B] float64: the sum over each member's group, and the group's size."""
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    return x.new_zeros(len(counts)).index_add(0, index, x)[index], counts[index]
