"""The normalizer of every row and the mean of its logits' derivative: products, then a softmax within the tile.

    hidden, d_hidden [M, D]   weight, d_weight [v, D]
         \\             /
      z, dz [BLOCK_M, BLOCK_N]  one tile, float32, never leaves the registers
              |  m the row's maximum in the tile,  E = eᶻ⁻ᵐ
      Σ E,  Σ E dz,  m,  max |dz|                                                      [BLOCK_M] each
              |
      partial [4, tiles, M] float32  ->  combine.combine_fisher

Bytes: weight and d_weight once for every GROUP_M row blocks, V · D · ceil(M / (GROUP_M · BLOCK_M)) elements each;
hidden and d_hidden from L2; 16 a row and tile written. FLOPs: 4 M D V, or 6 M D V with d_weight, and about 10 a logit.
Tiling: as `statistics`, one work item an output tile; both accumulators share the loads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastppo_kernels.combine import combine_fisher
from fastppo_kernels.fisher_tile import Tangent, tangent_tile
from fastppo_kernels.launch import gemm_config, gemm_options, launch, programs
from fastppo_kernels.tile import LOWEST, below, described, exp, grouped_order


@triton.jit(do_not_specialize=["num_rows", "width", "first_tile", "num_tiles"])
def fisher_statistics_kernel(
    # operands, see `tangent_tile` and `described`
    hidden,
    d_hidden,
    weight,
    d_weight,
    bias,
    d_bias,
    # [1] int32: how many rows are real
    count,
    # results: [4, num_tiles, num_rows] float32
    partial,
    # sizes
    num_rows,
    width,
    dim,
    first_tile,
    num_tiles,
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
    real_rows = tl.load(count)
    blocks_m = tl.cdiv(real_rows, BLOCK_M)
    tiles = tl.cdiv(width, BLOCK_N)
    hidden = described(hidden, num_rows, dim, dim, TMA, BLOCK_M, BLOCK_K)
    d_hidden = described(d_hidden, num_rows, dim, dim, TMA, BLOCK_M, BLOCK_K)
    weight = described(weight, width, dim, dim, TMA, BLOCK_N, BLOCK_K)
    if d_weight is not None:
        d_weight = described(d_weight, width, dim, dim, TMA, BLOCK_N, BLOCK_K)
    for item in tl.range(tl.program_id(0), blocks_m * tiles, tl.num_programs(0)):
        block, tile = grouped_order(item, blocks_m, tiles, GROUP_M)
        row = block * BLOCK_M
        z, dz = tangent_tile(
            hidden, d_hidden, weight, d_weight, bias, d_bias, row, tile * BLOCK_N, width, dim, inner, outer,
            SOFTCAP, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        row_max = tl.maximum(tl.max(z, 1), LOWEST)  # a number also where all of the tile is −∞
        e = exp(below(z, row_max[:, None]))
        m = row + tl.arange(0, BLOCK_M)
        inside = m < real_rows
        place = partial + (first_tile + tile).to(tl.int64) * num_rows + m
        quantity = num_tiles.to(tl.int64) * num_rows
        tl.store(place, tl.sum(e, 1), mask=inside)
        tl.store(place + quantity, tl.sum(e * dz, 1), mask=inside)
        tl.store(place + 2 * quantity, row_max, mask=inside)
        tl.store(place + 3 * quantity, tl.max(tl.abs(dz), 1), mask=inside)


def fisher_statistics(tangent: Tangent, count: torch.Tensor, transform: dict) -> torch.Tensor:
    """row_max, log_sum, Σ p dz, max |dz|: [4, M] float32, zeros behind the count.

    Args:
        count: [1] int32, how many of the rows are real.
        transform: of `tile.transform_factors`.
    """
    hidden, device = tangent.head.hidden, tangent.head.hidden.device
    kernel = "fisher_statistics" if tangent.d_weight is None else "fisher_statistics_weight"
    config = gemm_config(kernel, hidden.dtype, device, **transform)
    num_rows, dim = hidden.shape
    num_tiles = sum(triton.cdiv(hi - lo, config.block_n) for lo, hi in tangent.head.spans)
    partial = torch.empty(4, num_tiles, num_rows, dtype=torch.float32, device=device)
    first_tile = 0
    for part in tangent.slices():
        width = part.last - part.first
        tiles = triton.cdiv(width, config.block_n)
        launch(
            fisher_statistics_kernel,
            (programs(config, triton.cdiv(num_rows, config.block_m) * tiles, device),),
            *tangent.operands(part, config),
            count,
            partial,
            num_rows,
            width,
            dim,
            first_tile,
            num_tiles,
            **transform,
            **gemm_options(config, hidden.dtype, device),
        )
        first_tile += tiles
    return combine_fisher(partial, count)
