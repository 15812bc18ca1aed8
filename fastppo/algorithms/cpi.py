"""Conservative policy iteration (Kakade & Langford, 2002, "Approximately optimal approximate reinforcement learning").

    π'      an approximately greedy policy: first-order epochs from π on E_{s, a ~ π}[π'(a|s)/π(a|s) · A(s, a)] without
            a clip (`Algorithm.policy_loss`), so that it tends to the best sampled action of every state
    α       its share: from the paper's lower bound on the improvement, or searched for on held-out sequences
    π ← (1 − α) π + α π'    at every state; distilled into one network by epochs on
            (1 − α) KL(π ‖ π_θ) + α KL(π' ‖ π_θ) = KL((1 − α) π + α π' ‖ π_θ) + a constant

As in the paper, the mixture draws between π and π' at each state (each token), not once for a whole completion. It is
fitted at the states that π visits; for small α the mixture visits nearly the same.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastppo.algorithms.algorithm import PolicyThenCritic, head_arguments, kl_from
from fastppo.algorithms.config import CPIConfig
from fastppo.algorithms.experience import Experience, check_finite
from fastppo.algorithms.learner import Learner, Loss, StepOutput
from fastppo.algorithms.second_order.conjugate_gradient import Vector
from fastppo.models.head import LMHead
from fastppo.ops import reference as formulas
from fastppo.ops.linear_logprob import linear_logprob


class ConservativePolicyIteration(PolicyThenCritic):
    """Greedy policy, step size, mixture, distillation; then the critic is fitted."""

    config: CPIConfig

    def improve_policy(self, learner: Learner, experience: Experience) -> dict[str, float]:
        old = _copy(learner.policy_parameters())
        try:
            return self._mixture(learner, experience, old)
        except FloatingPointError:
            learner.load_policy(old)
            raise

    def _mixture(self, learner: Learner, experience: Experience, old: Vector) -> dict[str, float]:
        """Learn the greedy policy and move to its mixture with the old one; returns metrics."""
        config = self.config
        learned, judged = self._split(experience)

        learner.forget_policy_moments()
        metrics = learner.descend(learned, self.loss, num_epochs=config.num_greedy_epochs, with_values=False)
        greedy = _copy(learner.policy_parameters())
        ratios = self._ratios(learner, judged)
        check_finite("probability ratios of the greedy policy", ratios, judged.mask)
        sampled = (ratios, judged.advantages, judged.mask, judged.importance_weights)
        if config.step_size == "bound":
            alpha = bound_step_size(*sampled, gamma=config.gamma)
        else:
            alpha = held_out_step_size(*sampled)
        advantage = policy_advantage(*sampled)
        metrics |= {"cpi/step_size": alpha, "cpi/greedy_advantage": advantage}
        if alpha in (0, 1):
            learner.load_policy(greedy if alpha else old)
            return metrics
        # Near the mixture, as a start.
        learner.load_policy({name: torch.lerp(start, greedy[name], alpha) for name, start in old.items()})
        distilled = self._distill(learner, experience, old, greedy, alpha)
        skipped = [part["policy/skipped_steps"] for part in (metrics, distilled) if "policy/skipped_steps" in part]
        return metrics | distilled | ({"policy/skipped_steps": sum(skipped)} if skipped else {})

    def _distill(
        self, learner: Learner, experience: Experience, old: Vector, greedy: Vector, alpha: float
    ) -> dict[str, float]:
        """Descend on the KL from the mixture of two policies, given by their parameters."""
        old_hidden, old_head = learner.snapshot(experience, old)
        greedy_hidden, greedy_head = learner.snapshot(experience, greedy)
        experience = dataclasses.replace(experience, old_hidden=old_hidden, target_hidden=greedy_hidden)
        loss = self.distillation_loss(old_head, greedy_head, alpha)

        start, before = _copy(learner.policy_parameters()), learner.measure(experience, loss)
        if not math.isfinite(before["loss/distillation"]):
            raise FloatingPointError(f"the distillation's loss is not finite ({before['loss/distillation']})")
        learner.forget_policy_moments()
        epochs = learner.descend(experience, loss, num_epochs=self.config.num_distill_epochs, with_values=False)
        skipped = {name: count for name, count in epochs.items() if name == "policy/skipped_steps"}
        after = learner.measure(experience, loss)
        if after["loss/distillation"] < before["loss/distillation"]:
            return after | skipped
        # Adam's first steps have the length of its learning rate, which for a small α can lead away.
        learner.load_policy(start)
        return before | skipped

    def distillation_loss(self, old_head: LMHead, greedy_head: LMHead, alpha: float) -> Loss:
        """KL((1 − α) π + α π' ‖ π_θ) up to a constant, averaged over states as `loss_agg` says.

        The states of π and π' are in the experience. The metrics of the two KLs are means over tokens.
        """

        def loss(batch: Experience, hidden: Tensor, head: LMHead, values, ref_head) -> StepOutput:
            new = ((hidden, head), batch.mask, self.temperature, self.backend)
            kl_old = kl_from((batch.old_hidden, old_head), *new)  # [b, T]
            kl_greedy = kl_from((batch.target_hidden, greedy_head), *new)
            weights = formulas.aggregation_weights(batch.mask, self.config.loss_agg, kl_old.dtype)
            value = (weights * ((1.0 - alpha) * kl_old + alpha * kl_greedy)).sum()
            tokens = batch.mask.sum()
            return StepOutput(
                value,
                {
                    "loss/distillation": value.detach(),
                    "policy/kl": kl_old.detach().sum() / tokens,
                    "cpi/kl_from_greedy": kl_greedy.detach().sum() / tokens,
                },
            )

        return loss

    def _split(self, experience: Experience) -> tuple[Experience, Experience]:
        """The sequences that the greedy policy learns from, and those that its step is judged by."""
        if self.config.step_size == "bound":
            return experience, experience
        order = torch.randperm(len(experience)).to(experience.mask.device)
        held_out = max(1, min(len(order) - 1, round(self.config.held_out_fraction * len(order))))
        return experience.select(order[held_out:]), experience.select(order[:held_out])

    @torch.no_grad()
    def _ratios(self, learner: Learner, experience: Experience) -> Tensor:
        """π(a|s) / π_old(a|s) [B, T] of the current policy; 1 on padding."""
        hidden, head = learner.snapshot(experience)
        with learner.autocast():
            options = head_arguments(head, self.temperature, self.backend)
            logprobs = linear_logprob(hidden, targets=experience.targets, **options).logprobs
        return (logprobs - experience.old_logprobs).masked_fill(~experience.mask, 0.0).exp()


def policy_advantage(ratios: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None = None) -> float:
    """E_{s ~ π, a ~ π'} A(s, a) − E_{s, a ~ π} A(s, a), of ratios π'(a|s) / π(a|s) and advantages, [B, T] each.

    The second term is 0 for the true A, and noise for an estimate. `weights` [B, T] are the importance weights where
    another distribution than π sampled. Without a token it is 0.
    """
    return ((ratios - 1.0) * _weighted(advantages, weights))[mask].sum().item() / max(mask.sum().item(), 1)


def bound_step_size(
    ratios: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None = None, *, gamma: float
) -> float:
    """The α that maximizes the improvement which Kakade & Langford's theorem 4.1 guarantees.

    After t tokens the mixture has left π with probability 1 − (1 − α)^t ≤ α t; then it can lose at most 2ε a token,
    ε = max_s |E_{a ~ π'} A(s, a)|. Over T tokens it gains at least α T 𝔸 − α² ε T (T − 1), with 𝔸 the mean policy
    advantage; the maximum is at α = 𝔸 / (2 ε (T − 1)). (The paper's (1 − γ)𝔸 / 4R is the same for T = 1/(1 − γ), up to
    a factor.) ε is estimated by the largest sampled |A|, as the paper uses R.

    Args:
        ratios, advantages, weights: [B, T], see `policy_advantage`; mask: [B, T] bool.
        gamma: the discount, which can make the horizon shorter than the longest completion.

    Returns:
        From 0 (no improvement is possible) to 1.
    """
    advantage = policy_advantage(ratios, advantages, mask, weights)
    if not 0.0 < advantage < math.inf:
        return 0.0
    horizon = float(mask.sum(1).max())
    if gamma < 1.0:
        horizon = min(horizon, 1.0 / (1.0 - gamma))
    worst = 2.0 * advantages[mask].abs().max().item() * (horizon - 1.0)
    return min(advantage / worst, 1.0) if worst > 0.0 else 1.0


def held_out_step_size(ratios: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None = None) -> float:
    """The α of 1, ½, ¼, ..., 1/1024 with the largest estimated gain on sequences not used to learn the greedy policy.

    By the performance-difference lemma (Kakade & Langford, 2002, lemma 6.1) the mixture's gain in return is the mean
    over its own completions of Σ_t A(s_t, a_t). Completions of π estimate it with the weight Π_{k ≤ t} (1 − α + α r_k)
    of each term. One standard error is subtracted, so that an α with widely spread weights is not preferred.

    Args:
        ratios, advantages, weights: [B, T] of held-out sequences, see `policy_advantage`; mask: [B, T] bool.

    Returns:
        0 if no estimate is above 0.
    """
    best, best_alpha = 0.0, 0.0
    advantages = _weighted(advantages, weights).masked_fill(~mask, 0.0)
    for alpha in (0.5**k for k in range(11)):
        mixture = (1.0 - alpha + alpha * ratios).masked_fill(~mask, 1.0).cumprod(1)
        # Less the same sum under π itself, whose expectation is 0: it removes variance.
        gains = ((mixture - 1.0) * advantages).sum(1)
        error = gains.std().item() / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        gain = gains.mean().item() - error
        if gain > best:
            best, best_alpha = gain, alpha
    return best_alpha


def _weighted(advantages: Tensor, weights: Tensor | None) -> Tensor:
    return advantages if weights is None else weights * advantages


def _copy(parameters: Vector) -> Vector:
    return {name: p.detach().clone() for name, p in parameters.items()}
