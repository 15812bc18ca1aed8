"""Rows of a matrix brought together in the dtype of the products, zeros behind them.

    x [N, D], rows [N], count  ->  out [N, D]: out[m] = x[rows[m]] for m < count, 0 for the rest

Bytes: count · D read, N · D written. FLOPs: none.
Tiling: one program for a block of rows and columns; a row's columns are contiguous, so loads are 16 bytes wide.
The zeros matter: a product over the whole [N, D] buffer then gives the sum over the contributing rows alone.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch


@triton.jit
def gather_rows_kernel(x, rows, count, out, num_rows, dim, stride, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(rows + m, mask=m < num_rows, other=0).to(tl.int64)
    real = m < tl.load(count)
    values = tl.load(x + index[:, None] * stride + d[None, :], mask=real[:, None] & (d[None, :] < dim), other=0.0)
    inside = (m[:, None] < num_rows) & (d[None, :] < dim)
    tl.store(out + m[:, None].to(tl.int64) * dim + d[None, :], values.to(out.dtype.element_ty), mask=inside)


def gather_rows(x: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [N, D] (last dimension contiguous), rows and count of `compact_rows` -> [N, D] of `dtype`."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    config = ELEMENTWISE["gather_rows"]
    grid = (triton.cdiv(x.shape[0], config.rows), triton.cdiv(x.shape[1], config.block))
    launch(
        gather_rows_kernel,
        grid,
        x,
        rows,
        count,
        out,
        *x.shape,
        x.stride(0),
        BLOCK_M=config.rows,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return out
