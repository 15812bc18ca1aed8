"""The logit-space Fisher-vector product of a tile of the vocabulary, from the logits and their derivative recomputed.

    hidden, d_hidden [M, D]   weight, d_weight [v, D]
         \\             /
      z, dz [BLOCK_M, BLOCK_N] float32 in registers
              |  log p = (z − row_max) − log_sum,  u = p (dz − Σ p dz),  g = w · t′ · u
      out [R, v] for rows first_row : first_row + R, in the dtype of the products that follow:
      weight product = outᵀ hidden  and  hidden product += out weight

Bytes: weight and d_weight once for every GROUP_M row blocks, v · D · ceil(R / (GROUP_M · BLOCK_M)) elements each;
hidden and d_hidden from L2; R · v elements written. FLOPs: 4 R D v, or 6 R D v with d_weight, and about 12 a logit.
Tiling: as `statistics`, one work item an output tile. Rows behind the count are written as zeros without a product, so
that what follows may run over all rows whatever the count is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastppo_kernels.fisher_tile import Slice, Tangent, tangent_tile
from fastppo_kernels.launch import gemm_config, gemm_options, launch, operand, programs
from fastppo_kernels.tile import described, exp, grouped_order, log_softmax, transform_gradient
from fastppo_kernels.tiling import row_stride


@triton.jit(do_not_specialize=["first_row", "last_row", "num_rows", "width"])
def fisher_gradient_kernel(
    # operands, see `tangent_tile` and `described`
    hidden,
    d_hidden,
    weight,
    d_weight,
    bias,
    d_bias,
    # by row: [4, num_rows] of `fisher_statistics`; [num_rows] float32; [1] int32 and float32
    statistics,
    row_weights,
    count,
    scale,
    # result, for `described` too: [last_row − first_row, v], rows `stride` apart
    out,
    # sizes
    first_row,
    last_row,
    num_rows,
    width,
    padded_width,
    dim,
    stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    real_rows = tl.minimum(tl.load(count), last_row)
    blocks_m = tl.cdiv(last_row - first_row, BLOCK_M)
    tiles = tl.cdiv(width, BLOCK_N)
    quantity = num_rows.to(tl.int64)
    hidden = described(hidden, num_rows, dim, dim, TMA, BLOCK_M, BLOCK_K)
    d_hidden = described(d_hidden, num_rows, dim, dim, TMA, BLOCK_M, BLOCK_K)
    weight = described(weight, width, dim, dim, TMA, BLOCK_N, BLOCK_K)
    if d_weight is not None:
        d_weight = described(d_weight, width, dim, dim, TMA, BLOCK_N, BLOCK_K)
    out = described(out, last_row - first_row, padded_width, stride, TMA, BLOCK_M, BLOCK_N)
    for item in tl.range(tl.program_id(0), blocks_m * tiles, tl.num_programs(0)):
        block, tile = grouped_order(item, blocks_m, tiles, GROUP_M)
        row, column = first_row + block * BLOCK_M, tile * BLOCK_N
        m = row + tl.arange(0, BLOCK_M)
        if row < real_rows:
            z, dz = tangent_tile(
                hidden, d_hidden, weight, d_weight, bias, d_bias, row, column, width, dim, inner, outer,
                SOFTCAP, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            real = m < real_rows
            row_max = tl.load(statistics + m, mask=real, other=0.0)
            log_sum = tl.load(statistics + quantity + m, mask=real, other=0.0)
            mean = tl.load(statistics + 2 * quantity + m, mask=real, other=0.0)
            weight_of_row = tl.load(row_weights + m, mask=real, other=0.0) * tl.load(scale)
            g = exp(log_softmax(z, row_max, log_sum)) * (dz - mean[:, None])
            g = transform_gradient(g, z, inner, outer, SOFTCAP) * weight_of_row[:, None]
            if SOFTCAP:
                # Columns beyond the slice hold −inf, whose derivative is NaN; see `logit_gradient`.
                g = tl.where((column + tl.arange(0, BLOCK_N))[None, :] < width, g, 0.0)
            out.store([row - first_row, column], tl.where(real[:, None], g, 0.0).to(out.dtype))
        else:
            out.store([row - first_row, column], tl.zeros((BLOCK_M, BLOCK_N), dtype=out.dtype))


def fisher_gradient(
    tangent: Tangent,
    part: Slice,
    count: torch.Tensor,
    statistics: torch.Tensor,
    row_weights: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    first_row: int,
    transform: dict,
) -> None:
    """scale · g into out [R, v], for rows first_row : first_row + R and the columns of `part`.

    Args:
        part: of `tangent.slices()`.
        count: [1] int32, how many of the M rows are real.
        statistics: [4, M] of `fisher_statistics`; row_weights: [M] float32; scale: [1] float32.
        out: in the dtype of the products, rows at least `tiling.row_stride(v)` apart.
        transform: of `tile.transform_factors`.
    """
    hidden, device = tangent.head.hidden, tangent.head.hidden.device
    kernel = "fisher_gradient" if tangent.d_weight is None else "fisher_gradient_weight"
    config = gemm_config(kernel, hidden.dtype, device, **transform)
    (num_rows, dim), (rows, width) = hidden.shape, out.shape
    launch(
        fisher_gradient_kernel,
        (programs(config, triton.cdiv(rows, config.block_m) * triton.cdiv(width, config.block_n), device),),
        *tangent.operands(part, config),
        statistics,
        row_weights,
        count,
        scale,
        operand(out, config.block_m, config.block_n),
        first_row,
        first_row + rows,
        num_rows,
        width,
        row_stride(width),
        dim,
        out.stride(0),
        **transform,
        **gemm_options(config, hidden.dtype, device),
    )
