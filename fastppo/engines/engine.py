"""What every engine shares, whatever computes its products; its contract is explained in `fastppo.engines.chunked`.

An operator's signature must be written out where it is registered, for torch.library reads its schema from there. What
it returns while it is only traced, and which rows its second pass needs, are the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def contributing(targets: Tensor, upstream: Sequence[Tensor | None]) -> Tensor:
    """[N] bool: real rows with an upstream scalar that is not zero; the others have no gradient."""
    present = [g != 0 for g in upstream if g is not None]
    valid = targets >= 0
    return valid & torch.stack(present).any(0) if present else torch.zeros_like(valid)


def fake_statistics(
    hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, kl_kind, *_options
) -> list[Tensor]:
    """As `statistics` returns, without the values."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return [hidden.new_empty(targets.shape, dtype=dtype) for _ in range(8 if kl_kind else 4)]


def fake_vjp(hidden, weight, bias, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """As `vjp` returns, without the values; what is needed comes last among the arguments."""
    need_hidden, need_weight, need_bias = arguments[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        bias.new_empty(bias.shape) if need_bias else weight.new_empty(0),
    )
