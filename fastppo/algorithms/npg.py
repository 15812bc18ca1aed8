"""Natural policy gradient (Kakade, 2001, "A natural policy gradient", NIPS 14), with a step of a given KL.

    L(θ) = E_{s, a ~ π_old} [π(a|s) / π_old(a|s) · A(s, a)]     its gradient g at θ_old is the policy gradient
    x = (F + λI)⁻¹ g                                             conjugate gradients, from products with F alone
    θ ← θ_old + sqrt(2δ / xᵀF x) · x                             so that to second order KL(π_old ‖ π) = δ

Kakade's step size is a constant; one of constant KL (Rajeswaran et al., 2017, arXiv:1703.02660) needs no tuning to the
scale of the rewards. TRPO (`fastppo.algorithms.trpo`) is this with a line search.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.algorithms.algorithm import Head, Learner, Loss, StepOutput
from fastppo.algorithms.experience import Experience
from fastppo.algorithms.policy_then_critic import PolicyThenCritic
from fastppo.algorithms.preconditioner import fisher_diagonal
from fastppo.algorithms.second_order.conjugate_gradient import conjugate_gradient
from fastppo.algorithms.second_order.fisher import PolicyFisher
from fastppo.algorithms.second_order.line_search import Trial
from fastppo.algorithms.second_order.policy_kl import kl_from, snapshot
from fastppo.algorithms.second_order.vectors import Vector, axpy_, dot, moved, norm


class NaturalStep(NamedTuple):
    """The step of KL δ, as far as a quadratic model goes."""

    direction: Vector
    """x, in the vectors' dtype and on their device."""
    scale: float
    """θ moves by scale · x; 0 where there is nowhere to go."""
    expected_improvement: float
    """Of L, to first order: scale · gᵀx."""
    metrics: dict[str, float]


class NaturalPolicyGradient(PolicyThenCritic):
    """See `fastppo.training.config.NPGConfig` for its options."""

    def improve_policy(self, learner: Learner, experience: Experience) -> dict[str, float]:
        """One step of the policy, which changes at the very end or not at all: trials have parameters of their own."""
        old_hidden, old_head = snapshot(learner, experience)
        experience = dataclasses.replace(experience, old_hidden=old_hidden)
        gradient, metrics = learner.gradient(experience, self.loss)
        try:
            step = self.natural_step(learner, experience, gradient)
        except FloatingPointError as error:
            learner.skip_nonfinite(str(error))
            return metrics | {"policy/skipped_steps": 1.0}

        def parameters_at(fraction: float) -> Vector:
            return moved(learner.policy.parameters(), fraction * step.scale, step.direction)

        def evaluate(fraction: float) -> Trial:
            measured = learner.measure(experience, self.trial_loss(old_head), parameters_at(fraction))
            return Trial(metrics["loss/surrogate"] - measured["loss/surrogate"], measured["policy/kl"])

        taken, trial = self.choose(evaluate, step) if step.scale else (0.0, Trial(0.0, 0.0))
        if not math.isfinite(trial.improvement + trial.kl):
            learner.skip_nonfinite(f"after the natural gradient's step: surrogate or KL not finite ({trial})")
        elif taken:
            learner.policy.load(parameters_at(taken))
        return {
            **metrics,
            **step.metrics,
            "policy/kl": trial.kl,
            "policy/improvement": trial.improvement,
            "policy/step_fraction": taken,
        }

    def natural_step(self, learner: Learner, experience: Experience, gradient: Vector) -> NaturalStep:
        """Solve for the natural gradient and scale it, given the gradient of the loss, whose memory is used.

        Raises:
            FloatingPointError: the gradient or a Fisher-vector product is not finite.
        """
        config, policy = self.config, learner.policy
        batches = list(learner.micro_batches(self._fisher_sample(experience)))
        operators = {"temperature": self.temperature, "backend": self.backend}
        fisher = PolicyFisher(policy, batches, method=config.fisher_method, **operators)
        diagonal = None
        if config.preconditioner == "diagonal":
            # With the exponent of Martens, 2010, section 4.7: the estimate is noisy, and F is not diagonal.
            probed = fisher_diagonal(policy, batches, num_probes=config.preconditioner_probes, **operators)
            diagonal = self._as_vectors({n: d.add_(config.damping).pow_(0.75) for n, d in probed.items()})

        def damped(v: Vector) -> Vector:
            product = fisher(v)
            axpy_(product, config.damping, v)
            return product

        ascent = self._as_vectors({name: tensor.neg_() for name, tensor in gradient.items()})
        solved = conjugate_gradient(
            damped,
            ascent,
            max_iterations=config.cg_iterations,
            relative_tolerance=config.cg_tolerance,
            diagonal=diagonal,
        )
        # Of F, not of F + λI, so that the damping does not shorten the step.
        curvature = dot(solved.x, fisher(solved.x)) if solved.iterations else 0.0
        scale = math.sqrt(2.0 * config.max_kl / curvature) if curvature > 0.0 else 0.0
        metrics = {
            "policy/grad_norm": norm(ascent),
            "cg/iterations": float(solved.iterations),
            "cg/residual": solved.relative_residual,
        }
        return NaturalStep(solved.x, scale, scale * dot(ascent, solved.x), metrics)

    def choose(self, evaluate: Callable[[float], Trial], step: NaturalStep) -> tuple[float, Trial]:
        """What fraction of the step is taken, and what it does: here the whole."""
        return 1.0, evaluate(1.0)

    def loss(
        self, batch: Experience, hidden: Tensor, head: Head, values: Tensor | None, ref_head: Head | None
    ) -> StepOutput:
        """−L, less the entropy bonus, plus the KL penalty; see `Algorithm.loss` for the arguments."""
        loss, metrics = self.policy_gradient_loss(batch, hidden, head, ref_head)
        return StepOutput(loss, metrics | {"loss/surrogate": loss.detach()})

    def trial_loss(self, old_head: Head) -> Loss:
        """The same with the mean KL to the policy that sampled, whose states the experience holds."""

        def loss(batch: Experience, hidden: Tensor, head: Head, values: None, ref_head: Head | None) -> StepOutput:
            value, metrics = self.loss(batch, hidden, head, values, ref_head)
            kl = kl_from(
                batch.old_hidden,
                old_head,
                hidden,
                head,
                mask=batch.mask,
                temperature=self.temperature,
                backend=self.backend,
            )
            return StepOutput(value, metrics | {"policy/kl": kl.sum() / batch.mask.sum()})

        return loss

    def _fisher_sample(self, experience: Experience) -> Experience:
        """Some of the sequences: the Fisher matrix may be rougher than the gradient (appendix C of the TRPO paper)."""
        if self.config.fisher_fraction == 1.0:
            return experience
        count = math.ceil(self.config.fisher_fraction * len(experience))
        return experience.select(torch.randperm(len(experience))[:count].sort().values.to(experience.mask.device))

    def _as_vectors(self, vector: Vector) -> Vector:
        """In the dtype and on the device that the configuration keeps vectors in."""
        config = self.config
        dtype = None if config.vector_dtype == "auto" else getattr(torch, config.vector_dtype)
        device = "cpu" if config.vector_device == "cpu" else None
        return {name: tensor.to(device=device or tensor.device, dtype=dtype) for name, tensor in vector.items()}
