"""∂loss/∂logits from logits that are already there, in one read and one write, over the logits themselves on request.

    logits [N, V], a few scalars a row  ->  out [N, V] in the logits' dtype
        ∂z = p (a + b log p) + c [v = target], then the transform's derivative

with a = d_logsumexp − d_logprobs − d_entropy · entropy, b = −d_entropy, c = d_logprobs.

Bytes: N · V read, N · V written; rows that cannot contribute are written as zeros without being read. FLOPs: about 12
a logit.
Tiling: one program for BLOCK columns of a row; every element is read before it is written, by the thread that writes
it.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch
from fastppo_kernels.tile import NO_MASS, exp, transform, transform_gradient


@triton.jit
def selective_gradient_kernel(
    logits,
    targets,
    entropy,
    row_max,
    log_sum,
    d_logprobs,
    d_entropy,
    d_logsumexp,
    out,
    vocab,
    stride,
    out_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    target = tl.load(targets + row)
    a, b, c = 0.0, 0.0, 0.0
    if d_logprobs is not None:
        c += tl.load(d_logprobs + row)
    if d_entropy is not None:
        b -= tl.load(d_entropy + row)
    if d_logsumexp is not None:
        a += tl.load(d_logsumexp + row)
    destination = out + row * out_stride + column
    if (target < 0) | ((a == 0.0) & (b == 0.0) & (c == 0.0)):
        tl.store(destination, tl.zeros((BLOCK,), dtype=out.dtype.element_ty), mask=inside)
        return
    a = a - c + b * tl.load(entropy + row)
    x = tl.load(logits + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    z = transform(x, inner, outer, SOFTCAP)
    log_p = tl.maximum((z - tl.load(row_max + row)) - tl.load(log_sum + row), NO_MASS)
    dz = exp(log_p) * (a + b * log_p) + tl.where(column == target, c, 0.0)
    dx = transform_gradient(dz, z, inner, outer, SOFTCAP)
    tl.store(destination, dx.to(out.dtype.element_ty), mask=inside)


def selective_gradient(
    logits: torch.Tensor,
    targets: torch.Tensor,
    saved: torch.Tensor | list[torch.Tensor],
    upstream: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    out: torch.Tensor,
    *,
    inner: float,
    outer: float,
    softcap: bool,
) -> None:
    """∂logits into out [N, V], which may be the logits.

    Args:
        logits, out: last dimension contiguous; targets: [N] int64, contiguous.
        saved: the four of `selective_statistics`.
        upstream: d_logprobs, d_entropy, d_logsumexp: [N] float32, contiguous, or None.
    """
    num_rows, vocab = logits.shape
    config = ELEMENTWISE["selective_gradient"]
    block = min(config.block, triton.next_power_of_2(vocab))
    launch(
        selective_gradient_kernel,
        (num_rows, triton.cdiv(vocab, block)),
        logits,
        targets,
        *saved[1:4],
        *upstream,
        out,
        vocab,
        logits.stride(0),
        out.stride(0),
        inner,
        outer,
        SOFTCAP=softcap,
        BLOCK=block,
        num_warps=config.warps,
    )
