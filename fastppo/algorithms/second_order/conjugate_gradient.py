"""Vectors of parameters, and conjugate gradients: A x = b from products with A alone (Hestenes & Stiefel, 1952).

As in natural-gradient methods: a few iterations from x = 0, with a tolerance relative to b (Schulman et al., 2015,
arXiv:1502.05477, appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Vector = dict[str, Tensor]
"""One tensor for each trained parameter, by its name."""


def dot(a: Vector, b: Vector) -> float:
    """Σ a·b. Half-precision tensors are summed in float32, and the sums of tensors in float64."""
    total = 0.0
    for name, x in a.items():
        dtype = torch.promote_types(x.dtype, torch.float32)
        total += torch.dot(x.to(dtype).flatten(), b[name].to(dtype).flatten()).item()
    return total


def norm(a: Vector) -> float:
    return dot(a, a) ** 0.5


def axpy_(y: Vector, scale: float, x: Vector) -> None:
    """y ← y + scale·x, in y's dtype."""
    for name, tensor in y.items():
        tensor.add_(x[name], alpha=scale)


def moved(start: Vector, scale: float, direction: Vector) -> Vector:
    """start + scale·direction."""
    return {name: torch.add(tensor.detach(), direction[name], alpha=scale) for name, tensor in start.items()}


class ConjugateGradientOutput(NamedTuple):
    x: Vector
    iterations: int
    """Products with A."""
    relative_residual: float
    """‖b − A x‖ / ‖b‖."""


@torch.no_grad()
def conjugate_gradient(
    product: Callable[[Vector], Vector], b: Vector, *, max_iterations: int, relative_tolerance: float = 0.0
) -> ConjugateGradientOutput:
    """Solve A x = b for a symmetric positive definite A, with all vectors in the dtypes of `b`.

    Args:
        product: v -> A v.
        b: the right-hand side; not changed.
        max_iterations: maximum number of products with A.
        relative_tolerance: stop once ‖b − A x‖ ≤ relative_tolerance · ‖b‖.

    Returns:
        x, a direction of ascent even before the tolerance is reached: each iterate minimizes ½ xᵀA x − bᵀx over a
        growing subspace that contains b.

    Raises:
        FloatingPointError: b or a product is not finite.
    """
    x = {name: torch.zeros_like(tensor) for name, tensor in b.items()}
    r = {name: tensor.clone() for name, tensor in b.items()}
    p = {name: tensor.clone() for name, tensor in b.items()}
    rr, iteration = dot(b, b), 0
    size = rr**0.5
    if not math.isfinite(size):
        raise FloatingPointError("the right-hand side of conjugate gradients is not finite")
    while iteration < max_iterations and rr**0.5 > relative_tolerance * size:
        a_p = product(p)
        iteration += 1
        curvature = dot(p, a_p)
        if not math.isfinite(curvature):
            raise FloatingPointError(f"product {iteration} of conjugate gradients is not finite")
        if curvature <= 0.0:
            # A is positive definite, so the residual that is left is rounding.
            break
        alpha = rr / curvature
        axpy_(x, alpha, p)
        axpy_(r, -alpha, a_p)
        rr, rr_before = dot(r, r), rr
        # p ← r + (rr / rr_before) p keeps the directions A-conjugate.
        p = {name: tensor.add(p[name], alpha=rr / rr_before) for name, tensor in r.items()}
    return ConjugateGradientOutput(x, iteration, rr**0.5 / size if size else 0.0)
