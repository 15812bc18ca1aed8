"""Conservative policy iteration (Kakade & Langford, 2002, "Approximately optimal approximate reinforcement learning").

    π′      an approximately greedy policy: first-order epochs from π on E_{s, a ~ π} [π′(a|s)/π(a|s) · A(s, a)], which
            nothing clips, so that it tends to the best sampled action of every state
    α       how much of it: from the paper's lower bound on the improvement, or searched for on held-out sequences
    π ← (1 − α) π + α π′    at every state: distilled into one network by epochs of
            (1 − α) KL(π ‖ π_θ) + α KL(π′ ‖ π_θ) = KL((1 − α) π + α π′ ‖ π_θ) + a constant

The mixture is the paper's: a coin is thrown at each state (each token), not one for a whole completion. It is fitted at
the states that π visits; for small α those are nearly the states that the mixture visits.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fastppo.algorithms.algorithm import Head, Learner, Loss, StepOutput
from fastppo.algorithms.experience import Experience
from fastppo.algorithms.policy_then_critic import PolicyThenCritic
from fastppo.algorithms.second_order.policy_kl import kl_from, snapshot
from fastppo.algorithms.second_order.vectors import Vector
from fastppo.ops.linear_logprob import linear_logprob


class ConservativePolicyIteration(PolicyThenCritic):
    """See `fastppo.training.config.CPIConfig` for its options."""

    def improve_policy(self, learner: Learner, experience: Experience) -> dict[str, float]:
        """Greedy policy, step size, mixture."""
        config, policy = self.config, learner.policy
        old = _copy(policy.parameters())
        learned, judged = self._split(experience)

        learner.forget_policy_moments()
        metrics = learner.descend(
            learned, self.loss, num_epochs=config.num_greedy_epochs, num_mini_batches=config.num_mini_batches
        )
        greedy = _copy(policy.parameters())
        ratios = self._ratios(learner, judged)
        if config.step_size == "bound":
            alpha = bound_step_size(ratios, judged.advantages, judged.mask, gamma=config.gamma)
        else:
            alpha = held_out_step_size(ratios, judged.advantages, judged.mask)
        # Near the mixture to begin with; and it is the whole answer for α = 0 (to the bit) and α = 1.
        policy.load({name: torch.lerp(start, greedy[name], alpha) if 0 < alpha < 1 else (greedy if alpha else old)[name]
                     for name, start in old.items()})  # fmt: skip
        metrics |= {"cpi/step_size": alpha, "cpi/greedy_advantage": policy_advantage(ratios, judged)}
        if 0 < alpha < 1:
            metrics |= self._distill(learner, experience, old, greedy, alpha)
        return metrics

    def _distill(
        self, learner: Learner, experience: Experience, old: Vector, greedy: Vector, alpha: float
    ) -> dict[str, float]:
        """Bring the policy, which is near it, to the mixture of two others, given by their parameters."""
        old_hidden, old_head = snapshot(learner, experience, old)
        greedy_hidden, greedy_head = snapshot(learner, experience, greedy)
        experience = dataclasses.replace(experience, old_hidden=old_hidden, target_hidden=greedy_hidden)
        loss = self.distillation_loss(old_head, greedy_head, alpha)

        def distance(metrics: dict[str, float]) -> float:
            return (1.0 - alpha) * metrics["policy/kl"] + alpha * metrics["cpi/kl_from_greedy"]

        start, before = _copy(learner.policy.parameters()), learner.measure(experience, loss)
        learner.forget_policy_moments()
        learner.descend(
            experience,
            loss,
            num_epochs=self.config.num_distill_epochs,
            num_mini_batches=self.config.num_mini_batches,
        )
        after = learner.measure(experience, loss)
        if distance(after) < distance(before):
            return after
        # The optimizer's first steps are as long as its learning rate: for a small α they can lead away.
        learner.policy.load(start)
        return before

    def loss(
        self, batch: Experience, hidden: Tensor, head: Head, values: Tensor | None, ref_head: Head | None
    ) -> StepOutput:
        """The greedy policy's: −r A, less the entropy bonus, plus the KL penalty; see `Algorithm.loss`."""
        return StepOutput(*self.policy_gradient_loss(batch, hidden, head, ref_head))

    def distillation_loss(self, old_head: Head, greedy_head: Head, alpha: float) -> Loss:
        """KL((1 − α) π + α π′ ‖ π_θ) up to a constant, from the states of π and π′ that the experience holds."""

        def loss(batch: Experience, hidden: Tensor, head: Head, values, ref_head) -> StepOutput:
            options = {"mask": batch.mask, "temperature": self.temperature, "backend": self.backend}
            count = batch.mask.sum()
            kl_old = kl_from(batch.old_hidden, old_head, hidden, head, **options).sum() / count
            kl_greedy = kl_from(batch.target_hidden, greedy_head, hidden, head, **options).sum() / count
            metrics = {"policy/kl": kl_old.detach(), "cpi/kl_from_greedy": kl_greedy.detach()}
            return StepOutput((1.0 - alpha) * kl_old + alpha * kl_greedy, metrics)

        return loss

    def _split(self, experience: Experience) -> tuple[Experience, Experience]:
        """What the greedy policy learns from, and what its step is judged by."""
        if self.config.step_size == "bound":
            return experience, experience
        order = torch.randperm(len(experience)).to(experience.mask.device)
        held_out = max(1, min(len(order) - 1, round(self.config.held_out_fraction * len(order))))
        return experience.select(order[held_out:]), experience.select(order[:held_out])

    @torch.no_grad()
    def _ratios(self, learner: Learner, experience: Experience) -> Tensor:
        """π(a|s) / π_old(a|s) [B, T] of the policy as it is now; 1 on padding."""
        parts = []
        for batch in learner.micro_batches(experience):
            hidden, head = learner.policy.hidden(batch)
            with learner.policy.autocast():
                logprobs = linear_logprob(
                    hidden,
                    head.weight,
                    batch.targets.masked_fill(~batch.mask, -100),
                    bias=head.bias,
                    temperature=self.temperature,
                    logit_scale=head.logit_scale,
                    softcap=head.softcap,
                    backend=self.backend,
                ).logprobs
            parts.append((logprobs - batch.old_logprobs).masked_fill(~batch.mask, 0.0).exp())
        return torch.cat(parts)


