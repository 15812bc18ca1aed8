"""Vectors in the space of a model's parameters: a dict of tensors, one for each trained parameter, by its name."""

from __future__ import annotations

import torch
from torch import Tensor

Vector = dict[str, Tensor]


def dot(a: Vector, b: Vector) -> float:
    """Σ a·b. Products of half precision are summed in float32, the tensors' sums in float64."""
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
    """start + scale·direction, in start's dtypes and on its devices."""
    return {
        name: torch.add(tensor.detach(), direction[name].to(tensor.device), alpha=scale).to(tensor.dtype)
        for name, tensor in start.items()
    }


def like(a: Vector, reference: Vector) -> Vector:
    """a, with the dtypes and on the devices of `reference`."""
    return {name: tensor.to(reference[name]) for name, tensor in a.items()}


def zero_sums(parameters: Vector) -> Vector:
    """Zeros to add gradients to: float32 for parameters of half precision."""
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
        for name, p in parameters.items()
    }
