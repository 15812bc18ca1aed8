"""The normalizer of every row and the mean of its logits' derivative: two or three products with online softmax.

    hidden, d_hidden [M, D]   weight, d_weight [V, D]
         \\             /
      z, dz [BLOCK_M, BLOCK_N]  one tile, float32, never leaves the registers
              |
      row_max, Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ dz, max |dz|                              [BLOCK_M] each, carried over the columns
              |
      partial [4, splits, M] float32  ->  combine_fisher

Bytes: weight and d_weight once for every GROUP_M row blocks; hidden and d_hidden once for every split, mostly from L2;
16 · splits · M written. FLOPs: 4 M D V, or 6 M D V with d_weight, and about 12 a logit.
Tiling: as `linear_statistics`: a persistent program takes items of BLOCK_M rows × one split of the vocabulary.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.combine_fisher import combine_fisher
from fastppo_kernels.fisher_tile import Tangent, tangent_tile
from fastppo_kernels.launch import balanced_splits, gemm_config, gemm_options, launch, processors
from fastppo_kernels.linear_statistics import MAX_SPLITS
from fastppo_kernels.tile import LOWEST, exp, grouped_order, raise_max


@triton.jit
def fisher_statistics_kernel(
    hidden,
    d_hidden,
    weight,
    d_weight,
    bias,
    d_bias,
    count,
    partial,
    num_rows,
    vocab,
    dim,
    splits,
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
    real_rows = tl.load(count)
    blocks_m = tl.cdiv(real_rows, BLOCK_M)
    tiles = tl.cdiv(vocab, BLOCK_N)
    tiles_per_split = tl.cdiv(tiles, splits)
    for item in range(tl.program_id(0), blocks_m * splits, tl.num_programs(0)):
        block, split = grouped_order(item, blocks_m, splits, GROUP_M)
        row_max = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
        peak = tl.zeros((BLOCK_M,), dtype=tl.float32)
        first = split * tiles_per_split
        for tile in range(first, tl.minimum(first + tiles_per_split, tiles)):
            column = tile * BLOCK_N
            columns = column + tl.arange(0, BLOCK_N)
            z, dz = tangent_tile(
                hidden, d_hidden, weight, d_weight, bias, d_bias, block * BLOCK_M, columns, num_rows, vocab, dim,
                weight_stride, weight_stride_k, d_weight_stride, d_weight_stride_k, inner, outer,
                SOFTCAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION, TMA, column,
            )  # fmt: skip
            row_max, z, shift = raise_max(row_max, z)
            e = exp(z)
            scale = exp(shift)
            weighted = weighted * scale + tl.sum(e * dz, 1)
            total = total * scale + tl.sum(e, 1)
            peak = tl.maximum(peak, tl.max(tl.abs(dz), 1))
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = m < real_rows
        out = partial + split * num_rows + m
        quantity = splits * num_rows
        tl.store(out, row_max, mask=inside)
        tl.store(out + quantity, total, mask=inside)
        tl.store(out + 2 * quantity, weighted, mask=inside)
        tl.store(out + 3 * quantity, peak, mask=inside)


def fisher_statistics(
    tangent: Tangent, count: torch.Tensor, *, inner: float, outer: float, softcap: bool
) -> torch.Tensor:
    """row_max, log_sum, Σ p dz, max |dz|: [4, M] float32, zeros from `count` on.

    Args:
        count: [1] int32, how many of the rows are real.
        inner, outer, softcap: the logit transform, see `tile.transform`.
    """
    (num_rows, dim), vocab, compute_dtype = tangent.hidden.shape, tangent.weight.shape[0], tangent.hidden.dtype
    kernel = "fisher_statistics" if tangent.d_weight is None else "fisher_statistics_weight"
    config = gemm_config(kernel, compute_dtype, tangent.weight, dim, softcap=softcap)
    programs = processors(tangent.hidden.device)
    tiles = triton.cdiv(vocab, config.block_n)
    splits = balanced_splits(triton.cdiv(num_rows, config.block_m), tiles, programs, MAX_SPLITS)
    partial = torch.empty(4, splits, num_rows, dtype=torch.float32, device=tangent.hidden.device)
    operands, tma = tangent.operands(config)
    launch(
        fisher_statistics_kernel,
        (programs,),
        *operands,
        count,
        partial,
        num_rows,
        vocab,
        dim,
        splits,
        *tangent.strides(),
        inner,
        outer,
        SOFTCAP=softcap,
        TMA=tma,
        **gemm_options(config, compute_dtype, tangent.weight.device, dim),
    )
    return combine_fisher(partial, count)
