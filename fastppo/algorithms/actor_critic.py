"""Advantage actor-critic of a language model (Sutton et al., 2000; A2C: Mnih et al., 2016, arXiv:1602.01783).

    A_t = Σ_{k < n} γ^k r_{t+k} + γ^n V(s_{t+n}) − V(s_t)        n_steps = n; 1 is the TD error
    A_t = Σ_l (γ λ)^l δ_{t+l}                                     GAE, if n_steps is not given (arXiv:1506.02438)

    loss = −r A + vf_coef · ½ (V(s_t) − R_t)²                     `Algorithm.loss`, with R_t = A_t + V(s_t) held fixed

`optim.value_learning_rate` is the critic's own rate, the faster of two time scales (Konda & Tsitsiklis, 2000).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.algorithms.algorithm import Algorithm
from fastppo.algorithms.config import ActorCriticConfig
from fastppo.algorithms.experience import Experience
from fastppo.ops.gae import gae


class ActorCritic(Algorithm):
    """Advantage actor-critic: one epoch of −r A + vf_coef · ½ (V − R)² on each rollout."""

    config: ActorCriticConfig

    def advantages_and_returns(self, rewards: Tensor, values: Tensor, experience: Experience) -> tuple[Tensor, Tensor]:
        """n-step or generalized advantages [B, T], and the critic's targets A + V [B, T]."""
        config, mask = self.config, experience.mask
        if config.n_steps is None:
            return gae(rewards, values, gamma=config.gamma, lam=config.lam, mask=mask)
        advantages = n_step_advantages(rewards, values, mask, config.gamma, config.n_steps)
        return advantages, (advantages + values).masked_fill(~mask, 0.0)


def n_step_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, n_steps: int) -> Tensor:
    """Σ_{k < n} γ^k r_{t+k} + γ^n V(s_{t+n}) − V(s_t), [B, T]; nothing follows a completion's last token.

    Args:
        rewards, values: [B, T], 0 on padding, which is on the right.
        mask: [B, T] bool.
    """
    length = rewards.shape[1]
    n_steps = min(n_steps, length)  # beyond the end everything is 0
    later = F.pad(torch.stack([rewards, values]), (0, n_steps))  # [2, B, T + n]
    total = sum(gamma**k * later[0, :, k : k + length] for k in range(n_steps))
    total = total + gamma**n_steps * later[1, :, n_steps : n_steps + length]
    return (total - values).masked_fill(~mask, 0.0)
