"""Advantages with mean 0 and variance 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops import reference
from fastppo.ops.checks import check_mask, check_per_token, checked


@checked
def whiten(x: Tensor, *, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """(x − mean) / sqrt(var + 1e-8) over the real tokens, with the unbiased variance.

    Args:
        x: [...], any floating dtype.
        mask: [...] bool, True for a real token; padding never enters the statistics and gives 0.
        shift_mean: False puts the mean back (rewards keep their sign).

    Returns:
        float32 (float64 for float64), detached, shape of x.

    Raises:
        ValueError, TypeError: mask of another shape, non-finite values at real tokens.
    """
    mask = check_mask(mask, x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return reference.whiten(check_per_token("x", x, mask, dtype), mask, shift_mean=shift_mean)
