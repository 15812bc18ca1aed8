"""The logit-space Fisher-vector product of a tile of the vocabulary, from the logits and their derivative recomputed.

    hidden, d_hidden [M, D]   weight, d_weight [lo : lo + v] [v, D]
         \\             /
      z, dz [BLOCK_M, BLOCK_N] float32 in registers
              |  log p = (z − row_max) − log_sum,  u = p (dz − Σ p dz),  g = w · t′ · u
      out [M, v] in the dtype of the products that follow: weight product[lo : lo + v] = outᵀ hidden and
      hidden product += out weight[lo : lo + v]

Bytes: the tiles of weight and d_weight, v · D each, once; hidden and d_hidden from L2 after the first of each group;
M · v written. FLOPs: 4 M D v, or 6 M D v with d_weight, and about 12 a logit.
Tiling: BLOCK_M × BLOCK_N of the output a program, in groups of GROUP_M row blocks. Rows are compacted; those behind
the count are written as zeros without a product, so that what follows may run over M rows whatever the count is.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.fisher_tile import Tangent, tangent_tile
from fastppo_kernels.launch import gemm_config, gemm_options, launch
from fastppo_kernels.tile import exp, grouped_order, log_softmax, transform_gradient


@triton.jit
def fisher_gradient_kernel(
    hidden,
    d_hidden,
    weight,
    d_weight,
    bias,
    d_bias,
    count,
    row_max,
    log_sum,
    mean,
    row_weights,
    scale,
    out,
    first_row,
    num_rows,
    first_column,
    width,
    vocab,
    dim,
    weight_stride,
    weight_stride_k,
    d_weight_stride,
    d_weight_stride_k,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    blocks_m = tl.cdiv(num_rows, BLOCK_M)
    block, tile = grouped_order(tl.program_id(0), blocks_m, tl.cdiv(width, BLOCK_N), GROUP_M)
    row = block * BLOCK_M
    column = first_column + tile * BLOCK_N
    m = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    real_rows = tl.load(count) - first_row
    out += row.to(tl.int64) * width + tile * BLOCK_N
    offset = tl.arange(0, BLOCK_M)[:, None] * width + tl.arange(0, BLOCK_N)[None, :]
    inside = (m[:, None] < num_rows) & (columns[None, :] < first_column + width)
    if row >= real_rows:
        tl.store(out + offset, tl.zeros((BLOCK_M, BLOCK_N), dtype=out.dtype.element_ty), mask=inside)
        return

    z, dz = tangent_tile(
        hidden, d_hidden, weight, d_weight, bias, d_bias, row, columns, num_rows, vocab, dim,
        weight_stride, weight_stride_k, d_weight_stride, d_weight_stride_k, inner, outer,
        SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION, TMA, column,
    )  # fmt: skip
    real = m < real_rows
    p = exp(log_softmax(z, tl.load(row_max + m, mask=real, other=0.0), tl.load(log_sum + m, mask=real, other=0.0)))
    g = p * (dz - tl.load(mean + m, mask=real, other=0.0)[:, None])
    # Columns beyond the vocabulary hold −inf, whose derivative under a softcap would be NaN; they are not stored.
    g = transform_gradient(g, z, inner, outer, SOFTCAP)
    weight_of_row = tl.load(row_weights + m, mask=real, other=0.0) * tl.load(scale)
    g *= weight_of_row[:, None]
    tl.store(out + offset, tl.where(real[:, None], g, 0.0).to(out.dtype.element_ty), mask=inside)


def fisher_gradient(
    tangent: Tangent,
    count: torch.Tensor,
    statistics: torch.Tensor,
    row_weights: torch.Tensor,
    scale: torch.Tensor,
    out: torch.Tensor,
    *,
    first_row: int,
    first_column: int,
    inner: float,
    outer: float,
    softcap: bool,
) -> None:
    """g into out [M, v], for rows first_row : first_row + M and columns first_column : first_column + v.

    Args:
        tangent: with the hidden rows of this block alone.
        count: [1] int32, the real rows of all blocks.
        statistics: row_max, log_sum, Σ p dz [3, M] of this block's rows, each contiguous.
        row_weights: [M] float32, of this block's rows; scale: [1] float32 that g is multiplied by.
        out: contiguous, in the dtype of the products.
        inner, outer, softcap: the logit transform, see `tile.transform`.
    """
    num_rows, width = out.shape
    vocab, dim = tangent.weight.shape
    compute_dtype = tangent.hidden.dtype
    kernel = "fisher_gradient" if tangent.d_weight is None else "fisher_gradient_weight"
    config = gemm_config(kernel, compute_dtype, tangent.weight, dim, softcap=softcap)
    operands, tma = tangent.operands(config)
    launch(
        fisher_gradient_kernel,
        (triton.cdiv(num_rows, config.block_m) * triton.cdiv(width, config.block_n),),
        *operands,
        count,
        *statistics,
        row_weights,
        scale,
        out,
        first_row,
        num_rows,
        first_column,
        width,
        vocab,
        dim,
        *tangent.strides(),
        inner,
        outer,
        SOFTCAP=softcap,
        TMA=tma,
        **gemm_options(config, compute_dtype, tangent.weight.device, dim),
    )
