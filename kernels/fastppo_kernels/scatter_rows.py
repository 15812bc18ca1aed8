"""Compacted rows put back where they came from.

    x [N, D] float32, rows [N], count  ->  out[rows[m]] = x[m] for m < count; other rows of out keep their zeros

Bytes: count · D read in float32, as many written in the output's dtype. FLOPs: none.
Tiling: one program for a block of rows and columns.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch


@triton.jit
def scatter_rows_kernel(x, rows, count, out, num_rows, dim, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(rows + m, mask=m < num_rows, other=0).to(tl.int64)
    real = (m < tl.load(count))[:, None] & (d[None, :] < dim)
    values = tl.load(x + m[:, None].to(tl.int64) * dim + d[None, :], mask=real)
    tl.store(out + index[:, None] * dim + d[None, :], values.to(out.dtype.element_ty), mask=real)


def scatter_rows(x: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, out: torch.Tensor) -> None:
    """x [M, D] contiguous with M ≥ count, into out [N, D] contiguous."""
    config = ELEMENTWISE["scatter_rows"]
    grid = (triton.cdiv(x.shape[0], config.rows), triton.cdiv(x.shape[1], config.block))
    launch(
        scatter_rows_kernel,
        grid,
        x,
        rows,
        count,
        out,
        *x.shape,
        BLOCK_M=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )
