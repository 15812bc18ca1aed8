"""Forward-only statistics of two models side by side, for the exact divergence between them over the whole vocabulary.

    hidden [N, D], weight [V, D]         ref_hidden [N, D'], ref_weight [V, D']
               |                                     |
         z [BLOCK_M, BLOCK_N]                  z' [BLOCK_M, BLOCK_N]            two tiles of logits in registers
               |  transform, −inf beyond V           |
         m, Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ (z − m), z[target]    m', Σ eᶻ'⁻ᵐ', Σ eᶻ'⁻ᵐ' (z' − m')
               \\                                   /
        cross: reverse Σ eᶻ⁻ᵐ (z' − m'), forward Σ eᶻ'⁻ᵐ' (z − m)              [BLOCK_M] each, carried over columns
               |
         partial [8, splits, N] float32  ->  combine_divergence

Bytes: both weights once for every GROUP_M row blocks, V (D + D') ceil(N / (GROUP_M · BLOCK_M)); 32 · splits · N
written.
FLOPs: 2 N (D + D') V, and about 25 a logit. Tiling: as `linear_statistics`.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.combine_divergence import combine_divergence
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
from fastppo_kernels.tile import LOWEST, exp, finish_logits, grouped_order, raise_max, raw_logits


@triton.jit
def linear_divergence_kernel(
    hidden,
    weight,
    bias,
    ref_hidden,
    ref_weight,
    ref_bias,
    targets,
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
    KIND: tl.constexpr,
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
        target = tl.load(targets + index)
        row_max = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
        total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
        taken = tl.zeros((BLOCK_M,), dtype=tl.float32)
        ref_max = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
        ref_total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        ref_weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
        cross = tl.zeros((BLOCK_M,), dtype=tl.float32)
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
            z = finish_logits(acc, bias, columns, vocab, inner, outer, SOFTCAP)
            taken += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
            row_max, z, shift = raise_max(row_max, z)
            ref_z = finish_logits(ref_acc, ref_bias, columns, vocab, inner, outer, SOFTCAP)
            ref_max, ref_z, ref_shift = raise_max(ref_max, ref_z)
            e, scale = exp(z), exp(shift)
            ref_e, ref_scale = exp(ref_z), exp(ref_shift)
            if KIND == "reverse":
                cross = (cross + total * ref_shift) * scale + tl.sum(e * ref_z, 1)
            if KIND == "forward":
                cross = (cross + ref_total * shift) * ref_scale + tl.sum(ref_e * z, 1)
                ref_weighted = (ref_weighted + ref_total * ref_shift) * ref_scale + tl.sum(ref_e * ref_z, 1)
            weighted = (weighted + total * shift) * scale + tl.sum(e * z, 1)
            total = total * scale + tl.sum(e, 1)
            ref_total = ref_total * ref_scale + tl.sum(ref_e, 1)
        inside = m < real_rows
        out = partial + split * num_rows + m
        quantity = splits * num_rows
        tl.store(out, row_max, mask=inside)
        tl.store(out + quantity, total, mask=inside)
        tl.store(out + 2 * quantity, weighted, mask=inside)
        tl.store(out + 3 * quantity, taken, mask=inside)
        tl.store(out + 4 * quantity, ref_max, mask=inside)
        tl.store(out + 5 * quantity, ref_total, mask=inside)
        tl.store(out + 6 * quantity, ref_weighted, mask=inside)
        tl.store(out + 7 * quantity, cross, mask=inside)


def linear_divergence(
    policy: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    targets: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    *,
    kind: str,
    inner: float,
    outer: float,
    softcap: bool,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """logprobs, entropy, row_max, log_sum, kl, kl_center, ref_row_max, ref_log_sum: [8, N] float32.

    Rows that `rows` does not name are zero; kl and kl_center of kind jsd are left zero, for `linear_jsd` to fill.

    Args:
        policy, reference: (hidden [N, D], weight [V, D], bias [V] or None); the hidden sizes may differ.
        kind: reverse, forward or jsd. The others: see `linear_statistics`.
    """
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = policy, reference
    (num_rows, dim), vocab, ref_dim = hidden.shape, weight.shape[0], ref_weight.shape[1]
    config = gemm_config("linear_divergence", compute_dtype, weight, dim, ref_dim, softcap=softcap)
    programs = processors(hidden.device)
    tiles = triton.cdiv(vocab, config.block_n)
    splits = balanced_splits(triton.cdiv(num_rows, config.block_m), tiles, programs, MAX_SPLITS)
    partial = torch.empty(8, splits, num_rows, dtype=torch.float32, device=hidden.device)
    launch(
        linear_divergence_kernel,
        (programs,),
        hidden,
        weight,
        bias,
        ref_hidden,
        ref_weight,
        ref_bias,
        targets,
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
        KIND=kind,
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
    return combine_divergence(partial, rows, count, vocab, kind)
