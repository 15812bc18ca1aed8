"""The Jensen-Shannon divergence of two models: a second pass over the vocabulary, once both normalizers are known.

    z, z' [BLOCK_M, BLOCK_N] recomputed  ->  log p, log q, log m = log ½ (p + q)
        ->  Σ p (log p − log m), Σ q (log q − log m)
    partial [2, splits, N] float32  ->  out[4] = ½ (both), out[5] = Σ p (log p − log m), by `combine_jsd`

log m of a row needs both logsumexps, so no online form exists. Bytes and FLOPs: those of `linear_divergence` once
more, with 8 bytes a split and row written. Tiling: as `linear_statistics`.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.combine_jsd import combine_jsd
from fastppo_kernels.launch import (
    TRITON_DTYPE,
    balanced_splits,
    dot_precision,
    even,
    gemm_config,
    launch,
    precision,
    processors,
)
from fastppo_kernels.linear_statistics import MAX_SPLITS
from fastppo_kernels.tile import exp, finish_logits, grouped_order, log_mean, log_softmax, raw_logits


@triton.jit
def linear_jsd_kernel(
    hidden,
    weight,
    bias,
    ref_hidden,
    ref_weight,
    ref_bias,
    statistics,
    rows,
    count,
    partial,
    num_rows,
    vocab,
    dim,
    ref_dim,
    splits,
    hidden_stride,
    weight_stride,
    weight_stride_k,
    ref_hidden_stride,
    ref_weight_stride,
    ref_weight_stride_k,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
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
            column = tile * BLOCK_N
            acc = raw_logits(
                hidden, weight, index, 0, column, vocab, dim, hidden_stride, weight_stride, weight_stride_k,
                BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION, False, False,
            )  # fmt: skip
            ref_acc = raw_logits(
                ref_hidden, ref_weight, index, 0, column, vocab, ref_dim, ref_hidden_stride, ref_weight_stride,
                ref_weight_stride_k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION, False, False,
            )  # fmt: skip
            columns = column + tl.arange(0, BLOCK_N)
            log_p = log_softmax(finish_logits(acc, bias, columns, vocab, inner, outer, SOFTCAP), row_max, log_sum)
            log_q = log_softmax(
                finish_logits(ref_acc, ref_bias, columns, vocab, inner, outer, SOFTCAP), ref_max, ref_log_sum
            )
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
    *,
    inner: float,
    outer: float,
    softcap: bool,
    compute_dtype: torch.dtype,
) -> None:
    """Fill kl and kl_center of `statistics` [8, N], which `linear_divergence` made of the same arguments."""
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = policy, reference
    (num_rows, dim), vocab, ref_dim = hidden.shape, weight.shape[0], ref_weight.shape[1]
    config = gemm_config("linear_jsd", compute_dtype, weight, dim, ref_dim, softcap=softcap)
    programs = processors(hidden.device)
    tiles = triton.cdiv(vocab, config.block_n)
    splits = balanced_splits(triton.cdiv(num_rows, config.block_m), tiles, programs, MAX_SPLITS)
    partial = torch.empty(2, splits, num_rows, dtype=torch.float32, device=hidden.device)
    launch(
        linear_jsd_kernel,
        (programs,),
        hidden,
        weight,
        bias,
        ref_hidden,
        ref_weight,
        ref_bias,
        statistics,
        rows,
        count,
        partial,
        num_rows,
        vocab,
        dim,
        ref_dim,
        splits,
        hidden.stride(0),
        *weight.stride(),
        ref_hidden.stride(0),
        *ref_weight.stride(),
        inner,
        outer,
        SOFTCAP=softcap,
        EVEN_K=even(dim, config.block_k) and even(ref_dim, config.block_k),
        COMPUTE=TRITON_DTYPE[compute_dtype],
        PRECISION=dot_precision(precision(compute_dtype)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    combine_jsd(partial, rows, count, statistics)
