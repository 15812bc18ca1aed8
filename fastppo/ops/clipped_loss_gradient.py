"""The derivative of `reference.clipped_loss` with respect to each row's statistics, by hand.

The terminal loss needs it in its forward, between the pass that gives the statistics and the pass that turns logits
into ∂loss/∂z: a few scalars a row stand for the whole loss there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.engines.engine import Upstream
from fastppo.ops.reference import MAX_LOG_RATIO, aggregation_weights, clipped_surrogate, log_probability_ratio


def clipped_loss_gradient(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None = None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    ratio_level: str,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    loss_agg: str,
) -> Upstream:
    """All per-token tensors [..., T]; see `reference.clipped_loss` for the loss this differentiates."""
    weights = aggregation_weights(mask, loss_agg, logprobs.dtype)
    log_ratio = log_probability_ratio(logprobs, old_logprobs, mask, ratio_level)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    _, clipped, dual_clipped = clipped_surrogate(ratio, advantages, clip_low, clip_high, dual_clip)
    constant = clipped | dual_clipped | ~mask | (log_ratio.abs() > MAX_LOG_RATIO)
    d_log_ratio = (-weights * advantages * ratio).masked_fill(constant, 0.0)
    if importance_weights is not None:
        d_log_ratio = d_log_ratio * importance_weights
    if ratio_level != "token":
        # One ratio stands for the whole sequence: each of its tokens gets what all of them ask for.
        d_log_ratio = d_log_ratio.sum(-1, keepdim=True).expand_as(ratio) * mask
        if ratio_level == "sequence-geometric":
            d_log_ratio = d_log_ratio / mask.sum(-1, keepdim=True).clamp(min=1)

    d_logprobs, d_kl = d_log_ratio, None
    if kl_coef != 0.0:
        if kl_estimator == "exact":
            d_kl = kl_coef * weights
        else:
            d_logprobs = d_logprobs + kl_coef * weights * _sampled_kl_derivative(logprobs - ref_logprobs, kl_estimator)
    d_entropy = -entropy_coef * weights if entropy_coef != 0.0 else None
    return Upstream(d_logprobs.masked_fill(~mask, 0.0), d_entropy, None, d_kl)


def _sampled_kl_derivative(log_ratio: Tensor, estimator: str) -> Tensor:
    """∂/∂logp of k1, k2, k3 with log_ratio = logp − ref; 0 where the token is ruled out."""
    if estimator == "k1":
        derivative = torch.ones_like(log_ratio)
    elif estimator == "k2":
        derivative = log_ratio
    else:
        derivative = torch.where(log_ratio < -MAX_LOG_RATIO, 1.0, -torch.expm1(-log_ratio))
    return derivative.masked_fill(log_ratio == -torch.inf, 0.0)
