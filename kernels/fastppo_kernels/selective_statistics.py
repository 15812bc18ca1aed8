"""Log-probability, entropy and logsumexp from logits that are already there, in one read.

    logits [N, V]  (and a reference model's [N, V])
        ->  logprobs, entropy, row_max, log_sum  (and kl, kl_center, ref_row_max, ref_log_sum)  [N] float32

with kl = Σ p (log p − log q), from one sum of the differences of the two models' logits: the difference of two large
sums would lose a small divergence in rounding.

Bytes: N · V logits read once, of either model; 16 N written, or 32 N. FLOPs: about 12 a logit, 25 with a reference.
Tiling: one program a row, BLOCK columns at a time, with the online softmax kept a lane: each of BLOCK lanes has its
own maximum and sums, merged once at the end of the row, so that the loop holds no reduction. Rows without a target
read nothing.
"""

import math

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch
from fastppo_kernels.tile import LOWEST, VERY_NEGATIVE, exp, log, transform


@triton.jit
def lane_logits(source, column, vocab, inner, outer, SOFTCAP: tl.constexpr):
    """Transformed logits of these columns of a row, −inf beyond the vocabulary."""
    x = tl.load(source + column, mask=column < vocab, other=0.0).to(tl.float32)
    return tl.where(column < vocab, transform(x, inner, outer, SOFTCAP), float("-inf"))


@triton.jit
def selective_statistics_kernel(
    logits,
    ref_logits,
    targets,
    out,
    num_rows,
    vocab,
    stride,
    ref_stride,
    inner,
    outer,
    max_entropy,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target < 0:
        for quantity in range(4 if ref_logits is None else 8):
            tl.store(out + quantity * num_rows + row, 0.0)
        return
    source = logits + row * stride
    lane_max = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)
    if ref_logits is not None:
        ref_source = ref_logits + row * ref_stride
        ref_lane_max = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
        ref_total = tl.zeros((BLOCK,), dtype=tl.float32)
        difference = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = lane_logits(source, column, vocab, inner, outer, SOFTCAP)
        higher = tl.maximum(lane_max, z)
        shift = tl.maximum(lane_max - higher, VERY_NEGATIVE)
        z = tl.maximum(z - higher, VERY_NEGATIVE)
        e, scale = exp(z), exp(shift)
        if ref_logits is not None:
            ref_z = lane_logits(ref_source, column, vocab, inner, outer, SOFTCAP)
            ref_higher = tl.maximum(ref_lane_max, ref_z)
            ref_shift = tl.maximum(ref_lane_max - ref_higher, VERY_NEGATIVE)
            ref_z = tl.maximum(ref_z - ref_higher, VERY_NEGATIVE)
            difference = (difference + total * (shift - ref_shift)) * scale + e * (z - ref_z)
            ref_total = ref_total * exp(ref_shift) + exp(ref_z)
            ref_lane_max = ref_higher
        weighted = (weighted + total * shift) * scale + e * z
        total = total * scale + e
        lane_max = higher
    row_max = tl.max(lane_max, 0)
    shift = tl.maximum(lane_max - row_max, VERY_NEGATIVE)
    scale = exp(shift)
    weighted_sum = tl.sum((weighted + total * shift) * scale, 0)
    total_sum = tl.sum(total * scale, 0)
    log_sum = log(total_sum)
    taken = transform(tl.load(source + target).to(tl.float32), inner, outer, SOFTCAP)
    entropy = log_sum - weighted_sum / total_sum
    tl.store(out + row, tl.minimum((taken - row_max) - log_sum, 0.0))
    tl.store(out + num_rows + row, tl.minimum(tl.maximum(entropy, 0.0), max_entropy))
    tl.store(out + 2 * num_rows + row, row_max)
    tl.store(out + 3 * num_rows + row, log_sum)
    if ref_logits is not None:
        ref_max = tl.max(ref_lane_max, 0)
        ref_shift = tl.maximum(ref_lane_max - ref_max, VERY_NEGATIVE)
        ref_log_sum = log(tl.sum(ref_total * exp(ref_shift), 0))
        difference_sum = tl.sum((difference + total * (shift - ref_shift)) * scale, 0)
        kl = difference_sum / total_sum - log_sum + ref_log_sum
        tl.store(out + 4 * num_rows + row, tl.maximum(kl, 0.0))
        tl.store(out + 5 * num_rows + row, kl)
        tl.store(out + 6 * num_rows + row, ref_max)
        tl.store(out + 7 * num_rows + row, ref_log_sum)


def selective_statistics(
    logits: torch.Tensor,
    ref_logits: torch.Tensor | None,
    targets: torch.Tensor,
    *,
    inner: float,
    outer: float,
    softcap: bool,
) -> torch.Tensor:
    """logprobs, entropy, row_max, log_sum: [4, N] float32, zeros where the target is negative.

    With a reference also kl, kl_center, ref_row_max, ref_log_sum: [8, N].

    Args:
        logits, ref_logits: [N, V] float32, bfloat16 or float16, last dimension contiguous.
        targets: [N] int64, contiguous.
        inner, outer, softcap: the logit transform, see `tile.transform`.
    """
    num_rows, vocab = logits.shape
    out = torch.empty(4 if ref_logits is None else 8, num_rows, dtype=torch.float32, device=logits.device)
    config = ELEMENTWISE["selective_statistics" if ref_logits is None else "selective_statistics_kl"]
    launch(
        selective_statistics_kernel,
        (num_rows,),
        logits,
        ref_logits,
        targets,
        out,
        num_rows,
        vocab,
        logits.stride(0),
        0 if ref_logits is None else ref_logits.stride(0),
        inner,
        outer,
        math.log(vocab),
        SOFTCAP=softcap,
        BLOCK=min(config.block, triton.next_power_of_2(vocab)),
        num_warps=config.warps,
    )
    return out
