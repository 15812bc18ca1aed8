"""The splits of `linear_divergence` merged into one result a row.

    partial [7, splits, N] float32: m, Σ eᶻ⁻ᵐ, Σ eᶻ⁻ᵐ (z − m), z[target], m', Σ eᶻ'⁻ᵐ', difference (see there)
        ->  out [8, N] float32: logprobs, entropy, row_max, log_sum, kl, kl_center, ref_row_max, ref_log_sum

Bytes: 28 · splits · N read, 32 · N written. FLOPs: about 25 a row and split.
Tiling: one program for a block of rows, a loop over the splits.
"""

import math

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch
from fastppo_kernels.tile import LOWEST, VERY_NEGATIVE, exp, log


@triton.jit
def combine_divergence_kernel(
    partial, rows, count, out, num_rows, splits, max_entropy, KIND: tl.constexpr, BLOCK_M: tl.constexpr
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < tl.load(count)
    row_max = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_M,), dtype=tl.float32)
    taken = tl.zeros((BLOCK_M,), dtype=tl.float32)
    ref_max = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    ref_total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    difference = tl.zeros((BLOCK_M,), dtype=tl.float32)
    quantity = splits * num_rows
    for split in range(splits):
        source = partial + split * num_rows + m
        other_max = tl.load(source, mask=inside, other=0.0)
        other_total = tl.load(source + quantity, mask=inside, other=1.0)
        other_weighted = tl.load(source + 2 * quantity, mask=inside, other=0.0)
        taken += tl.load(source + 3 * quantity, mask=inside, other=0.0)
        other_ref_max = tl.load(source + 4 * quantity, mask=inside, other=0.0)
        other_ref_total = tl.load(source + 5 * quantity, mask=inside, other=1.0)
        other_difference = tl.load(source + 6 * quantity, mask=inside, other=0.0)

        higher = tl.maximum(row_max, other_max)
        shift = tl.maximum(row_max - higher, VERY_NEGATIVE)
        other_shift = tl.maximum(other_max - higher, VERY_NEGATIVE)
        scale, other_scale = exp(shift), exp(other_shift)
        ref_higher = tl.maximum(ref_max, other_ref_max)
        ref_shift = tl.maximum(ref_max - ref_higher, VERY_NEGATIVE)
        other_ref_shift = tl.maximum(other_ref_max - ref_higher, VERY_NEGATIVE)
        ref_scale, other_ref_scale = exp(ref_shift), exp(other_ref_shift)

        if KIND == "reverse":
            difference = (difference + total * (shift - ref_shift)) * scale
            difference += (other_difference + other_total * (other_shift - other_ref_shift)) * other_scale
        if KIND == "forward":
            difference = (difference + ref_total * (ref_shift - shift)) * ref_scale
            difference += (other_difference + other_ref_total * (other_ref_shift - other_shift)) * other_ref_scale
        weighted = (weighted + total * shift) * scale + (other_weighted + other_total * other_shift) * other_scale
        total = total * scale + other_total * other_scale
        ref_total = ref_total * ref_scale + other_ref_total * other_ref_scale
        row_max, ref_max = higher, ref_higher

    log_sum, ref_log_sum = log(total), log(ref_total)
    entropy = log_sum - weighted / total
    out += tl.load(rows + m, mask=inside, other=0)
    tl.store(out, tl.minimum((taken - row_max) - log_sum, 0.0), mask=inside)
    tl.store(out + num_rows, tl.minimum(tl.maximum(entropy, 0.0), max_entropy), mask=inside)
    tl.store(out + 2 * num_rows, row_max, mask=inside)
    tl.store(out + 3 * num_rows, log_sum, mask=inside)
    if KIND == "reverse":
        kl = difference / total - log_sum + ref_log_sum
        tl.store(out + 4 * num_rows, tl.maximum(kl, 0.0), mask=inside)
        tl.store(out + 5 * num_rows, kl, mask=inside)
    if KIND == "forward":
        kl = difference / ref_total - ref_log_sum + log_sum
        tl.store(out + 4 * num_rows, tl.maximum(kl, 0.0), mask=inside)
    tl.store(out + 6 * num_rows, ref_max, mask=inside)
    tl.store(out + 7 * num_rows, ref_log_sum, mask=inside)


def combine_divergence(
    partial: torch.Tensor, rows: torch.Tensor, count: torch.Tensor, vocab: int, kind: str
) -> torch.Tensor:
    """partial [7, splits, N] of `linear_divergence` -> [8, N], see there."""
    _, splits, num_rows = partial.shape
    out = torch.zeros(8, num_rows, dtype=torch.float32, device=partial.device)
    config = ELEMENTWISE["combine_divergence"]
    launch(
        combine_divergence_kernel,
        (triton.cdiv(num_rows, config.rows),),
        partial,
        rows,
        count,
        out,
        num_rows,
        splits,
        math.log(vocab),
        KIND=kind,
        BLOCK_M=config.rows,
        num_warps=config.warps,
    )
    return out
