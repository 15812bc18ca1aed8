"""The splits of `linear_jsd` added up.

    partial [2, splits, N] float32: Σ p (log p − log m), Σ q (log q − log m)
        ->  statistics[4, rows] = ½ (first + second), at least 0;  statistics[5, rows] = first

Bytes: 8 · splits · N read, 8 · N written. Tiling: one program for a block of rows, a loop over the splits.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch


@triton.jit
def combine_jsd_kernel(partial, rows, count, statistics, num_rows, splits, BLOCK_M: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < tl.load(count)
    kl_p = tl.zeros((BLOCK_M,), dtype=tl.float32)
    kl_q = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for split in range(splits):
        source = partial + split * num_rows + m
        kl_p += tl.load(source, mask=inside, other=0.0)
        kl_q += tl.load(source + splits * num_rows, mask=inside, other=0.0)
    out = statistics + tl.load(rows + m, mask=inside, other=0)
    tl.store(out + 4 * num_rows, tl.maximum(0.5 * (kl_p + kl_q), 0.0), mask=inside)
    tl.store(out + 5 * num_rows, kl_p, mask=inside)


def combine_jsd(partial: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, statistics: torch.Tensor) -> None:
    """partial [2, splits, N] into kl and kl_center of statistics [8, N]."""
    _, splits, num_rows = partial.shape
    config = ELEMENTWISE["combine_jsd"]
    launch(
        combine_jsd_kernel,
        (triton.cdiv(num_rows, config.rows),),
        partial,
        rows,
        count,
        statistics,
        num_rows,
        splits,
        BLOCK_M=config.rows,
        num_warps=config.warps,
    )
