"""Two models' distributions side by side, for the exact divergence between them over the whole vocabulary.

    hidden [M, D]  weight [v, D]         ref_hidden [M, D']  ref_weight [v, D']
           |                                     |
      z [BLOCK_M, BLOCK_N]                 z' [BLOCK_M, BLOCK_N]        float32, never leave the registers
           |  a = z − m, m the row's maximum in the tile;  E = eᵃ;  a', m', E' likewise
      S = Σ E,  T = Σ E a,  m,  S' = Σ E',  m',  difference                                [BLOCK_M] each
           |                        reverse: Σ E (a − a')     forward: Σ E' (a' − a)
      partial [6, tiles, M] float32  ->  combine.combine_divergence

One sum of small differences gives the divergence: the difference of two large sums would lose a small one in rounding.

Bytes: both weights once for every GROUP_M row blocks, V (D + D') ceil(M / (GROUP_M · BLOCK_M)) elements, and both
hidden states from L2; 24 a row and tile written. FLOPs: 2 M (D + D') V, and about 20 a logit.
Tiling: as `statistics`, one work item an output tile; the second product starts when the first has its logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastppo_kernels.launch import gemm_config, gemm_options, launch, operand, programs
from fastppo_kernels.operands import Projection
from fastppo_kernels.tile import LOWEST, below, described, exp, finish_logits, grouped_order, logits_tile


@triton.jit(do_not_specialize=["num_rows", "width", "first_tile", "num_tiles"])
def divergence_kernel(
    # operands, see `described`: [M, D] and [v, D], [M, D'] and [v, D']; biases [v] or None
    hidden,
    weight,
    bias,
    ref_hidden,
    ref_weight,
    ref_bias,
    # [1] int32: how many rows are real
    count,
    # results: [6, num_tiles, num_rows] float32
    partial,
    # sizes
    num_rows,
    width,
    dim,
    ref_dim,
    first_tile,
    num_tiles,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    KIND: tl.constexpr,
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
    weight = described(weight, width, dim, dim, TMA, BLOCK_N, BLOCK_K)
    ref_hidden = described(ref_hidden, num_rows, ref_dim, ref_dim, TMA, BLOCK_M, BLOCK_K)
    ref_weight = described(ref_weight, width, ref_dim, ref_dim, TMA, BLOCK_N, BLOCK_K)
    for item in tl.range(tl.program_id(0), blocks_m * tiles, tl.num_programs(0)):
        block, tile = grouped_order(item, blocks_m, tiles, GROUP_M)
        row, column = block * BLOCK_M, tile * BLOCK_N
        columns = column + tl.arange(0, BLOCK_N)
        acc = logits_tile(hidden, weight, row, column, dim, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        ref_acc = logits_tile(ref_hidden, ref_weight, row, column, ref_dim, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        z = finish_logits(acc, bias, columns, width, inner, outer, SOFTCAP)
        ref_z = finish_logits(ref_acc, ref_bias, columns, width, inner, outer, SOFTCAP)
        row_max = tl.maximum(tl.max(z, 1), LOWEST)  # a number also where all of the tile is −∞
        ref_max = tl.maximum(tl.max(ref_z, 1), LOWEST)
        z, ref_z = below(z, row_max[:, None]), below(ref_z, ref_max[:, None])
        e, ref_e = exp(z), exp(ref_z)
        if KIND == "reverse":
            difference = tl.sum(e * (z - ref_z), 1)
        else:
            difference = tl.sum(ref_e * (ref_z - z), 1)
        m = row + tl.arange(0, BLOCK_M)
        inside = m < real_rows
        place = partial + (first_tile + tile).to(tl.int64) * num_rows + m
        quantity = num_tiles.to(tl.int64) * num_rows
        tl.store(place, tl.sum(e, 1), mask=inside)
        tl.store(place + quantity, tl.sum(e * z, 1), mask=inside)
        tl.store(place + 2 * quantity, row_max, mask=inside)
        tl.store(place + 3 * quantity, tl.sum(ref_e, 1), mask=inside)
        tl.store(place + 4 * quantity, ref_max, mask=inside)
        tl.store(place + 5 * quantity, difference, mask=inside)


def launch_divergence(
    policy: Projection, reference: Projection, count: torch.Tensor, *, kind: str, transform: dict
) -> torch.Tensor:
    """S, T and maximum of the policy, S and maximum of the reference, difference, by tile: [6, tiles, M] float32.

    Args:
        policy, reference: hidden gathered, of one dtype; the hidden sizes may differ, the spans may not.
        count: [1] int32, how many of the rows are real; of the others nothing is written.
        kind: reverse or forward.
        transform: of `tile.transform_factors`, for both.
    """
    (num_rows, dim), device = policy.hidden.shape, policy.hidden.device
    config = gemm_config("linear_divergence", policy.hidden.dtype, device, **transform)
    num_tiles = sum(triton.cdiv(hi - lo, config.block_n) for lo, hi in policy.spans)
    partial = torch.empty(6, num_tiles, num_rows, dtype=torch.float32, device=device)
    first_tile = 0
    for (lo, hi, weight), (*span, ref_weight) in zip(policy.weight_slices(), reference.weight_slices(), strict=True):
        if span != [lo, hi]:
            raise ValueError(f"the policy's span {lo}:{hi} of the vocabulary meets the reference's {span[0]}:{span[1]}")
        tiles = triton.cdiv(hi - lo, config.block_n)
        launch(
            divergence_kernel,
            (programs(config, triton.cdiv(num_rows, config.block_m) * tiles, device),),
            operand(policy.hidden, config.block_m, config.block_k),
            operand(weight, config.block_n, config.block_k),
            None if policy.bias is None else policy.bias[lo:hi],
            operand(reference.hidden, config.block_m, config.block_k),
            operand(ref_weight, config.block_n, config.block_k),
            None if reference.bias is None else reference.bias[lo:hi],
            count,
            partial,
            num_rows,
            hi - lo,
            dim,
            reference.hidden.shape[1],
            first_tile,
            num_tiles,
            **transform,
            KIND=kind,
            **gemm_options(config, policy.hidden.dtype, device),
        )
        first_tile += tiles
    return partial
