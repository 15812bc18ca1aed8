"""The Jensen-Shannon divergence of two models: a second pass over the vocabulary, once both normalizers are known.

    z, z' [BLOCK_M, BLOCK_N] of `two_models`, recomputed  ->  log p, log q, log m = log ½ (p + q)
        ->  Σ p (log p − log m), Σ q (log q − log m)
    partial [2, splits, N] float32  ->  out[4] = ½ (both), out[5] = Σ p (log p − log m), by `combine_jsd`

log m of a row needs both logsumexps, so no online form exists. Bytes and FLOPs: those of `linear_divergence` once
more, with 8 bytes a split and row written. Tiling: as `linear_statistics`.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.combine_jsd import combine_jsd
from fastppo_kernels.tile import exp, grouped_order, log_mean, log_softmax
from fastppo_kernels.two_models import launch_pair, logits_pair


@triton.jit
def linear_jsd_kernel(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, statistics, rows, count, partial, num_rows, vocab, dim,
    ref_dim, splits, hidden_stride, weight_stride, weight_stride_k, ref_hidden_stride, ref_weight_stride,
    ref_weight_stride_k, inner, outer, SOFTCAP: tl.constexpr, EVEN_K: tl.constexpr, COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    real_rows = tl.load(count)
    blocks_m = tl.cdiv(real_rows, BLOCK_M)
    tiles = tl.cdiv(vocab, BLOCK_N)
    tiles_per_split = tl.cdiv(tiles, splits)
    for item in range(tl.program_id(0), blocks_m * splits, tl.num_programs(0)):
        block, split = grouped_order(item, blocks_m, splits, GROUP_M)
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        index = tl.load(rows + m, mask=m < real_rows, other=0).to(tl.int64)
        row_max = tl.load(statistics + 2 * num_rows + index)
        log_sum = tl.load(statistics + 3 * num_rows + index)
        ref_max = tl.load(statistics + 6 * num_rows + index)
        ref_log_sum = tl.load(statistics + 7 * num_rows + index)
        kl_p = tl.zeros((BLOCK_M,), dtype=tl.float32)
        kl_q = tl.zeros((BLOCK_M,), dtype=tl.float32)
        first = split * tiles_per_split
        for tile in range(first, tl.minimum(first + tiles_per_split, tiles)):
            columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            z, ref_z = logits_pair(
                hidden, weight, bias, ref_hidden, ref_weight, ref_bias, index, tile * BLOCK_N, columns, vocab, dim,
                ref_dim, hidden_stride, weight_stride, weight_stride_k, ref_hidden_stride, ref_weight_stride,
                ref_weight_stride_k, inner, outer, SOFTCAP, EVEN_K, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            log_p = log_softmax(z, row_max, log_sum)
            log_q = log_softmax(ref_z, ref_max, ref_log_sum)
            log_m = log_mean(log_p, log_q)
            kl_p += tl.sum(exp(log_p) * (log_p - log_m), 1)
            kl_q += tl.sum(exp(log_q) * (log_q - log_m), 1)
        out = partial + split * num_rows + m
        tl.store(out, kl_p, mask=m < real_rows)
        tl.store(out + splits * num_rows, kl_q, mask=m < real_rows)


def linear_jsd(
    policy: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    statistics: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    **options,
) -> None:
    """Fill kl and kl_center of `statistics` [8, N], which `linear_divergence` made of the same arguments."""
    partial = launch_pair(linear_jsd_kernel, "linear_jsd", policy, reference, statistics, rows, count, 2, **options)
    combine_jsd(partial, rows, count, statistics)
