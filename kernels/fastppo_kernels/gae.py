"""Generalized advantage estimation over padded or packed sequences: one kernel, or three for few and long ones.

Whitening takes its mean and variance from the same pass, and one more over the advantages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.gae_carry import gae_carry_kernel
from fastppo_kernels.gae_scan import gae_scan_kernel
from fastppo_kernels.gae_summary import gae_summary_kernel
from fastppo_kernels.gae_whiten import gae_whiten
from fastppo_kernels.launch import launch, processors

# A chunk of time is at least this many blocks long: below that the summaries cost more than the parallelism brings.
MIN_BLOCKS = 4


class GAE(NamedTuple):
    """advantages, returns: shape of rewards, float32, 0 at padding; mean, unbiased variance of the real advantages."""

    advantages: Tensor
    returns: Tensor
    mean: Tensor | None
    variance: Tensor | None


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    max_length: int | None = None,
    *,
    with_moments: bool = False,
    whiten: bool = False,
) -> GAE:
    """A_t = r_t + γ V_{t+1} − V_t + γ λ A_{t+1} over the real tokens (Schulman et al., 2016, arXiv:1506.02438).

    Args:
        rewards, values: [S, T], or packed [N] with cu_seqlens; float32.
        mask, dones: bool, same shape, or None; bootstrap: [S] float32 or None.
        cu_seqlens: [S + 1] int32 or int64: sequence s is the tokens cu_seqlens[s] … cu_seqlens[s + 1] − 1.
        max_length: of a packed sequence; N if not given, which only costs empty programs.
        with_moments: also the mean and variance of the real advantages, from the same pass.
        whiten: the advantages come back with mean 0 and variance 1; the moments are those before.
    """
    rewards, values, mask, dones, bootstrap, offsets = (
        None if x is None else x.contiguous() for x in (rewards, values, mask, dones, bootstrap, cu_seqlens)
    )
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    sequences = rewards.shape[0] if offsets is None else offsets.numel() - 1
    time = rewards.shape[1] if offsets is None else (rewards.numel() if max_length is None else max_length)
    # Booleans are read as bytes.
    mask, dones = (None if x is None else x.view(torch.uint8) for x in (mask, dones))
    rows, block, chunks = _tiling(sequences, time, processors(rewards.device))
    warps = ELEMENTWISE["gae"].warps
    chunk = max(block, triton.cdiv(triton.cdiv(time, chunks), block) * block)
    chunks = max(1, triton.cdiv(time, chunk))
    grid = (triton.cdiv(sequences, rows), chunks)
    sizes = (sequences, time, chunk, gamma, lam)

    carry = None
    if chunks > 1:
        summary = torch.empty(chunks, sequences, 5, dtype=torch.float32, device=rewards.device)
        carry = torch.empty(chunks, sequences, 2, dtype=torch.float32, device=rewards.device)
        tokens = (rewards, values, mask, dones)
        launch(gae_summary_kernel, grid, *tokens, offsets, summary, *sizes, ROWS=rows, BLOCK=block, num_warps=warps)
        blocks = triton.cdiv(sequences, 32)
        launch(gae_carry_kernel, (blocks,), summary, bootstrap, carry, sequences, chunks, ROWS=32, num_warps=1)
    moments = None
    if with_moments or whiten:
        moments = torch.zeros(grid[0] * grid[1], 3, dtype=torch.float32, device=rewards.device)
    launch(
        gae_scan_kernel,
        grid,
        rewards,
        values,
        mask,
        dones,
        bootstrap,
        offsets,
        carry,
        advantages,
        returns,
        moments,
        *sizes,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    if moments is None:
        return GAE(advantages, returns, None, None)
    mean, variance = _merge(moments)
    if whiten:
        gae_whiten(advantages, mask, mean, variance)
    return GAE(advantages, returns, mean, variance)


def _tiling(sequences: int, time: int, programs: int) -> tuple[int, int, int]:
    """(sequences a program, tokens a block, chunks of time) that give every processor work."""
    config = ELEMENTWISE["gae"]
    block = min(config.block, triton.next_power_of_2(max(time, 1)))
    rows = max(1, config.rows * config.block // block)
    while rows > 1 and sequences < rows * programs:
        rows //= 2
    wanted = triton.cdiv(4 * programs, max(1, triton.cdiv(sequences, rows)))
    return rows, block, max(1, min(wanted, time // (MIN_BLOCKS * block)))


def _merge(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[programs, 3] of count, mean, Σ (A − mean)² -> mean, unbiased variance, in float64 and then float32."""
    count, mean, spread = moments.double().unbind(1)
    total = count.sum()
    center = (count * mean).sum() / total.clamp(min=1)
    variance = (spread.sum() + (count * (mean - center).square()).sum()) / (total - 1).clamp(min=1)
    return center.float(), variance.float()
