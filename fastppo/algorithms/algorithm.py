"""What the algorithms share: shaped rewards, advantages, the KL controller, the critic's loss.

    scores [B], KL [B, T] ── shape_rewards ──> rewards [B, T] ── advantages_and_returns ──> advantages, returns [B, T]
    update(learner, experience): epochs of mini-batches of `loss`, or a step of the algorithm's own

An algorithm is a subclass that overrides where it differs. It reaches the models only through a `Learner`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastppo.algorithms.config import AlgorithmConfig, SeparateCriticConfig
from fastppo.algorithms.experience import Experience, check_finite
from fastppo.algorithms.learner import Learner, StepOutput
from fastppo.models.head import LMHead
from fastppo.ops.gae import gae
from fastppo.ops.kl_control import AdaptiveKLController, FixedKLController, LinearKLController
from fastppo.ops.linear_kl import linear_kl
from fastppo.ops.linear_ppo_loss import linear_ppo_loss
from fastppo.ops.outputs import PPOLossOutput
from fastppo.ops.value_loss import value_loss
from fastppo.ops.whiten import whiten


class Algorithm:
    """How advantages are estimated and how the parameters move.

    Args:
        config: the algorithm's section of the configuration.
        temperature: of sampling; divides the logits everywhere.
        backend: of the operators; None chooses by device.
    """

    config: AlgorithmConfig

    needs_values = True
    """Whether there is a critic; without one `experience.old_values` and `.returns` stay None."""
    update_starts_with_scored_pass = True
    """Whether `update` begins with a pass, with gradients, of the policy that scored the experience."""
    normalizes_advantages = False
    """Whether `advantages_and_returns` gives advantages whose scale does not depend on the rewards' scale."""

    def __init__(self, config: AlgorithmConfig, *, temperature: float = 1.0, backend: str | None = None) -> None:
        self.config, self.temperature, self.backend = config, temperature, backend
        self.kl_controller = FixedKLController(config.kl_coef)
        if config.kl_controller == "adaptive":
            self.kl_controller = AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        elif config.kl_controller == "linear":
            self.kl_controller = LinearKLController(config.kl_coef, config.kl_coef_final, config.kl_horizon)

    @property
    def whitens_advantages(self) -> bool:
        """Whether the batch's advantages are scaled to mean 0 and standard deviation 1."""
        return self.config.whiten_advantages

    # Advantages

    def estimate_advantages(self, experience: Experience) -> dict[str, Tensor]:
        """Fill in `experience.advantages` and `.returns`; returns their metrics.

        Raises:
            ValueError: the experience lacks a field that the configuration needs.
            NonFiniteValue: a reward, advantage or target of the critic is NaN or infinite.
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
        check_finite("advantages", experience.advantages, mask)
        if experience.returns is not None:
            check_finite("targets of the critic", experience.returns, mask)
            metrics |= _explained_variance(experience) if mask.any() else {}
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
        """Σ_k w_k A_k with each objective's advantages normalized first, so that the scale of one reward does not hide
        the others (GDPO: Liu et al., 2026, arXiv:2601.05242, there for groups)."""
        mask, by_token = experience.mask, experience.objective_token_scores
        values = experience.old_values if self.needs_values else None  # [B, T, K]
        total, returns, metrics = torch.zeros_like(experience.old_logprobs), [], {}
        for k, (name, weight) in enumerate(experience.objectives.items()):
            rewards = torch.zeros_like(total) if by_token is None else by_token[..., k].to(total.dtype)
            rewards = self._whitened(_add_at_end(rewards, experience.objective_scores[:, k], mask), mask)
            old_values = None if values is None else values[..., k]
            advantages, targets = self.advantages_and_returns(rewards, old_values, experience)
            returns.append(targets)
            if mask.any():
                metrics[f"advantage/std/{name}"] = advantages[mask].std(correction=0)
            total += weight * (advantages if self.normalizes_advantages else whiten(advantages, mask=mask))
        if values is not None:
            experience.returns = torch.stack(returns, dim=2)  # [B, T, K]
        return total, metrics

    def _whitened(self, rewards: Tensor, mask: Tensor) -> Tensor:
        check_finite(f"rewards, less the KL penalty (kl_coef {self.kl_controller.value:g})", rewards, mask)
        return whiten(rewards, mask=mask, shift_mean=False) if self.config.whiten_rewards else rewards

    def shape_rewards(self, experience: Experience) -> Tensor:
        """[B, T]: per-token rewards minus the KL penalty; the score minus its penalty is added at the last token.

        The KL penalty in the per-token reward follows Ziegler et al., 2019 (arXiv:1909.08593) and Ouyang et al., 2022
        (arXiv:2203.02155).
        """
        config, mask = self.config, experience.mask
        rewards = torch.zeros_like(experience.old_logprobs)
        if experience.kl is not None and config.kl_in == "reward":
            rewards -= self.kl_controller.value * experience.kl
        scores = experience.scores.to(rewards.dtype)
        if config.missing_eos_penalty is not None:
            scores = scores - config.missing_eos_penalty * (~experience.ended).to(rewards.dtype)
        if experience.objective_token_scores is not None:
            weights = rewards.new_tensor(list(experience.objectives.values()))
            rewards += (experience.objective_token_scores * weights).sum(2)
        return _add_at_end(rewards, scores, mask)

    def advantages_and_returns(
        self, rewards: Tensor, values: Tensor | None, experience: Experience
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages [B, T] and the critic's targets [B, T] (None without a critic).

        Args:
            rewards: [B, T], per token, from `shape_rewards`.
            values: [B, T], the critic's at rollout time; None without a critic.
            experience: the sequences.
        """
        raise NotImplementedError

    # Updates

    def update(self, learner: Learner, experience: Experience) -> dict[str, float]:
        """Move the parameters; returns metrics. Here: one epoch of first-order steps on `loss`."""
        return learner.descend(experience, self.loss, num_epochs=1)

    def loss(
        self,
        batch: Experience,
        hidden: Tensor | None,
        head: LMHead | None,
        values: Tensor | None,
        ref_head: LMHead | None,
    ) -> StepOutput:
        """`policy_loss` + vf_coef · `value_loss`, of a micro-batch of b sequences under the current parameters.

        Args:
            batch: with advantages, and with returns where there is a critic.
            hidden: [b, T, D], the states that predict `batch.targets`; None for the critic's term alone.
            head: the policy's head, where `hidden` is given.
            values: [b, T], current; None for the policy's term alone.
            ref_head: the reference's head where the loss has an exact KL, else None.
        """
        policy = None if hidden is None else self.policy_loss(batch, hidden, head, ref_head)
        if values is None:
            return policy
        critic = self.value_loss(batch, values)
        critic = critic._replace(loss=self.config.vf_coef * critic.loss)
        if policy is None:
            return critic
        return StepOutput(policy.loss + critic.loss, policy.metrics | critic.metrics)

    def policy_loss(self, batch: Experience, hidden: Tensor, head: LMHead, ref_head: LMHead | None) -> StepOutput:
        """−w r A, with r = π(a|s) / π_old(a|s); entropy bonus and KL penalty as configured.

        At r = 1 its gradient is the policy gradient, that of −A log π, weighed by the importance weights w where the
        experience has some (`fastppo.algorithms.correction`). See `loss` for the arguments.
        """
        no_clip = {"clip_low": 1.0, "clip_high": math.inf}  # a ratio is between 0 and inf
        arguments = self.loss_arguments(batch, hidden, head, ref_head)
        policy = linear_ppo_loss(advantages=batch.advantages, **no_clip, **arguments)
        return StepOutput(policy.loss, policy_metrics(policy))

    def loss_arguments(
        self, batch: Experience, hidden: Tensor, head: LMHead, ref_head: LMHead | None
    ) -> dict[str, Any]:
        """All arguments of `linear_ppo_loss` but the advantages and the clip."""
        config = self.config
        penalized = config.kl_in == "loss" and self.kl_controller.value != 0.0
        exact = penalized and config.kl_estimator == "exact"
        return {
            "hidden": hidden,
            **head_arguments(head, self.temperature, self.backend),
            "targets": batch.targets,
            "old_logprobs": batch.old_logprobs,
            "mask": batch.mask,
            "importance_weights": batch.importance_weights,
            "entropy_coef": config.entropy_coef,
            "loss_agg": config.loss_agg,
            "kl_coef": self.kl_controller.value if penalized else 0.0,
            "kl_estimator": config.kl_estimator,
            "ref_logprobs": batch.ref_logprobs,
            "ref_hidden": batch.ref_hidden if exact else None,
            "ref_weight": ref_head.weight if exact else None,
            "ref_bias": ref_head.bias if exact else None,
        }

    def value_loss(self, batch: Experience, values: Tensor) -> StepOutput:
        """½ (V − R)², clipped as configured; with a value for each objective, the mean of their losses.

        Args:
            batch: b sequences with returns.
            values: [b, T] or [b, T, K], current.
        """
        columns = [_by_objective(x) for x in (values, batch.returns, batch.old_values)]
        config = self.config
        options = {"mask": batch.mask, "cliprange_value": config.cliprange_value, "loss_agg": config.loss_agg}
        critics = [value_loss(v, r, old_values=old, **options) for v, r, old in zip(*columns, strict=True)]
        loss = sum(critic.loss for critic in critics) / len(critics)
        clip_fraction = sum(critic.metrics["clip_fraction"] for critic in critics) / len(critics)
        return StepOutput(loss, {"loss/value": loss.detach(), "value/clip_fraction": clip_fraction})

    def part_weight(self, part: Experience, whole: Experience, max_new_tokens: int) -> float:
        """Weight of a micro-batch's loss in that of its mini-batch, so that the gradients add up to the mini-batch's.

        Token means count tokens; sequence means count the sequences that have a token.
        """
        if self.config.loss_agg == "token-mean":
            return part.token_share(whole)
        weight = part.mask.any(1).sum().item() / max(whole.mask.any(1).sum().item(), 1)
        if self.config.loss_agg == "seq-mean-token-sum-norm":
            # The norm is the longest completion that is allowed, not the longest of this batch.
            weight *= part.mask.shape[1] / max_new_tokens
        return weight

    def state_dict(self) -> dict:
        """State for a checkpoint, serializable as JSON."""
        return {"kl_controller": self.kl_controller.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.kl_controller.load_state_dict(state["kl_controller"])


class PolicyThenCritic(Algorithm):
    """Algorithms that move the policy by `improve_policy`, then fit the critic by first-order epochs; with GAE."""

    config: SeparateCriticConfig

    update_starts_with_scored_pass = False

    def advantages_and_returns(self, rewards: Tensor, values: Tensor, experience: Experience) -> tuple[Tensor, Tensor]:
        return gae(rewards, values, gamma=self.config.gamma, lam=self.config.lam, mask=experience.mask)

    def update(self, learner: Learner, experience: Experience) -> dict[str, float]:
        try:
            metrics = self.improve_policy(learner, experience) if experience.mask.any() else {}
        except FloatingPointError as error:
            learner.skip_nonfinite(str(error), "this step of the policy")
            metrics = {"policy/skipped_steps": 1.0}
        num_epochs = self.config.num_value_epochs
        return metrics | learner.descend_values(experience, self.value_loss, num_epochs=num_epochs)

    def improve_policy(self, learner: Learner, experience: Experience) -> dict[str, float]:
        """Move the policy alone; returns metrics.

        Raises:
            FloatingPointError: something is not finite, and the policy is as it was.
        """
        raise NotImplementedError


def head_arguments(head: LMHead, temperature: float, backend: str | None) -> dict[str, Any]:
    """How a head makes logits of hidden states: keyword arguments that all operators take."""
    return head._asdict() | {"temperature": temperature, "backend": backend}


def kl_from(
    old: tuple[Tensor, LMHead], new: tuple[Tensor, LMHead], mask: Tensor, temperature: float, backend: str | None
) -> Tensor:
    """KL(π_old ‖ π_new) [b, T] over the whole vocabulary, in nats, 0 on padding; differentiable in `new`.

    Args:
        old, new: states [b, T, D] of the same tokens, and the head, of either policy.
        mask: [b, T] bool, True for a sampled token.
    """
    (old_hidden, old_head), (hidden, head) = old, new
    reference = {"ref_hidden": old_hidden, "ref_weight": old_head.weight, "ref_bias": old_head.bias}
    return linear_kl(hidden, kind="forward", mask=mask, **reference, **head_arguments(head, temperature, backend))


def policy_metrics(policy: PPOLossOutput) -> dict[str, Tensor]:
    """Metrics of `linear_ppo_loss`, by the names they are logged under, that mean the same with and without a clip."""
    reported = ("entropy", "approx_kl", "ratio_mean", "ratio_min", "ratio_max")
    return {"loss/policy": policy.metrics["policy_loss"]} | {f"policy/{n}": policy.metrics[n] for n in reported}


def _by_objective(values: Tensor) -> tuple[Tensor, ...]:
    """Each objective's [b, T] of [b, T, K], or the only one."""
    return values.unbind(2) if values.dim() == 3 else (values,)


def _explained_variance(experience: Experience) -> dict[str, Tensor]:
    """That of the scored values, over the whole batch: those of its parts do not average to it."""
    columns = zip(_by_objective(experience.old_values), _by_objective(experience.returns), strict=True)
    options = {"mask": experience.mask, "cliprange_value": None}
    each = [value_loss(values, returns, **options).metrics["explained_variance"] for values, returns in columns]
    metrics = {"value/explained_variance": sum(each) / len(each)}
    if len(each) > 1:
        metrics |= {f"value/explained_variance/{name}": x for name, x in zip(experience.objectives, each, strict=True)}
    return metrics


def _add_at_end(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """rewards [B, T] with scores [B] added at each completion's last token; 0 on padding."""
    last = (mask.sum(1) - 1).clamp(min=0).unsqueeze(1)
    return rewards.scatter_add(1, last, scores.to(rewards.dtype).unsqueeze(1)).masked_fill(~mask, 0.0)
