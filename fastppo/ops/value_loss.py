"""The critic's loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops import reference
from fastppo.ops.checks import check_mask, check_per_token, checked


class ValueLossOutput(NamedTuple):
    """loss: scalar, differentiable with respect to values. metrics: detached 0-dim tensors: clip_fraction,
    explained_variance (1 − Var[R − v] / Var[R] over real tokens), value_mean, return_mean."""

    loss: Tensor
    metrics: dict[str, Tensor]


@checked
def value_loss(
    values: Tensor,
    returns: Tensor,
    *,
    old_values: Tensor | None = None,
    mask: Tensor | None = None,
    cliprange_value: float | None = 0.2,
    loss_agg: str = "token-mean",
) -> ValueLossOutput:
    """½ max((v − R)², (clip(v, v_old − c, v_old + c) − R)²), aggregated like the policy loss.

    Args:
        values: [..., T], differentiable.
        returns: [..., T], constants, the targets of the regression.
        old_values: [..., T]: the values at rollout time; needed unless cliprange_value is None.
        mask: [..., T] bool, True for a real token.
        cliprange_value: c; None regresses without clipping.
        loss_agg: token-mean, seq-mean-token-mean, seq-mean-token-sum or seq-mean-token-sum-norm.

    Raises:
        ValueError, TypeError: shapes or dtypes that don't go together, non-finite returns, old_values missing.
    """
    mask = check_mask(mask, values)
    dtype = torch.promote_types(values.dtype, torch.float32)
    returns = check_per_token("returns", returns, mask, dtype)
    if loss_agg != "token-mean" and values.dim() < 2:
        raise ValueError(f"values: expected [batch, time] for loss_agg={loss_agg!r}, got {tuple(values.shape)}")
    if cliprange_value is not None:
        if old_values is None:
            raise ValueError("old_values: needed to clip around; pass them, or cliprange_value=None")
        old_values = check_per_token("old_values", old_values, mask, dtype)
    values = reference.upcast(values).masked_fill(~mask, 0.0)
    loss, clip_fraction = reference.value_loss(
        values, returns, mask, old_values=old_values, cliprange_value=cliprange_value, loss_agg=loss_agg
    )
    with torch.no_grad():
        weights = reference.aggregation_weights(mask, "token-mean", values.dtype)

        def variance(x: Tensor) -> Tensor:
            return (weights * (x - (weights * x).sum()).square()).sum()

        spread = variance(returns)
        explained = torch.where(spread > 0, 1 - variance(returns - values) / spread.clamp(min=1e-12), 0.0)
        metrics = {
            "clip_fraction": clip_fraction,
            "explained_variance": explained,
            "value_mean": (weights * values).sum(),
            "return_mean": (weights * returns).sum(),
        }
    return ValueLossOutput(loss, metrics)
