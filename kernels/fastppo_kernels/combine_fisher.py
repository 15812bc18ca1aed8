"""The splits of `fisher_statistics` merged into one result a row.

    partial [4, splits, M] float32: row_max, Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ dz, max |dz|
        ->  out [4, M] float32: row_max, log_sum, Σ p dz, max |dz|

Bytes: 16 · splits · M read, 16 · M written. FLOPs: about 8 a row and split.
Tiling: one program for a block of rows, a loop over the splits.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch
from fastppo_kernels.tile import LOWEST, VERY_NEGATIVE, exp, log


@triton.jit
def combine_fisher_kernel(partial, count, out, num_rows, splits, BLOCK_M: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < tl.load(count)
    row_max = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    peak = tl.zeros((BLOCK_M,), dtype=tl.float32)
    quantity = splits * num_rows
    for split in range(splits):
        source = partial + split * num_rows + m
        other_max = tl.load(source, mask=inside, other=0.0)
        other_total = tl.load(source + quantity, mask=inside, other=1.0)
        other_weighted = tl.load(source + 2 * quantity, mask=inside, other=0.0)
        peak = tl.maximum(peak, tl.load(source + 3 * quantity, mask=inside, other=0.0))
        higher = tl.maximum(row_max, other_max)
        scale = exp(tl.maximum(row_max - higher, VERY_NEGATIVE))
        other_scale = exp(tl.maximum(other_max - higher, VERY_NEGATIVE))
        weighted = weighted * scale + other_weighted * other_scale
        total = total * scale + other_total * other_scale
        row_max = higher
    tl.store(out + m, row_max, mask=inside)
    tl.store(out + num_rows + m, log(total), mask=inside)
    tl.store(out + 2 * num_rows + m, weighted / total, mask=inside)
    tl.store(out + 3 * num_rows + m, peak, mask=inside)


def combine_fisher(partial: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """partial [4, splits, M] of `fisher_statistics` -> row_max, log_sum, Σ p dz, max |dz| [4, M], 0 from `count` on."""
    _, splits, num_rows = partial.shape
    out = torch.zeros(4, num_rows, dtype=torch.float32, device=partial.device)
    config = ELEMENTWISE["combine_fisher"]
    launch(
        combine_fisher_kernel,
        (triton.cdiv(num_rows, config.rows),),
        partial,
        count,
        out,
        num_rows,
        splits,
        BLOCK_M=config.rows,
        num_warps=config.warps,
    )
    return out
