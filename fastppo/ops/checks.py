"""Input checks of the public operators, done once, when they are called.

Shapes, dtypes and devices are always checked. Values (a target outside the vocabulary, a NaN advantage) are checked
where that is free, on CPU tensors; on an accelerator it would stall the stream, so it is done there only with
FASTPPO_CHECK=1, and under torch.compile not at all. A target outside the vocabulary then gives a log-prob of NaN.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NonFiniteValue(ValueError, FloatingPointError):
    """A NaN or Inf where a finite number is needed."""

    row: int | None = None
    """The sequence of the batch it is in, where that is known."""


def looks_at_values(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return tensor.device.type == "cpu" or os.environ.get("FASTPPO_CHECK") == "1"


def check_tensor(name: str, tensor: Tensor, device: torch.device | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected on {device} like the other arguments, got {tensor.device}")


def check_floating(name: str, tensor: Tensor, device: torch.device | None = None) -> None:
    check_tensor(name, tensor, device)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], like: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)} ({like}), got {tuple(tensor.shape)}")


def check_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, prefix: str = "", device: torch.device | None = None
) -> None:
    """hidden [..., D], weight [V, D] and bias [V] that can be multiplied; `prefix` names the reference model's."""
    check_floating(f"{prefix}hidden", hidden, device)
    if hasattr(hidden, "full_tensor"):
        raise TypeError(f"{prefix}hidden: expected a plain tensor, got a DTensor; take .to_local() or .full_tensor()")
    if hidden.is_meta:
        raise ValueError(f"{prefix}hidden: a meta tensor holds no values to compute with")
    check_floating(f"{prefix}weight", weight, hidden.device)
    if hidden.dim() < 1:
        raise ValueError(f"{prefix}hidden: expected [..., D], got a scalar")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight: expected [V, {hidden.shape[-1]}] to go with {prefix}hidden {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.numel() == 0:
        raise ValueError(f"{prefix}weight: expected a vocabulary and a hidden size above 0, got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"{prefix}weight: expected {hidden.dtype} like {prefix}hidden, got {weight.dtype}; cast one of them, "
            "or use autocast"
        )
    if bias is not None:
        check_floating(f"{prefix}bias", bias, hidden.device)
        check_shape(f"{prefix}bias", bias, (weight.shape[0],), f"one for each row of {prefix}weight")


def check_targets(targets: Tensor, shape: tuple[int, ...], vocab: int, device: torch.device, ignore_index: int) -> None:
    check_tensor("targets", targets, device)
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets: expected int64 or int32 token ids, got {targets.dtype}")
    check_shape("targets", targets, shape, "one for each hidden state or row of logits")
    if looks_at_values(targets) and targets.numel():
        bad = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
        if bad.any():
            where = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"targets: expected ids in [0, {vocab}) or ignore_index={ignore_index}, "
                f"got {targets[where].item()} at {where}"
            )


def check_mask(mask: Tensor | None, like: Tensor, name: str = "mask") -> Tensor:
    """A boolean mask of `like`'s shape and device; all True if none is given. 0/1 of any dtype are taken."""
    if mask is None:
        return torch.ones(like.shape, dtype=torch.bool, device=like.device)
    check_tensor(name, mask, like.device)
    check_shape(name, mask, tuple(like.shape), "one for each token")
    return mask if mask.dtype == torch.bool else mask != 0


def check_per_token(name: str, tensor: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite per-token quantity in `dtype`, detached, 0 on padding, whatever stood there."""
    check_floating(name, tensor, mask.device)
    check_shape(name, tensor, tuple(mask.shape), "one for each token")
    tensor = tensor.detach().to(dtype).masked_fill(~mask, 0.0)
    if looks_at_values(tensor) and not torch.isfinite(tensor).all():
        where = tuple((~torch.isfinite(tensor)).nonzero()[0].tolist())
        raise NonFiniteValue(f"{name}: expected finite values, got {tensor[where].item()} at {where}")
    return tensor
