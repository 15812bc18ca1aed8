"""Advantage actor-critic of a language model (Sutton et al., 2000; A2C: Mnih et al., 2016, arXiv:1602.01783).

    A_t = Σ_{k < n} γ^k r_{t+k} + γ^n V(s_{t+n}) − V(s_t)        n_steps: 1 is the one-step TD error
    A_t = Σ_l (γ λ)^l δ_{t+l}                                     GAE, where n_steps is not given

    actor  −r A, unclipped          critic  ½ (V(s_t) − (A_t + V(s_t)))², the target held fixed

`optim.value_learning_rate` is the critic's own rate: of two time scales, the faster (Konda & Tsitsiklis, 2000).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.algorithms.algorithm import Algorithm, Head, StepOutput
from fastppo.algorithms.experience import Experience


class ActorCritic(Algorithm):
    """See `fastppo.training.config.ActorCriticConfig` for its options."""

    def advantages_and_returns(
        self, rewards: Tensor, values: Tensor | None, experience: Experience
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T] each: n-step or generalized advantages, and the critic's targets."""
        if self.config.n_steps is None:
            return super().advantages_and_returns(rewards, values, experience)
        advantages = n_step_advantages(rewards, values, experience.mask, self.config.gamma, self.config.n_steps)
        return advantages, (advantages + values).masked_fill(~experience.mask, 0.0)

    def loss(
        self, batch: Experience, hidden: Tensor, head: Head, values: Tensor | None, ref_head: Head | None
    ) -> StepOutput:
        """−r A + vf_coef · value loss; see `Algorithm.loss` for the arguments."""
        loss, metrics = self.policy_gradient_loss(batch, hidden, head, ref_head)
        critic = self.value_loss(batch, values)
        return StepOutput(loss + self.config.vf_coef * critic.loss, metrics | critic.metrics)


def n_step_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, n_steps: int) -> Tensor:
    """Σ_{k < n} γ^k r_{t+k} + γ^n V(s_{t+n}) − V(s_t), [B, T]; nothing follows a completion's last token.

    Args:
        rewards, values: [B, T], 0 on padding, which is on the right.
        mask: [B, T] bool.
    """
    length = rewards.shape[1]
    n_steps = min(n_steps, length)  # further ahead there is nothing
    later = F.pad(torch.stack([rewards, values]), (0, n_steps))  # [2, B, T + n]
    total = sum(gamma**k * later[0, :, k : k + length] for k in range(n_steps))
    total = total + gamma**n_steps * later[1, :, n_steps : n_steps + length]
    return (total - values).masked_fill(~mask, 0.0)
