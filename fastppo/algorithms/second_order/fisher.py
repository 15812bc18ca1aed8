"""The Fisher matrix of a language model's policy times a vector of its parameters, from hidden states.

F is the Hessian at π = π_old of the mean KL(π_old ‖ π) over the sampled states,

    F = mean_n J_nᵀ (diag p_n − p_n p_nᵀ) J_n      J_n = ∂z_n/∂θ, of a state's logits z_n;  p_n = softmax(z_n)

which for a softmax is also the Gauss-Newton matrix of that KL (Martens, 2020, arXiv:1412.1193). Neither F nor any
logits are ever there:

    gauss_newton        v ── forward mode ──> ∂h [n, D], ∂W [V, D] ── F of the softmax ──> u ── reverse mode ──> F v
                        (Schraudolph, 2002; Schulman et al., 2015, appendix C.1)
    finite_difference   (∇KL(π_old ‖ π_{θ+εv}) − ∇KL(π_old ‖ π_{θ−εv})) / 2ε
                        for attention kernels that have no forward-mode derivative
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastppo.algorithms.algorithm import Head, Policy
from fastppo.algorithms.experience import Experience
from fastppo.algorithms.second_order.vectors import Vector, like, moved, norm, zero_sums
from fastppo.ops.fisher_vector_product import fisher_vector_product
from fastppo.ops.linear_kl import linear_kl

FisherMethod = Literal["gauss_newton", "finite_difference"]


class PolicyFisher:
    """v -> F v, over the sampled tokens of some sequences.

    Args:
        policy: whose parameters are θ; they are not changed.
        batches: the sequences, as many at a time as fit in memory.
        method: see above. gauss_newton costs about two forward passes and a forward and backward pass; the other, two
            of the latter.
        temperature: of the sampler; divides the logits.
        backend: of the operators.

    Raises (by the product):
        ValueError: an attention kernel has no forward-mode derivative, or parameters too coarse for differences.
        FloatingPointError: the direction is so steep that no difference can be taken along it.
    """

    def __init__(
        self,
        policy: Policy,
        batches: Sequence[Experience],
        *,
        method: FisherMethod = "gauss_newton",
        temperature: float = 1.0,
        backend: str | None = None,
    ) -> None:
        self.policy, self.batches, self.method = policy, batches, method
        self.temperature, self.backend = temperature, backend
        self.num_tokens = max(sum(int(batch.mask.sum()) for batch in batches), 1)
        self._old_outputs: list[tuple[Tensor, Head]] = []
        self._length: float | None = None
        """‖εv‖ of the last finite difference."""

    @torch.enable_grad()
    def __call__(self, v: Vector) -> Vector:
        """F v, in the dtypes and on the devices of v."""
        parameters = self.policy.parameters()
        product = self._gauss_newton if self.method == "gauss_newton" else self._finite_difference
        return like(product(parameters, like(v, parameters)), v)

    def _gauss_newton(self, parameters: Vector, v: Vector) -> Vector:
        total = zero_sums(parameters)
        for batch in self.batches:
            d_hidden, d_weight, d_bias = self._forward_mode(batch, parameters, v)
            hidden, head = self.policy.hidden(batch)
            with self.policy.autocast():
                u = fisher_vector_product(
                    hidden.detach(),
                    head.weight.detach(),
                    torch.zeros_like(hidden) if d_hidden is None else d_hidden,
                    d_weight,
                    bias=None if head.bias is None else head.bias.detach(),
                    d_bias=d_bias,
                    mask=batch.mask,
                    temperature=self.temperature,
                    logit_scale=head.logit_scale,
                    softcap=head.softcap,
                    backend=self.backend,
                )
            # A tied head is a parameter itself: what reaches it directly and through the hidden states adds up.
            outputs = [(hidden, u.hidden), (head.weight, u.weight), (head.bias, u.bias)]
            self._add_gradients(total, parameters, [(o, c) for o, c in outputs if c is not None and o.requires_grad])
        return total

    @torch.no_grad()
    def _forward_mode(self, batch: Experience, parameters: Vector, v: Vector) -> list[Tensor | None]:
        """Derivatives along v of the hidden states, the head's weight and its bias; None of what does not move."""
        try:
            # Of torch's attention kernels only the plain one can be differentiated forwards.
            with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(p.detach(), v[name]) for name, p in parameters.items()}
                hidden, head = self.policy.hidden(batch, duals)
                outputs = (hidden, head.weight, head.bias)
                return [None if output is None else forward_ad.unpack_dual(output).tangent for output in outputs]
        except (NotImplementedError, RuntimeError) as error:
            if "forward" not in str(error) and "jvp" not in str(error):
                raise
            raise ValueError(
                "fisher_method: gauss_newton needs forward-mode derivatives, which a part of this model does not have "
                f"({str(error).splitlines()[0]}); take finite_difference, or another model.attn_implementation"
            ) from error

    def _finite_difference(self, parameters: Vector, v: Vector) -> Vector:
        size = norm(v)
        if size == 0.0:
            return zero_sums(parameters)
        step, product = self._step_ahead(parameters, v, size)
        behind, _ = self._kl_gradient(moved(parameters, -step, v))
        for name, tensor in product.items():
            tensor.sub_(behind[name]).div_(2.0 * step)
        return product

    def _step_ahead(self, parameters: Vector, v: Vector, size: float) -> tuple[float, Vector]:
        """ε, and ∇KL(π_old ‖ π) at θ + εv.

        ε is such that log-probabilities move by about s = 3·∛(machine epsilon), where truncation, s², and rounding,
        machine epsilon / s, are of one size. Parameter space has no such measure: along the policy gradient a step of
        1e-4 ‖θ‖ can turn a policy over, while in most directions nothing happens. But a step's KL is ½s², so it is
        searched for, from what the last direction needed.
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
            # Far out the KL is no longer quadratic, so one leap need not get there.
            leap = (target / max(kl, 1e-4 * target)) ** 0.5 if math.isfinite(kl) else 0.0
            step = min(step * max(leap, 1e-2), farthest)
        raise FloatingPointError("no step along a direction moves the policy by a small amount")

    def _kl_gradient(self, parameters: Vector) -> tuple[Vector, float]:
        """The gradient of the mean KL(π_old ‖ π) at other parameters, and its value. Never in autocast's precision."""
        total, value = zero_sums(parameters), 0.0
        for index, batch in enumerate(self.batches):
            leaves = {name: p.requires_grad_() for name, p in parameters.items()}
            hidden, head = self.policy.hidden(batch, leaves)
            old_hidden, old_head = self._old(index)
            kl = linear_kl(
                hidden,
                head.weight,
                old_hidden,
                old_head.weight,
                kind="forward",
                mask=batch.mask,
                bias=head.bias,
                ref_bias=old_head.bias,
                temperature=self.temperature,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                backend=self.backend,
            ).sum()
            value += kl.item() / self.num_tokens
            self._add_gradients(total, leaves, [(kl, torch.ones_like(kl))])
        return total, value

    def _old(self, index: int) -> tuple[Tensor, Head]:
        """π_old's hidden states of a batch, computed once, and its head."""
        if index == len(self._old_outputs):
            with torch.no_grad():
                self._old_outputs.append(self.policy.hidden(self.batches[index]))
        return self._old_outputs[index]

    def _add_gradients(self, total: Vector, leaves: Vector, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """total += the gradient in the leaves of Σ output · cotangent, a token's share of it."""
        outputs = [output for output, _ in pairs]
        cotangents = [cotangent.to(output.dtype) / self.num_tokens for output, cotangent in pairs]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
        for tensor, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                tensor.add_(gradient)
