"""What the algorithms share: shaped rewards, advantages, the KL controller; and what they may do with the models.

    scores [B], KL [B, T] ── shape_rewards ──> rewards [B, T] ── advantages_and_returns ──> advantages, returns [B, T]
    update(learner, experience): epochs of mini-batches of `loss`, or a step of the algorithm's own

An algorithm is a subclass that overrides what it does otherwise. It sees the models only through a `Learner`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastppo.algorithms.experience import Experience
from fastppo.ops.gae import gae
from fastppo.ops.kl_control import AdaptiveKLController, FixedKLController, LinearKLController
from fastppo.ops.linear_ppo_loss import linear_ppo_loss
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

    def autocast(self) -> AbstractContextManager:
        """The precision in which the head's products are meant to be made."""

    def load(self, parameters: dict[str, Tensor]) -> None:
        """Copy these values into the policy's own parameters."""


class Learner(Protocol):
    """What an algorithm may do with the models; `fastppo.algorithms.learner.Learner` is one."""

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

    def gradient(self, experience: Experience, loss: Loss) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The gradient of a loss in the policy's parameters, and its metrics; nothing moves. `values` is None."""

    def measure(
        self, experience: Experience, loss: Loss, parameters: dict[str, Tensor] | None = None
    ) -> dict[str, float]:
        """What a loss reports of the policy, by its own or other parameters. `values` is None."""

    def micro_batches(self, experience: Experience) -> Iterator[Experience]:
        """Parts that fit one forward and backward pass, in order."""

    def forget_policy_moments(self) -> None:
        """Start the optimizer anew for the policy: its next steps have another goal than those before."""

    def skip_nonfinite(self, what: str) -> None:
        """Something is not finite and the step cannot be made: stop the run, or say so and go on, as configured."""


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
        """Whether the batch's advantages are brought to mean 0 and deviation 1."""
        return self.config.whiten_advantages

    @property
    def normalizes_advantages(self) -> bool:
        """Whether `advantages_and_returns` gives advantages of one scale, whatever the rewards' is."""
        return False

    def estimate_advantages(self, experience: Experience) -> dict[str, Tensor]:
        """Fill in `experience.advantages` and `.returns`; returns metrics of them.

        Raises:
            ValueError: the experience lacks something that the configuration asks for.
        """
        self._check(experience)
        mask = experience.mask
        if self.config.multi_objective_aggregation == "normalize_then_sum":
            advantages, metrics = self._advantages_by_objective(experience)
        else:
            rewards = self._whitened(self.shape_rewards(experience), mask)
            advantages, experience.returns = self.advantages_and_returns(rewards, experience.old_values, experience)
            metrics = {}
        if mask.any():
            metrics["advantage/std"] = advantages[mask].std(correction=0)
        experience.advantages = whiten(advantages, mask=mask) if self.whitens_advantages else advantages
        return metrics

    def _check(self, experience: Experience) -> None:
        by_objective = self.config.multi_objective_aggregation == "normalize_then_sum"
        for name, needed, reason in (
            ("old_values", self.needs_values, "this algorithm has a critic"),
            ("ended", self.config.missing_eos_penalty is not None, "missing_eos_penalty is given"),
            ("objective_scores", by_objective, "multi_objective_aggregation is normalize_then_sum"),
            ("objectives", by_objective, "multi_objective_aggregation is normalize_then_sum"),
        ):
            if needed and getattr(experience, name) is None:
                raise ValueError(f"experience.{name}: needed, since {reason}")

    def _advantages_by_objective(self, experience: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ_k w_k A_k with each objective's advantages normalized first, so that no reward's scale drowns another's
        (GDPO: Liu et al., 2026, arXiv:2601.05242, there for groups)."""
        mask, by_token = experience.mask, experience.objective_token_scores
        values = experience.old_values if self.needs_values else None  # [B, T, K]
        total, returns, metrics = torch.zeros_like(experience.old_logprobs), [], {}
        for k, (name, weight) in enumerate(experience.objectives.items()):
            rewards = torch.zeros_like(total) if by_token is None else by_token[..., k].to(total.dtype)
            rewards = self._whitened(_add_at_end(rewards, experience.objective_scores[:, k], mask), mask)
            advantages, targets = self.advantages_and_returns(
                rewards, None if values is None else values[..., k], experience
            )
            returns.append(targets)
            if mask.any():
                metrics[f"advantage/std/{name}"] = advantages[mask].std(correction=0)
            total += weight * (advantages if self.normalizes_advantages else whiten(advantages, mask=mask))
        if values is not None:
            experience.returns = torch.stack(returns, dim=2)  # [B, T, K]
        return total, metrics

    def _whitened(self, rewards: Tensor, mask: Tensor) -> Tensor:
        return whiten(rewards, mask=mask, shift_mean=False) if self.config.whiten_rewards else rewards

    def shape_rewards(self, experience: Experience) -> Tensor:
        """[B, T]: rewards by token less the KL penalty, and the score, less its penalties, on the last token.

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
            scores = scores - config.length_penalty * mask.sum(1).to(rewards.dtype)
        if config.reward_clip is not None:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        if experience.objective_token_scores is not None:
            weights = rewards.new_tensor(list(experience.objectives.values()))
            rewards += (experience.objective_token_scores * weights).sum(2)
        return _add_at_end(rewards, scores, mask)

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

    def policy_gradient_loss(
        self, batch: Experience, hidden: Tensor, head: Head, ref_head: Head | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """−r A without a clip: its gradient at r = 1 is the policy gradient, that of −A log π."""
        loss, metrics = self.surrogate_loss(batch, hidden, head, ref_head, clip_low=1.0, clip_high=math.inf)
        del metrics["policy/clip_fraction"]
        return loss, metrics

    def surrogate_loss(
        self, batch: Experience, hidden: Tensor, head: Head, ref_head: Head | None, **clip: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss with entropy bonus and KL penalty, and its metrics.

        Args:
            clip: clip_low, clip_high, dual_clip, ratio_level of `linear_ppo_loss`; for the rest see `loss`.
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
            **clip,
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
        reported = ("entropy", "approx_kl", "clip_fraction", "ratio_mean", "ratio_min", "ratio_max")
        metrics = {f"policy/{name}": policy.metrics[name] for name in reported}
        return policy.loss, {"loss/policy": policy.metrics["policy_loss"], **metrics}

    def value_loss(self, batch: Experience, values: Tensor) -> StepOutput:
        """The critic's regression on `batch.returns`; with a value for each objective, the mean of their losses."""
        given = (values, batch.returns, batch.old_values)
        columns = zip(*(x.unbind(2) if values.dim() == 3 else (x,) for x in given), strict=True)
        critics = [
            value_loss(
                column,
                returns,
                old_values=old_values,
                mask=batch.mask,
                cliprange_value=self.config.cliprange_value,
                loss_agg=self.config.loss_agg,
            )
            for column, returns, old_values in columns
        ]
        loss = sum(critic.loss for critic in critics) / len(critics)
        metrics = {"loss/value": loss.detach()}
        for name in ("clip_fraction", "explained_variance"):
            metrics[f"value/{name}"] = sum(critic.metrics[name] for critic in critics) / len(critics)
        if len(critics) > 1:
            for name, critic in zip(batch.objectives, critics, strict=True):
                metrics[f"value/explained_variance/{name}"] = critic.metrics["explained_variance"]
        return StepOutput(loss, metrics)

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


def _add_at_end(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """rewards [B, T] with scores [B] added at each completion's last token; 0 on padding."""
    last = (mask.sum(1) - 1).clamp(min=0).unsqueeze(1)
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1)).masked_fill(~mask, 0.0)
