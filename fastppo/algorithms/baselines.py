"""Baselines without a critic: the returns of other completions, of the batch or of the same prompt.

Statistics are float64, so that completions with equal returns get an advantage of exactly 0: in float32 it would be
rounding divided by a standard deviation of rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops.gae import gae


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = Σ_{k ≥ t} γ^(k−t) r_k, [B, T] from rewards [B, T] and mask [B, T]: GAE with λ = 1 and no values."""
    return gae(rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0, mask=mask).advantages


def subtract_baseline(
    returns: Tensor, mask: Tensor, groups: Tensor | None, baseline: str, scale_rewards: str = "group"
) -> Tensor:
    """Advantages [B, T]: rewards to go, minus a baseline of whole completions' returns.

    With one reward at the end and γ = 1 all tokens of a completion have the same advantage, as in the papers.

    Args:
        returns: [B, T] rewards to go; a completion's first is its return.
        mask: [B, T] bool.
        groups: [B] int64, equal for completions of the same prompt; needed for rloo and grpo.
        baseline: none, batch-mean, rloo or grpo.
        scale_rewards: with grpo, divide by the standard deviation of the `group` or the `batch`, or by nothing (`none`;
            Dr. GRPO: Liu et al., 2025, arXiv:2503.20783).

    Raises:
        ValueError: no groups, or rloo with a group of one.
    """
    if baseline in ("rloo", "grpo") and groups is None:
        raise ValueError(f"groups: needed for the baseline {baseline}")
    totals, whole_batch = returns[:, 0], torch.zeros(len(returns), dtype=torch.int64, device=returns.device)
    if baseline == "none":
        return returns
    if baseline == "batch-mean":
        advantages = returns - group_mean(totals, whole_batch)[:, None]
    elif baseline == "rloo":
        advantages = returns - leave_one_out(totals, groups)[:, None]
    else:
        advantages = returns - group_mean(totals, groups)[:, None]
        if scale_rewards != "none":
            deviation = group_deviation(totals, groups if scale_rewards == "group" else whole_batch)
            advantages = advantages / (deviation + 1e-6)[:, None]
    return advantages.masked_fill(~mask, 0.0)


def leave_one_out(returns: Tensor, groups: Tensor) -> Tensor:
    """[B]: the mean return of the *other* completions of the group; ValueError for a group of one.

    It does not depend on the completion, so the gradient is unbiased (RLOO: Kool et al., 2019; Ahmadian et al., 2024).
    """
    total, count = _sums(returns, groups)
    if (count < 2).any():
        raise ValueError("groups: leave-one-out needs at least two completions of every prompt")
    return ((total - returns.double()) / (count - 1)).to(returns.dtype)


def group_mean(returns: Tensor, groups: Tensor) -> Tensor:
    """[B]: the mean of the group, the completion included (GRPO: Shao et al., 2024, arXiv:2402.03300)."""
    total, count = _sums(returns, groups)
    return (total / count).to(returns.dtype)


def group_deviation(returns: Tensor, groups: Tensor) -> Tensor:
    """[B]: the group's standard deviation, unbiased as in GRPO's implementations; 0 for a group of one."""
    total, count = _sums(returns, groups)
    squares, _ = _sums((returns.double() - total / count).square(), groups)
    return (squares / (count - 1).clamp(min=1)).sqrt().to(returns.dtype)


def _sums(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """[B] each: the sum over the member's group, and the group's size."""
    _, index, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    total = torch.zeros(len(counts), dtype=torch.float64, device=x.device).index_add(0, index, x.double())
    return total[index], counts[index]
