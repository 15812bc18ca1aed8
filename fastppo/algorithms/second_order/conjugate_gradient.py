"""Conjugate gradients: solve A x = b from products with A alone (Hestenes & Stiefel, 1952).

As natural-gradient methods use it: a few iterations from x = 0 with a stop relative to b (Schulman et al., 2015,
arXiv:1502.05477, appendix C), and a diagonal preconditioner by choice (Martens, 2010, section 4.7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastppo.algorithms.second_order.vectors import Vector, axpy_, dot, norm


class ConjugateGradientOutput(NamedTuple):
    x: Vector
    residual: Vector
    """b − A x, as the recurrence keeps it."""
    iterations: int
    """Products with A that were made."""
    relative_residual: float
    """‖b − A x‖ / ‖b‖."""


@torch.no_grad()
def conjugate_gradient(
    product: Callable[[Vector], Vector],
    b: Vector,
    *,
    max_iterations: int,
    relative_tolerance: float = 0.0,
    diagonal: Vector | None = None,
) -> ConjugateGradientOutput:
    """Solve A x = b for a symmetric positive definite A.

    Every vector is kept in the dtype and on the device of `b`: with `b` in bfloat16 or on the host, so are the four
    others (x, residual, direction and, during an iteration, A·direction).

    Args:
        product: v -> A v.
        b: the right-hand side; it is not changed.
        max_iterations: most products with A.
        relative_tolerance: stop once ‖b − A x‖ ≤ relative_tolerance · ‖b‖.
        diagonal: a positive approximation M of A's diagonal; M⁻¹ A is then what convergence depends on.

    Returns:
        ConjugateGradientOutput. An x that is short of the tolerance is still a direction of ascent: each iterate
        minimizes ½ xᵀA x − bᵀx over a growing subspace that holds M⁻¹ b.

    Raises:
        FloatingPointError: b or a product is not finite.
    """
    x = {name: torch.zeros_like(tensor) for name, tensor in b.items()}
    r = {name: tensor.clone() for name, tensor in b.items()}
    size = norm(b)
    if not math.isfinite(size):
        raise FloatingPointError("the right-hand side of conjugate gradients is not finite")
    p: Vector = {}
    rz, remaining, iteration = 0.0, size, 0
    while iteration < max_iterations and remaining > relative_tolerance * size:
        z = r if diagonal is None else {name: tensor / diagonal[name].to(tensor) for name, tensor in r.items()}
        rz, rz_before = dot(r, z), rz
        # p ← z + (rz / rz_before) p keeps the directions A-conjugate.
        p = {name: z[name].add(p[name], alpha=rz / rz_before) if p else z[name].clone() for name in z}
        a_p = product(p)
        iteration += 1
        curvature = dot(p, a_p)
        if not math.isfinite(curvature):
            raise FloatingPointError(f"product {iteration} of conjugate gradients is not finite")
        if curvature <= 0.0:
            # A is positive definite, so what is left of the residual is rounding.
            break
        alpha = rz / curvature
        axpy_(x, alpha, p)
        axpy_(r, -alpha, a_p)
        remaining = norm(r)
    return ConjugateGradientOutput(x, r, iteration, remaining / size if size else 0.0)
