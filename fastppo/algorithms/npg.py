"""Natural policy gradient (Kakade, 2001, "A natural policy gradient", NIPS 14), with a step of a given KL.

    L(θ) = E_{s, a ~ π_old}[π(a|s) / π_old(a|s) · A(s, a)]       its gradient g at θ_old is the policy gradient
    x = (F + λI)⁻¹ g                                             conjugate gradients, from products with F alone
    θ ← θ_old + sqrt(2δ / xᵀF x) · x                             so that KL(π_old ‖ π) = δ to second order

L's terms have the importance weights of `fastppo.algorithms.correction`, where there are some; so its gradient and the
measured improvement do. F and the KL are exact over the vocabulary at the visited states, and have none.

Kakade's step size is a constant; a constant KL (Rajeswaran et al., 2017, arXiv:1703.02660) does not need to be tuned to
the scale of the rewards. TRPO (`fastppo.algorithms.trpo`) adds a line search.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.algorithms.algorithm import PolicyThenCritic, kl_from
from fastppo.algorithms.config import NPGConfig
from fastppo.algorithms.experience import Experience
from fastppo.algorithms.learner import Learner, Loss, StepOutput
from fastppo.algorithms.second_order.conjugate_gradient import Vector, axpy_, conjugate_gradient, dot, moved, norm
from fastppo.algorithms.second_order.fisher import PolicyFisher
from fastppo.models.head import LMHead


class Trial(NamedTuple):
    """A step's measured effect."""

    improvement: float
    """L(θ) − L(θ_old)."""
    kl: float
    """Mean KL(π_old ‖ π) over the whole vocabulary, in nats a token."""


class NaturalPolicyGradient(PolicyThenCritic):
    """One step of the policy along the natural gradient; then the critic is fitted."""

    config: NPGConfig

    def improve_policy(self, learner: Learner, experience: Experience) -> dict[str, float]:
        """One step of the policy. Trials use parameters of their own; the policy's change at the end, or not at all."""
        old_hidden, old_head = learner.snapshot(experience)
        experience = dataclasses.replace(experience, old_hidden=old_hidden)
        gradient, metrics = learner.gradient(experience, self.loss)
        ascent = {name: tensor.neg_() for name, tensor in gradient.items()}  # g: the loss is −L

        def parameters_at(fraction: float) -> Vector:
            return moved(learner.policy_parameters(), fraction * scale, x)

        def evaluate(fraction: float) -> Trial:
            measured = learner.measure(experience, self.trial_loss(old_head), parameters_at(fraction))
            return Trial(metrics["loss/surrogate"] - measured["loss/surrogate"], measured["policy/kl"])

        if not math.isfinite(metrics["loss/surrogate"]):
            raise FloatingPointError(f"the surrogate loss is not finite ({metrics['loss/surrogate']})")
        x, scale, solver_metrics = self.natural_gradient(learner, experience, ascent)
        taken, trial = self.choose(evaluate, scale * dot(ascent, x)) if scale else (0.0, Trial(0.0, 0.0))
        if not math.isfinite(trial.improvement + trial.kl):
            raise FloatingPointError(f"surrogate or KL not finite after the natural gradient's step ({trial})")
        if taken:
            learner.load_policy(parameters_at(taken))
        return {
            **metrics,
            **solver_metrics,
            "policy/kl": trial.kl,
            "policy/improvement": trial.improvement,
            "policy/step_fraction": taken,
        }

    def natural_gradient(self, learner: Learner, experience: Experience, g: Vector) -> tuple[Vector, float, dict]:
        """x = (F + λI)⁻¹ g; the scale for which the KL of scale · x is δ, 0 if xᵀF x is 0; metrics of the solver.

        Raises:
            FloatingPointError: the gradient, a Fisher-vector product or xᵀF x is not finite.
        """
        config = self.config
        if config.fisher_fraction < 1.0:  # F may be rougher than the gradient (appendix C of the TRPO paper)
            count = math.ceil(config.fisher_fraction * len(experience))
            rows = torch.randperm(len(experience))[:count].sort().values
            experience = experience.select(rows.to(experience.mask.device))
        batches = list(learner.micro_batches(experience))
        fisher = PolicyFisher(learner, batches, config.fisher_method, self.temperature, self.backend)

        def damped(v: Vector) -> Vector:
            product = fisher(v)
            axpy_(product, config.damping, v)
            return product

        limits = {"max_iterations": config.cg_iterations, "relative_tolerance": config.cg_tolerance}
        solved = conjugate_gradient(damped, g, **limits)
        # xᵀF x, not xᵀ(F + λI)x: the damping must not shorten the step.
        curvature = dot(solved.x, fisher(solved.x)) if solved.iterations else 0.0
        if not math.isfinite(curvature):
            raise FloatingPointError(f"the natural gradient's curvature is not finite ({curvature})")
        scale = math.sqrt(2.0 * config.max_kl / curvature) if curvature > 0.0 else 0.0
        metrics = {"cg/iterations": float(solved.iterations), "cg/residual": solved.relative_residual}
        return solved.x, scale, metrics | {"policy/grad_norm": norm(g)}

    def choose(self, evaluate: Callable[[float], Trial], expected_improvement: float) -> tuple[float, Trial]:
        """The fraction of the step to take, and its measured effect. Here: the whole step.

        `expected_improvement` is that of L by the whole step, to first order.
        """
        return 1.0, evaluate(1.0)

    def policy_loss(self, batch: Experience, hidden: Tensor, head: LMHead, ref_head: LMHead | None) -> StepOutput:
        """−L, with entropy bonus and KL penalty."""
        loss, metrics = super().policy_loss(batch, hidden, head, ref_head)
        return StepOutput(loss, metrics | {"loss/surrogate": loss.detach()})

    def trial_loss(self, old_head: LMHead) -> Loss:
        """`loss`, and the mean KL to the policy that sampled, whose states are in the experience."""

        def loss(batch: Experience, hidden: Tensor, head: LMHead, values: None, ref_head: LMHead | None) -> StepOutput:
            value, metrics = self.policy_loss(batch, hidden, head, ref_head)
            kl = kl_from((batch.old_hidden, old_head), (hidden, head), batch.mask, self.temperature, self.backend)
            return StepOutput(value, metrics | {"policy/kl": kl.sum() / batch.mask.sum()})

        return loss
