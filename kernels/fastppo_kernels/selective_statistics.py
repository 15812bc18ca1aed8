"""Log-probability, entropy and logsumexp from logits that are already there, in one read.

    logits [N, V]  ->  logprobs, entropy, row_max, log_sum [N] float32

Bytes: N · V logits read once, 16 N written. FLOPs: about 12 a logit.
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
def selective_statistics_kernel(
    logits, targets, out, num_rows, vocab, stride, inner, outer, max_entropy, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    if target < 0:
        for quantity in range(4):
            tl.store(out + quantity * num_rows + row, 0.0)
        return
    source = logits + row * stride
    lane_max = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(source + column, mask=column < vocab, other=0.0).to(tl.float32)
        z = tl.where(column < vocab, transform(x, inner, outer, SOFTCAP), float("-inf"))
        higher = tl.maximum(lane_max, z)
        shift = tl.maximum(lane_max - higher, VERY_NEGATIVE)
        z = tl.maximum(z - higher, VERY_NEGATIVE)
        e, scale = exp(z), exp(shift)
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


def selective_statistics(
    logits: torch.Tensor, targets: torch.Tensor, *, inner: float, outer: float, softcap: bool
) -> torch.Tensor:
    """logprobs, entropy, row_max, log_sum: [4, N] float32, zeros where the target is negative.

    Args:
        logits: [N, V] float32, bfloat16 or float16, last dimension contiguous; targets: [N] int64, contiguous.
        inner, outer, softcap: the logit transform, see `tile.transform`.
    """
    num_rows, vocab = logits.shape
    out = torch.empty(4, num_rows, dtype=torch.float32, device=logits.device)
    config = ELEMENTWISE["selective_statistics"]
    launch(
        selective_statistics_kernel,
        (num_rows,),
        logits,
        targets,
        out,
        num_rows,
        vocab,
        logits.stride(0),
        inner,
        outer,
        math.log(vocab),
        SOFTCAP=softcap,
        BLOCK=min(config.block, triton.next_power_of_2(vocab)),
        num_warps=config.warps,
    )
    return out
