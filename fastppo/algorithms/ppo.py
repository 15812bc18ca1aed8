"""Proximal policy optimization of a language model (Schulman et al., 2017, arXiv:1707.06347).

    scores [B], kl [B, T]        ->  per-token rewards: −kl_coef · kl, and the score on the last token
    rewards, values [B, T]       ->  GAE advantages and returns, advantages whitened over the batch
    epochs of mini-batches       ->  clipped policy loss + vf_coef · clipped value loss

The per-token view with the KL in the reward is that of Ziegler et al., 2019 (arXiv:1909.08593) and Ouyang et al., 2022
(arXiv:2203.02155).
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastppo.algorithms.experience import Experience
from fastppo.ops.gae import gae
from fastppo.ops.kl_control import AdaptiveKLController, FixedKLController
from fastppo.ops.linear_ppo_loss import linear_ppo_loss
from fastppo.ops.value_loss import value_loss
from fastppo.ops.whiten import whiten


class Head(Protocol):
    """What turns hidden states into logits; `fastppo.models.LMHead` is one."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


class PPOStepOutput(NamedTuple):
    """loss: scalar, differentiable. metrics: detached 0-dim tensors."""

    loss: Tensor
    metrics: dict[str, Tensor]


class PPO:
    """How advantages are estimated and what the loss is; the trainer does the rest.

    Args:
        config: a `PPOConfig`, or anything with its fields.
        temperature: of the sampler; divides the logits everywhere.
        backend: of the operators; None chooses by device.
    """

    def __init__(self, config, *, temperature: float = 1.0, backend: str | None = None) -> None:
        self.config = config
        self.temperature = temperature
        self.backend = backend
        if config.kl_controller == "adaptive":
            self.kl_controller = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        else:
            self.kl_controller = FixedKLController(config.kl_coef)

    def estimate_advantages(self, experience: Experience) -> dict[str, Tensor]:
        """Fill in `experience.advantages` and `.returns`; returns metrics of the rewards that were shaped."""
        rewards = self.shape_rewards(experience)
        if self.config.whiten_rewards:
            rewards = whiten(rewards, mask=experience.mask, shift_mean=False)
        advantages, returns = gae(
            rewards, experience.old_values, gamma=self.config.gamma, lam=self.config.lam, mask=experience.mask
        )
        metrics = {"advantage/std": advantages[experience.mask].std(correction=0)} if experience.mask.any() else {}
        if self.config.whiten_advantages:
            advantages = whiten(advantages, mask=experience.mask)
        experience.advantages, experience.returns = advantages, returns
        return metrics

    def shape_rewards(self, experience: Experience) -> Tensor:
        """[B, T]: minus the KL penalty on every token, plus the score on the last one."""
        config, mask = self.config, experience.mask
        rewards = torch.zeros_like(experience.old_logprobs)
        if experience.kl is not None and config.kl_in == "reward":
            rewards -= self.kl_controller.value * experience.kl
        scores = experience.scores
        if config.reward_clip is not None:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        last = (mask.sum(1) - 1).clamp(min=0).unsqueeze(1)
        rewards.scatter_add_(1, last, scores.to(rewards.dtype).unsqueeze(1))
        return rewards.masked_fill(~mask, 0.0)

    def loss(
        self, batch: Experience, hidden: Tensor, head: Head, values: Tensor, ref_head: Head | None
    ) -> PPOStepOutput:
        """The loss of a (micro-)batch of b sequences under the current parameters.

        Args:
            batch: with advantages and returns.
            hidden: [b, T, D], the states that predict `batch.targets`.
            head: the policy's lm_head; ref_head: the reference's, where the loss has an exact KL.
            values: [b, T], current.
        """
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
        critic = value_loss(
            values,
            batch.returns,
            old_values=batch.old_values,
            mask=batch.mask,
            cliprange_value=config.cliprange_value,
            loss_agg=config.loss_agg,
        )
        metrics = {
            "loss/policy": policy.metrics["policy_loss"],
            "loss/value": critic.loss.detach(),
            "policy/entropy": policy.metrics["entropy"],
            "policy/approx_kl": policy.metrics["approx_kl"],
            "policy/clip_fraction": policy.metrics["clip_fraction"],
            "policy/ratio_mean": policy.metrics["ratio_mean"],
            "policy/ratio_min": policy.metrics["ratio_min"],
            "policy/ratio_max": policy.metrics["ratio_max"],
            "value/clip_fraction": critic.metrics["clip_fraction"],
            "value/explained_variance": critic.metrics["explained_variance"],
        }
        return PPOStepOutput(policy.loss + config.vf_coef * critic.loss, metrics)

    def part_weight(self, part: Experience, whole: Experience, max_new_tokens: int) -> float:
        """What the loss of a micro-batch counts in that of its mini-batch, so that both give the same gradient.

        Token means count tokens, sequence means count sequences that have one.
        """
        if self.config.loss_agg == "token-mean":
            return part.token_share(whole)
        weight = part.mask.any(1).sum().item() / max(whole.mask.any(1).sum().item(), 1)
        if self.config.loss_agg == "seq-mean-token-sum-norm":
            # The norm is the longest completion that is allowed, not the longest of this batch.
            weight *= part.mask.shape[1] / max_new_tokens
        return weight

    def state_dict(self) -> dict:
        return {"kl_controller": self.kl_controller.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.kl_controller.load_state_dict(state["kl_controller"])
