"""What the algorithms share: shaped rewards, advantages, the KL controller; and what they may do with the models.

    scores [B], KL [B, T] ── shape_rewards ──> rewards [B, T] ── advantages_and_returns ──> advantages, returns [B, T]
    update(learner, experience): epochs of mini-batches of `loss`, or a step of the algorithm's own

An algorithm is a subclass that overrides what it does otherwise. It sees the models only through a `Learner`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastppo.algorithms.experience import Experience
from fastppo.ops.gae import gae
from fastppo.ops.kl_control import AdaptiveKLController, FixedKLController, LinearKLController
from fastppo.ops.value_loss import value_loss
from fastppo.ops.whiten import whiten


class Head(Protocol):
    """What turns hidden states into logits; `fastppo.models.LMHead` is one."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


class StepOutput(NamedTuple):
    """loss: scalar, differentiable. metrics: detached 0-dim tensors."""

    loss: Tensor
    metrics: dict[str, Tensor]


Loss = Callable[[Experience, Tensor, Head, "Tensor | None", "Head | None"], StepOutput]
"""loss(batch, hidden [b, T, D], head, values [b, T] or None, ref_head or None); see `Algorithm.loss`."""


class Policy(Protocol):
    """The policy as a function of its trained parameters (all of them, or its adapters)."""

    def parameters(self) -> dict[str, Tensor]:
        """The parameters themselves, by name."""

    def hidden(self, batch: Experience, parameters: dict[str, Tensor] | None = None) -> tuple[Tensor, Head]:
        """The states [b, T, D] that predict `batch.targets`, and the head.

        Args:
            parameters: used in place of the policy's own, all or some of them, differentiably in both modes.
        """

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Copy these values into the policy's own parameters."""


class Learner(Protocol):
    """What an algorithm may do with the models; `fastppo.training.learner.Learner` is one."""

    policy: Policy

    def descend(
        self,
        experience: Experience,
        loss: Loss,
        *,
        num_epochs: int,
        num_mini_batches: int,
        target_kl: float | None = None,
    ) -> dict[str, float]:
        """Optimizer steps on policy and critic: epochs of mini-batches, stopped once policy/approx_kl > target_kl.

        Returns:
            Means over the steps of what the loss reports, and grad_norm.
        """

    def descend_values(
        self,
        experience: Experience,
        loss: Callable[[Experience, Tensor], StepOutput],
        *,
        num_epochs: int,
        num_mini_batches: int,
    ) -> dict[str, float]:
        """The same on the critic alone; loss(batch, values [b, T])."""

    def micro_batches(self, experience: Experience) -> Iterator[Experience]:
        """Parts that fit one forward and backward pass, in order."""


class Algorithm:
    """How advantages are estimated and how the parameters move.

    Args:
        config: an `AlgorithmConfig` of the algorithm's kind, or anything with its fields.
        temperature: of the sampler; divides the logits everywhere.
        backend: of the operators; None chooses by device.
    """

    needs_values = True
    """Whether there is a critic; without one `experience.old_values` and `.returns` stay None."""

    def __init__(self, config: Any, *, temperature: float = 1.0, backend: str | None = None) -> None:
        self.config = config
        self.temperature = temperature
        self.backend = backend
        self.kl_controller = {
            "fixed": lambda: FixedKLController(config.kl_coef),
            "adaptive": lambda: AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon),
            "linear": lambda: LinearKLController(config.kl_coef, config.kl_coef_final, config.kl_horizon),
        }[config.kl_controller]()

    @property
    def whitens_advantages(self) -> bool:
        return self.config.whiten_advantages

    def estimate_advantages(self, experience: Experience) -> dict[str, Tensor]:
        """Fill in `experience.advantages` and `.returns`; returns metrics of them."""
        mask = experience.mask
        rewards = self.shape_rewards(experience)
        if self.config.whiten_rewards:
            rewards = whiten(rewards, mask=mask, shift_mean=False)
        advantages, experience.returns = self.advantages_and_returns(rewards, experience.old_values, experience)
        metrics = {"advantage/std": advantages[mask].std(correction=0)} if mask.any() else {}
        experience.advantages = whiten(advantages, mask=mask) if self.whitens_advantages else advantages
        return metrics

    def shape_rewards(self, experience: Experience) -> Tensor:
        """[B, T]: minus the KL penalty on every token, plus the score, less its penalties, on the last one.

        The per-token view with the KL in the reward is that of Ziegler et al., 2019 (arXiv:1909.08593) and Ouyang et
        al., 2022 (arXiv:2203.02155).
        """
        config, mask = self.config, experience.mask
        rewards = torch.zeros_like(experience.old_logprobs)
        if experience.kl is not None and config.kl_in == "reward":
            rewards -= self.kl_controller.value * experience.kl
        scores = experience.scores.to(rewards.dtype)
        if config.missing_eos_penalty is not None:
            scores = scores - config.missing_eos_penalty * (~experience.ended).to(rewards.dtype)
        if config.length_penalty:
            scores = scores - config.length_penalty * mask.sum(1)
        if config.reward_clip is not None:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        last = (mask.sum(1) - 1).clamp(min=0).unsqueeze(1)
        rewards.scatter_add_(1, last, scores.unsqueeze(1))
        return rewards.masked_fill(~mask, 0.0)

    def advantages_and_returns(
        self, rewards: Tensor, values: Tensor | None, experience: Experience
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T] each, from per-token rewards [B, T] and the critic's values [B, T]; by default GAE."""
        return gae(rewards, values, gamma=self.config.gamma, lam=self.config.lam, mask=experience.mask)

    def update(self, learner: Learner, experience: Experience) -> dict[str, float]:
        """Move the parameters; returns metrics. By default one epoch of first-order steps on `loss`."""
        return learner.descend(experience, self.loss, num_epochs=1, num_mini_batches=self.config.num_mini_batches)

    def loss(
        self, batch: Experience, hidden: Tensor, head: Head, values: Tensor | None, ref_head: Head | None
    ) -> StepOutput:
        """The loss of a (micro-)batch of b sequences under the current parameters.

        Args:
            batch: with advantages, and with returns where there is a critic.
            hidden: [b, T, D], the states that predict `batch.targets`.
            head: the policy's lm_head; ref_head: the reference's, where the loss has an exact KL.
            values: [b, T], current; None without a critic.
        """
        raise NotImplementedError

    def value_loss(self, batch: Experience, values: Tensor) -> StepOutput:
        """The critic's regression on `batch.returns`."""
        critic = value_loss(
            values,
            batch.returns,
            old_values=batch.old_values,
            mask=batch.mask,
            cliprange_value=self.config.cliprange_value,
            loss_agg=self.config.loss_agg,
        )
        metrics = {
            "loss/value": critic.loss.detach(),
            "value/clip_fraction": critic.metrics["clip_fraction"],
            "value/explained_variance": critic.metrics["explained_variance"],
        }
        return StepOutput(critic.loss, metrics)

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
        """What a checkpoint keeps, as JSON can hold it."""
        return {"kl_controller": self.kl_controller.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.kl_controller.load_state_dict(state["kl_controller"])