def policy_advantage(ratios: Tensor, experience: Experience) -> float:
    """E_{s ~ π, a ~ π′} A(s, a) − E_{s, a ~ π} A(s, a); the second is 0 of the true A, and noise of an estimate."""
    return ((ratios - 1.0) * experience.advantages)[experience.mask].mean().item()


def bound_step_size(ratios: Tensor, advantages: Tensor, mask: Tensor, *, gamma: float) -> float:
    """The α for which the improvement that Kakade & Langford's theorem 4.1 guarantees is greatest.

    A mixture that follows π′ with probability α has, t tokens into a completion, strayed from π with probability
    1 − (1 − α)^t ≤ α t, and only then can it lose, by at most 2ε a token, ε = max_s |E_{a ~ π′} A(s, a)|. Over a
    horizon of T tokens it gains at least α T 𝔸 − α² ε T (T − 1), 𝔸 the mean policy advantage: at its greatest where
    α = 𝔸 / (2 ε (T − 1)). (The paper's (1 − γ)𝔸 / 4R is the same for T = 1/(1 − γ), to a factor.) For ε stands the
    greatest sampled |A|, as R does there.

    Args:
        ratios, advantages: [B, T]; mask: [B, T] bool.
        gamma: the discount, which may make the horizon shorter than the longest completion.

    Returns:
        From 0 (no improvement is to be had) to 1.
    """
    advantage = ((ratios - 1.0) * advantages)[mask].mean().item()
    horizon = float(mask.sum(1).max())
    if gamma < 1.0:
        horizon = min(horizon, 1.0 / (1.0 - gamma))
    worst = 2.0 * advantages[mask].abs().max().item() * (horizon - 1.0)
    if not 0.0 < advantage < math.inf:
        return 0.0
    return min(advantage / worst, 1.0) if worst > 0.0 else 1.0


def held_out_step_size(ratios: Tensor, advantages: Tensor, mask: Tensor, *, num_halvings: int = 10) -> float:
    """The α of 1, ½, ¼, ... that promises most on sequences that the greedy policy has not learned from.

    By the performance-difference lemma (Kakade & Langford, 2002, lemma 6.1) the mixture gains in return the mean over
    its own completions of Σ_t A(s_t, a_t), which completions of π estimate with the weight Π_{k ≤ t} (1 − α + α r_k) of
    each term. What is compared is that estimate less one standard error, so that an α whose weights are all over the
    place promises little.

    Args:
        ratios, advantages: [B, T] of held-out sequences; mask: [B, T] bool.

    Returns:
        0 if none promises anything.
    """
    best, best_alpha = 0.0, 0.0
    advantages = advantages.masked_fill(~mask, 0.0)
    for alpha in (0.5**k for k in range(num_halvings + 1)):
        weights = (1.0 - alpha + alpha * ratios).masked_fill(~mask, 1.0).cumprod(1)
        # Less the same sum under π itself, whose expectation is 0: what is common to both then has no variance.
        gains = ((weights - 1.0) * advantages).sum(1)
        error = gains.std().item() / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        promise = gains.mean().item() - error
        if promise > best:
            best, best_alpha = promise, alpha
    return best_alpha


def _copy(parameters: Vector) -> Vector:
    return {name: p.detach().clone() for name, p in parameters.items()}
