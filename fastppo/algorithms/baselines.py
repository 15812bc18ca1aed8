"""Baselines without a critic: what other completions, of the batch or of the same prompt, got.

Statistics are float64: completions that all got the same must give exactly nothing,
where float32 rounding divided by a deviation of rounding would be an advantage.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops.gae import gae


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = Σ_{k ≥ t} γ^(k−t) r_k, [B, T] from rewards [B, T] and mask [B, T]: GAE with λ = 1 and no values."""
    return gae(rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0, mask=mask).advantages


def subtract_baseline(
    returns: Tensor, mask: Tensor, groups: Tensor | None, *, baseline: str, scale_rewards: str = "group"
) -> Tensor:
    """Advantages [B, T] from rewards to go [B, T], less a baseline of whole completions' returns.

    Where a reward comes only at the end and γ = 1, every token of a completion has the same advantage, as in the
    papers; otherwise a token gets what came after it, less what a whole completion may expect.

    Args:
        returns: rewards to go; the first is the completion's return.
        mask: [B, T] bool.
        groups: [B] int64, equal for completions of the same prompt; needed for rloo and grpo.
        baseline: none, batch-mean, rloo or grpo.
        scale_rewards: with grpo, what is divided by: the standard deviation of the `group` or of the `batch`, or `none`
            (Dr. GRPO: Liu et al., 2025, arXiv:2503.20783).

    Raises:
        ValueError: an unknown baseline, no groups, or rloo with a group of one.
    """
    if baseline in ("rloo", "grpo") and groups is None:
        raise ValueError(f"groups: needed for the baseline {baseline}")
    totals, together = returns[:, 0], torch.zeros(len(returns), dtype=torch.int64, device=returns.device)
    if baseline == "none":
        return returns
    if baseline == "batch-mean":
        advantages = returns - group_mean(totals, together)[:, None]
    elif baseline == "rloo":
        advantages = returns - leave_one_out(totals, groups)[:, None]
    elif baseline == "grpo":
        advantages = returns - group_mean(totals, groups)[:, None]
        if scale_rewards != "none":
            deviation = group_deviation(totals, groups if scale_rewards == "group" else together)
            advantages = advantages / (deviation + 1e-6)[:, None]
    else:
        raise ValueError(f"baseline: expected none, batch-mean, rloo or grpo, got {baseline!r}")
    return advantages.masked_fill(~mask, 0.0)


def leave_one_out(returns: Tensor, groups: Tensor) -> Tensor:
    """The mean of the *other* completions of the same group: independent of the completion, so the gradient stays
    unbiased (RLOO: Kool et al., 2019; Ahmadian et al., 2024, arXiv:2402.14740).

    Args:
        returns: [B], what each completion got.
        groups: [B] int64, equal for completions of the same prompt.

    Raises:
        ValueError: a group of one, which has no others.
    """
    total, count = _sums(returns, groups)
    if (count < 2).any():
        raise ValueError("groups: leave-one-out needs at least two completions of every prompt")
    return ((total - returns.double()) / (count - 1)).to(returns.dtype)


def group_mean(returns: Tensor, groups: Tensor) -> Tensor:
    """The mean of the group, the completion included (GRPO: Shao et al., 2024, arXiv:2402.03300)."""
    total, count = _sums(returns, groups)
    return (total / count).to(returns.dtype)


def group_deviation(returns: Tensor, groups: Tensor) -> Tensor:
    """The group's standard deviation, unbiased as in GRPO's implementations; 0 for a group of one."""
    total, count = _sums(returns, groups)
    squares, _ = _sums((returns.double() - total / count).square(), groups)
    return (squares / (count - 1).clamp(min=1)).sqrt().to(returns.dtype)


def _sums(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """[B] each: the sum over the member's group, and the group's size."""
    _, index = torch.unique(groups, return_inverse=True)
    zeros = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    total = zeros.index_add(0, index, x.double())
    count = zeros.index_add(0, index, torch.ones_like(x, dtype=torch.float64))
    return total[index], count[index]
