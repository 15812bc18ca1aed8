"""Proximal policy optimization of a language model (Schulman et al., 2017, arXiv:1707.06347).

scores [B], kl [B, T]        ->  per-token rewards: −kl_coef · kl, and the score on the last token
rewards, values [B, T]       ->  GAE advantages and returns, advantages whitened over the batch
epochs of mini-batches       ->  clipped policy loss + vf_coef · clipped value loss
"""

from __future__ import annotations

from torch import Tensor

from fastppo.algorithms.algorithm import Algorithm, Head, Learner, StepOutput
from fastppo.algorithms.experience import Experience
from fastppo.ops.linear_ppo_loss import linear_ppo_loss


class PPO(Algorithm):
    """See `fastppo.training.config.PPOConfig` for its options."""

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
        penalized = config.kl_in == "loss" and self.kl_controller.value != 0.0
        exact = penalized and config.kl_estimator == "exact"
        policy = linear_ppo_loss(
            hidden,
            head.weight,
            batch.targets,
            batch.old_logprobs,
            batch.advantages,
            mask=batch.mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            ratio_level=config.ratio_level,
            ref_logprobs=batch.ref_logprobs,
            ref_hidden=batch.ref_hidden if exact else None,
            ref_weight=ref_head.weight if exact else None,
            ref_bias=ref_head.bias if exact else None,
            kl_coef=self.kl_controller.value if penalized else 0.0,
            kl_estimator=config.kl_estimator,
            entropy_coef=config.entropy_coef,
            loss_agg=config.loss_agg,
            bias=head.bias,
            temperature=self.temperature,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            backend=self.backend,
        )
        critic = self.value_loss(batch, values)
        metrics = {
            "loss/policy": policy.metrics["policy_loss"],
            "loss/value": critic.metrics["loss/value"],
            "policy/entropy": policy.metrics["entropy"],
            "policy/approx_kl": policy.metrics["approx_kl"],
            "policy/clip_fraction": policy.metrics["clip_fraction"],
            "policy/ratio_mean": policy.metrics["ratio_mean"],
            "policy/ratio_min": policy.metrics["ratio_min"],
            "policy/ratio_max": policy.metrics["ratio_max"],
            **critic.metrics,
        }
        return StepOutput(policy.loss + config.vf_coef * critic.loss, metrics)
