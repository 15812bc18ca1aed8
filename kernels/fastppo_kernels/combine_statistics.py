"""The splits of `linear_statistics` merged into one result a row.

    partial [4, splits, N] float32: row_max, Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ (z − m), z[target]
        ->  out [4, N] float32: logprobs, entropy, row_max, log_sum, scattered to where the rows came from

Bytes: 16 · splits · N read, 16 · N written. FLOPs: about 10 a row and split.
Tiling: one program for a block of rows, a loop over the splits.
"""

import math

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch
from fastppo_kernels.tile import LOWEST, VERY_NEGATIVE, exp, log


@triton.jit
def combine_statistics_kernel(partial, rows, count, out, num_rows, splits, max_entropy, BLOCK_M: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < tl.load(count)
    row_max = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    taken = tl.zeros((BLOCK_M,), dtype=tl.float32)
    quantity = splits * num_rows
    for split in range(splits):
        source = partial + split * num_rows + m
        other_max = tl.load(source, mask=inside, other=0.0)
        other_total = tl.load(source + quantity, mask=inside, other=1.0)
        other_weighted = tl.load(source + 2 * quantity, mask=inside, other=0.0)
        taken += tl.load(source + 3 * quantity, mask=inside, other=0.0)
        higher = tl.maximum(row_max, other_max)
        shift = tl.maximum(row_max - higher, VERY_NEGATIVE)
        other_shift = tl.maximum(other_max - higher, VERY_NEGATIVE)
        scale, other_scale = exp(shift), exp(other_shift)
        weighted = (weighted + total * shift) * scale + (other_weighted + other_total * other_shift) * other_scale
        total = total * scale + other_total * other_scale
        row_max = higher
    log_sum = log(total)
    index = tl.load(rows + m, mask=inside, other=0)
    entropy = log_sum - weighted / total
    tl.store(out + index, tl.minimum((taken - row_max) - log_sum, 0.0), mask=inside)
    tl.store(out + num_rows + index, tl.minimum(tl.maximum(entropy, 0.0), max_entropy), mask=inside)
    tl.store(out + 2 * num_rows + index, row_max, mask=inside)
    tl.store(out + 3 * num_rows + index, log_sum, mask=inside)


def combine_statistics(partial: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, vocab: int) -> torch.Tensor:
    """partial [4, splits, N] of `linear_statistics` -> logprobs, entropy, row_max, log_sum [4, N]."""
    _, splits, num_rows = partial.shape
    out = torch.zeros(4, num_rows, dtype=torch.float32, device=partial.device)
    config = ELEMENTWISE["combine_statistics"]
    launch(
        combine_statistics_kernel,
        (triton.cdiv(num_rows, config.rows),),
        partial,
        rows,
        count,
        out,
        num_rows,
        splits,
        math.log(vocab),
        BLOCK_M=config.rows,
        num_warps=config.warps,
    )
    return out
