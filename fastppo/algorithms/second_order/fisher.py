"""The Fisher matrix of a language model's policy times a vector of its parameters, from hidden states.

F is the Hessian at π = π_old of the mean KL(π_old ‖ π) over the sampled states,

    F = mean_n J_nᵀ (diag p_n − p_n p_nᵀ) J_n      J_n = ∂z_n/∂θ, of a state's logits z_n;  p_n = softmax(z_n)

which for a softmax is also the Gauss-Newton matrix of that KL (Martens, 2020, arXiv:1412.1193). Neither F nor logits
are materialized:

    gauss_newton        v ── forward mode ──> ∂h [n, D], ∂W [V, D] ── F of the softmax ──> u ── reverse mode ──> F v
                        (Schraudolph, 2002; Schulman et al., 2015, appendix C.1)
    finite_difference   (∇KL(π_old ‖ π_{θ+εv}) − ∇KL(π_old ‖ π_{θ−εv})) / 2ε
                        for attention kernels without a forward-mode derivative
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastppo.algorithms.algorithm import head_arguments, kl_from
from fastppo.algorithms.experience import Experience
from fastppo.algorithms.learner import Learner
from fastppo.algorithms.second_order.conjugate_gradient import Vector, moved, norm
from fastppo.models.head import LMHead
from fastppo.ops.fisher_vector_product import fisher_vector_product


class PolicyFisher:
    """v -> F v, over the sampled tokens of some sequences. F v has the dtypes of v, which are the parameters'.

    Args:
        learner: its policy's parameters are θ; they are not changed.
        batches: the sequences, or this rank's share, in parts that fit in memory.
        method: gauss_newton costs about two forward passes and one forward and backward pass; finite_difference two
            forward and backward passes.
        temperature: of sampling; divides the logits.
        backend: of the operators; None chooses by device.

    Raises (by the product):
        ValueError: an attention kernel has no forward-mode derivative; parameters too coarse for finite differences.
        FloatingPointError: no step along the direction changes the policy by a small amount.
    """

    def __init__(
        self,
        learner: Learner,
        batches: Sequence[Experience],
        method: Literal["gauss_newton", "finite_difference"] = "gauss_newton",
        temperature: float = 1.0,
        backend: str | None = None,
    ) -> None:
        self.learner, self.batches, self.method = learner, batches, method
        self.temperature, self.backend = temperature, backend
        tokens = learner.ranks.each(lambda: sum(int(batch.mask.sum()) for batch in batches))
        self.num_tokens = max(sum(tokens), 1)
        self._length: float | None = None
        """‖εv‖ of the last finite difference."""

    @torch.enable_grad()
    def __call__(self, v: Vector) -> Vector:
        parameters = self.learner.policy_parameters()
        product = self._gauss_newton if self.method == "gauss_newton" else self._finite_difference
        return {name: tensor.to(v[name].dtype) for name, tensor in product(parameters, v).items()}

    def _gauss_newton(self, parameters: Vector, v: Vector) -> Vector:
        total = _zeros(parameters)
        for batch in self.batches:
            d_hidden, d_weight, d_bias = self._forward_mode(batch, parameters, v)
            hidden, head = self.learner.hidden(batch)
            with self.learner.autocast():
                u = fisher_vector_product(
                    hidden,
                    d_hidden=torch.zeros_like(hidden) if d_hidden is None else d_hidden,
                    d_weight=d_weight,
                    d_bias=d_bias,
                    mask=batch.mask,
                    **head_arguments(head, self.temperature, self.backend),
                )
            # A tied head is a parameter itself: its gradients, direct and through the hidden states, add up.
            outputs = [(hidden, u.hidden), (head.weight, u.weight), (head.bias, u.bias)]
            self._add_gradients(total, parameters, [(o, c) for o, c in outputs if c is not None and o.requires_grad])
        self.learner.ranks.sum_(total.values())
        return total

    @torch.no_grad()
    def _forward_mode(self, batch: Experience, parameters: Vector, v: Vector) -> list[Tensor | None]:
        """Derivatives along v of the hidden states, the head's weight and its bias; None where there is none."""
        try:
            # Of torch's attention kernels only the plain one has a forward-mode derivative.
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(p.detach(), v[name]) for name, p in parameters.items()}
                hidden, head = self.learner.hidden(batch, duals)
                outputs = (hidden, head.weight, head.bias)
                return [None if output is None else forward_ad.unpack_dual(output).tangent for output in outputs]
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error) and "jvp" not in str(error):
                raise
            raise ValueError(
                "fisher_method: gauss_newton needs forward-mode derivatives, which a part of this model does not have "
                f"({str(error).splitlines()[0]}); use finite_difference, or another model.attn_implementation"
            ) from error

    def _finite_difference(self, parameters: Vector, v: Vector) -> Vector:
        size = norm(v)
        if size == 0.0:
            return _zeros(parameters)
        step, product = self._step_ahead(parameters, v, size)
        behind, _ = self._kl_gradient(moved(parameters, -step, v))
        for name, tensor in product.items():
            tensor.sub_(behind[name]).div_(2.0 * step)
        return product

    def _step_ahead(self, parameters: Vector, v: Vector, size: float) -> tuple[float, Vector]:
        """ε, and ∇KL(π_old ‖ π) at θ + εv.

        ε is chosen so that log-probabilities change by about s = 3·∛(machine epsilon), where the truncation error s²
        and the rounding error, machine epsilon / s, are of one size. The length of εv does not tell: 1e-4 ‖θ‖ along the
        policy gradient can change a policy completely, while most directions change nothing. But a step's KL is about
        ½s², so ε is searched for by its KL, starting from the length that the last direction needed.
        """
        resolution = max(torch.finfo(p.dtype).eps for p in parameters.values())
        if resolution > 1e-5:
            raise ValueError("fisher_method: finite_difference needs parameters of at least float32 (model.dtype)")
        target = 4.5 * resolution ** (2 / 3)
        farthest = norm(parameters) / size
        step = 1e-4 * farthest if self._length is None else self._length / size
        for _ in range(20):
            gradient, kl = self._kl_gradient(moved(parameters, step, v))
            flat = kl < target / 10 and step >= farthest
            if target / 10 <= kl <= 10 * target or flat:
                self._length = None if flat else step * size * (target / kl) ** 0.5
                return step, gradient
            # Far away the KL is not quadratic, so one leap may not suffice.
            leap = (target / max(kl, 1e-4 * target)) ** 0.5 if math.isfinite(kl) else 0.0
            step = min(step * max(leap, 1e-2), farthest)
        raise FloatingPointError("no step along a direction moves the policy by a small amount")

    def _kl_gradient(self, parameters: Vector) -> tuple[Vector, float]:
        """The gradient of the mean KL(π_old ‖ π) at other parameters, and its value; outside autocast."""
        total, value = _zeros(parameters), 0.0
        for batch, old in zip(self.batches, self._old, strict=True):
            leaves = {name: p.requires_grad_() for name, p in parameters.items()}
            hidden, head = self.learner.hidden(batch, leaves)
            kl = kl_from(old, (hidden, head), batch.mask, self.temperature, self.backend).sum()
            value += kl.item() / self.num_tokens
            self._add_gradients(total, leaves, [(kl, torch.ones_like(kl))])
        self.learner.ranks.sum_(total.values())
        return total, sum(self.learner.ranks.each(lambda: value))

    @cached_property
    @torch.no_grad()
    def _old(self) -> list[tuple[Tensor, LMHead]]:
        """π_old's hidden states of each batch, and its head."""
        return [self.learner.hidden(batch) for batch in self.batches]

    def _add_gradients(self, total: Vector, leaves: Vector, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """total += the gradient in the leaves of Σ output · cotangent / num_tokens."""
        outputs = [output for output, _ in pairs]
        cotangents = [cotangent.to(output.dtype) / self.num_tokens for output, cotangent in pairs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
        for tensor, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                tensor.add_(gradient)


def _zeros(parameters: Vector) -> Vector:
    """Zeros to sum gradients in: float32 for parameters of half precision."""
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        for name, p in parameters.items()
    }
