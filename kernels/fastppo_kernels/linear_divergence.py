"""Forward-only statistics of two models side by side, for the exact divergence between them over the whole vocabulary.

    z, z' [BLOCK_M, BLOCK_N] of `two_models`
         |
    m, Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ (z − m), z[target], m', Σ eᶻ'⁻ᵐ'
    difference: reverse Σ eᶻ⁻ᵐ ((z − m) − (z' − m')), forward Σ eᶻ'⁻ᵐ' ((z' − m') − (z − m))
         |                                                                [BLOCK_M] each, carried over the columns
    partial [7, splits, N] float32  ->  combine_divergence

One sum of small differences gives the divergence: the difference of two large sums would lose a small one in rounding.

Bytes: both weights once for every GROUP_M row blocks, V (D + D') ceil(N / (GROUP_M · BLOCK_M)); 28 · splits · N
written.
FLOPs: 2 N (D + D') V, and about 25 a logit. Tiling: as `linear_statistics`.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.combine_divergence import combine_divergence
from fastppo_kernels.tile import LOWEST, exp, grouped_order, raise_max
from fastppo_kernels.two_models import launch_pair, logits_pair


@triton.jit
def linear_divergence_kernel(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, targets, rows, count, partial, num_rows, vocab, dim,
    ref_dim, splits, hidden_stride, weight_stride, weight_stride_k, ref_hidden_stride, ref_weight_stride,
    ref_weight_stride_k, inner, outer, KIND: tl.constexpr, SOFTCAP: tl.constexpr, EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
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
        difference = tl.zeros((BLOCK_M,), dtype=tl.float32)
        first = split * tiles_per_split
        for tile in range(first, tl.minimum(first + tiles_per_split, tiles)):
            columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            z, ref_z = logits_pair(
                hidden, weight, bias, ref_hidden, ref_weight, ref_bias, index, tile * BLOCK_N, columns, vocab, dim,
                ref_dim, hidden_stride, weight_stride, weight_stride_k, ref_hidden_stride, ref_weight_stride,
                ref_weight_stride_k, inner, outer, SOFTCAP, EVEN_K, COMPUTE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            taken += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
            row_max, z, shift = raise_max(row_max, z)
            ref_max, ref_z, ref_shift = raise_max(ref_max, ref_z)
            e, scale = exp(z), exp(shift)
            ref_e, ref_scale = exp(ref_z), exp(ref_shift)
            if KIND == "reverse":
                difference = (difference + total * (shift - ref_shift)) * scale + tl.sum(e * (z - ref_z), 1)
            if KIND == "forward":
                difference = (difference + ref_total * (ref_shift - shift)) * ref_scale + tl.sum(ref_e * (ref_z - z), 1)
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
        tl.store(out + 6 * quantity, difference, mask=inside)


def linear_divergence(
    policy: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    targets: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    *,
    kind: str,
    **options,
) -> torch.Tensor:
    """logprobs, entropy, row_max, log_sum, kl, kl_center, ref_row_max, ref_log_sum: [8, N] float32.

    Rows that `rows` does not name are zero; kl and kl_center of kind jsd are left zero, for `linear_jsd` to fill.

    Args:
        policy, reference, options: see `launch_pair`; targets, rows, count: see `linear_statistics`.
        kind: reverse, forward or jsd.
    """
    partial = launch_pair(
        linear_divergence_kernel,
        "linear_divergence",
        policy,
        reference,
        targets,
        rows,
        count,
        7,
        KIND=kind,
        **options,
    )
    return combine_divergence(partial, rows, count, policy[1].shape[0], kind)
