"""The rows that contribute, moved to the front of a list, without the host learning how many they are.

    targets [N], upstream scalars [N]  ->  rows [N] int32: indices of the contributing rows in order, then zeros
                                           count [1] int32

Bytes: 8 N for the targets, 4 N for each upstream, 4 N written. FLOPs: none to speak of.
Tiling: one program walks the list a block at a time, a prefix sum inside the block and a running total between blocks,
so that the order and hence every later result is the same on every run.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch


@triton.jit
def compact_rows_kernel(
    targets, d_logprobs, d_entropy, d_logsumexp, d_kl, rows, count, num_rows, ANY: tl.constexpr, BLOCK: tl.constexpr
):
    found = 0
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < num_rows
        keep = tl.load(targets + row, mask=inside, other=-1) >= 0
        if ANY:
            has_gradient = tl.zeros((BLOCK,), dtype=tl.int1)
            if d_logprobs is not None:
                has_gradient = has_gradient | (tl.load(d_logprobs + row, mask=inside, other=0.0) != 0.0)
            if d_entropy is not None:
                has_gradient = has_gradient | (tl.load(d_entropy + row, mask=inside, other=0.0) != 0.0)
            if d_logsumexp is not None:
                has_gradient = has_gradient | (tl.load(d_logsumexp + row, mask=inside, other=0.0) != 0.0)
            if d_kl is not None:
                has_gradient = has_gradient | (tl.load(d_kl + row, mask=inside, other=0.0) != 0.0)
            keep = keep & has_gradient
        kept = keep.to(tl.int32)
        tl.store(rows + found + tl.cumsum(kept, 0) - 1, row, mask=keep)
        found += tl.sum(kept, 0)
    for start in range(0, num_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tl.store(rows + row, tl.zeros((BLOCK,), dtype=tl.int32), mask=(row >= found) & (row < num_rows))
    tl.store(count, found)


def compact_rows(
    targets: torch.Tensor, upstream: tuple[torch.Tensor | None, ...] = (None, None, None, None)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with a target (≥ 0) and, if any upstream [N] is given, with one that is not zero.

    Args:
        targets: [N] int64, contiguous.
        upstream: d_logprobs, d_entropy, d_logsumexp, d_kl: [N] float32, contiguous, or None.

    Returns:
        rows [N] int32, of which the first `count` [1] int32 hold indices and the rest 0.
    """
    rows = torch.empty(targets.shape, dtype=torch.int32, device=targets.device)
    count = torch.empty(1, dtype=torch.int32, device=targets.device)
    has_upstream = any(g is not None for g in upstream)
    config = ELEMENTWISE["compact_rows"]
    launch(
        compact_rows_kernel,
        (1,),
        targets,
        *upstream,
        rows,
        count,
        targets.numel(),
        ANY=has_upstream,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return rows, count
