"""Proximal policy optimization of a language model (Schulman et al., 2017, arXiv:1707.06347).

scores [B], kl [B, T]        ->  per-token rewards: −kl_coef · kl, and the score on the last token
rewards, values [B, T]       ->  GAE advantages and returns, advantages whitened over the batch
epochs of mini-batches       ->  clipped policy loss + vf_coef · clipped value loss
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from fastppo.algorithms.algorithm import Algorithm, Head, Learner, StepOutput
from fastppo.algorithms.baselines import reward_to_go, subtract_baseline
from fastppo.algorithms.experience import Experience


class PPO(Algorithm):
    """See `fastppo.training.config.PPOConfig` for its options."""

    @property
    def needs_values(self) -> bool:
        """Only GAE has a critic."""
        return self.config.adv_estimator == "gae"

    @property
    def whitens_advantages(self) -> bool:
        """If it is not said, as the papers have it."""
        config = self.config
        if config.whiten_advantages is not None:
            return config.whiten_advantages
        by_objective = config.multi_objective_aggregation == "normalize_then_sum"
        return by_objective or config.adv_estimator in ("gae", "reinforce_plus_plus")

    @property
    def normalizes_advantages(self) -> bool:
        return self.config.adv_estimator == "grpo" and self.config.scale_rewards != "none"

    def advantages_and_returns(
        self, rewards: Tensor, values: Tensor | None, experience: Experience
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T] by the configured estimator, and the critic's targets where there is one."""
        config = self.config
        if config.adv_estimator == "gae":
            return super().advantages_and_returns(rewards, values, experience)
        # REINFORCE++ is rewards to go, whitened over the batch.
        baseline = "none" if config.adv_estimator == "reinforce_plus_plus" else config.adv_estimator
        returns = reward_to_go(rewards, experience.mask, config.gamma)
        return subtract_baseline(
            returns, experience.mask, experience.groups, baseline=baseline, scale_rewards=config.scale_rewards
        ), None

    def update(self, learner: Learner, experience: Experience) -> dict[str, float]:
        """Epochs of mini-batches over one rollout, ended early once the policy is too far from the one that sampled."""
        return learner.descend(
            experience,
            self.loss,
            num_epochs=self.config.num_ppo_epochs,
            num_mini_batches=self.config.num_mini_batches,
            target_kl=self.config.target_kl,
        )

    def loss(
        self, batch: Experience, hidden: Tensor, head: Head, values: Tensor | None, ref_head: Head | None
    ) -> StepOutput:
        """Clipped policy loss, plus the critic's; see `Algorithm.loss` for the arguments."""
        config = self.config
        weights = {}
        if config.importance_sampling_cap is not None:
            batch, weights = self._weighted(batch)
        loss, metrics = self.surrogate_loss(
            batch,
            hidden,
            head,
            ref_head,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            ratio_level=config.ratio_level,
        )
        metrics |= weights
        if values is None:
            return StepOutput(loss, metrics)
        critic = self.value_loss(batch, values)
        return StepOutput(loss + config.vf_coef * critic.loss, metrics | critic.metrics)

    def _weighted(self, batch: Experience) -> tuple[Experience, dict[str, Tensor]]:
        """The batch with each token's advantage times w = min(π_old / π_sampler, cap), and metrics of w.

        Truncated importance sampling (Ionides, 2008; for engines that disagree: Yao et al., 2025) weighs the surrogate.
        With w ≥ 0 it may as well weigh the advantage: min(r A, clip(r) A), and the dual clip max(·, c A) for A < 0, are
        positively homogeneous in A, so value, gradient and which token is clipped come out the same. KL and entropy
        terms have no advantage in them and stay as they are.
        """
        if batch.rollout_logprobs is None:
            raise ValueError("rollout_logprobs: needed for importance_sampling_cap")
        cap, mask = self.config.importance_sampling_cap, batch.mask
        log_weights = (batch.old_logprobs - batch.rollout_logprobs).masked_fill(~mask, 0.0)
        weights = log_weights.clamp(max=math.log(cap)).exp()
        tokens = mask.sum().clamp(min=1)
        metrics = {
            "policy/importance_weight": (weights * mask).sum() / tokens,
            "policy/importance_capped": ((log_weights > math.log(cap)) & mask).sum() / tokens,
        }
        return dataclasses.replace(batch, advantages=batch.advantages * weights), metrics
