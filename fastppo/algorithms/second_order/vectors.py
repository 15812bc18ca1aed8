"""Vectors in parameter space: a dict of tensors, one for each trained parameter, by its name."""

from __future__ import annotations

import torch
from torch import Tensor

Vector = dict[str, Tensor]


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
