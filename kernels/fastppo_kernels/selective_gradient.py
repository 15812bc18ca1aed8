"""∂loss/∂logits from logits that are already there, in one read and one write, over the logits themselves on request.

    logits [N, V], a few scalars a row  (and a reference model's logits)  ->  out [N, V] in the logits' dtype
        ∂z = p (a + b log p) + c [v = target] + d_kl · p (log p − log q − KL), then the transform's derivative

with a = d_logsumexp − d_logprobs − d_entropy · entropy, b = −d_entropy, c = d_logprobs.

Bytes: N · V read of either model, N · V written; rows that cannot contribute are written as zeros without being read.
FLOPs: about 12 a logit, 20 with a reference.
Tiling: one program for BLOCK columns of a row; every element is read before it is written, by the thread that writes
it.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch
from fastppo_kernels.tile import VERY_NEGATIVE, exp, transform, transform_gradient


@triton.jit
def selective_gradient_kernel(
    logits,
    ref_logits,
    targets,
    entropy,
    row_max,
    log_sum,
    kl_center,
    ref_row_max,
    ref_log_sum,
    d_logprobs,
    d_entropy,
    d_logsumexp,
    d_kl,
    out,
    vocab,
    stride,
    ref_stride,
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
    a, b, c, k = 0.0, 0.0, 0.0, 0.0
    if d_logprobs is not None:
        c += tl.load(d_logprobs + row)
    if d_entropy is not None:
        b -= tl.load(d_entropy + row)
    if d_logsumexp is not None:
        a += tl.load(d_logsumexp + row)
    if ref_logits is not None:
        k += tl.load(d_kl + row)
    destination = out + row * out_stride + column
    if (target < 0) | ((a == 0.0) & (b == 0.0) & (c == 0.0) & (k == 0.0)):
        tl.store(destination, tl.zeros((BLOCK,), dtype=out.dtype.element_ty), mask=inside)
        return
    a = a - c + b * tl.load(entropy + row)
    x = tl.load(logits + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    z = transform(x, inner, outer, SOFTCAP)
    log_p = tl.maximum((z - tl.load(row_max + row)) - tl.load(log_sum + row), VERY_NEGATIVE)
    factor = a + b * log_p
    if ref_logits is not None:
        ref_x = tl.load(ref_logits + row * ref_stride + column, mask=inside, other=0.0).to(tl.float32)
        ref_z = transform(ref_x, inner, outer, SOFTCAP)
        log_q = tl.maximum((ref_z - tl.load(ref_row_max + row)) - tl.load(ref_log_sum + row), VERY_NEGATIVE)
        factor += k * (log_p - log_q - tl.load(kl_center + row))
    dz = exp(log_p) * factor + tl.where(column == target, c, 0.0)
    dx = transform_gradient(dz, z, inner, outer, SOFTCAP)
    tl.store(destination, dx.to(out.dtype.element_ty), mask=inside)


def selective_gradient(
    logits: torch.Tensor,
    ref_logits: torch.Tensor | None,
    targets: torch.Tensor,
    saved: torch.Tensor | list[torch.Tensor],
    upstream: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    out: torch.Tensor,
    *,
    inner: float,
    outer: float,
    softcap: bool,
) -> None:
    """∂logits into out [N, V], which may be the logits.

    Args:
        logits, ref_logits, out: last dimension contiguous; targets: [N] int64, contiguous. No ref_logits where no
            d_kl comes.
        saved: the four or eight of `selective_statistics`.
        upstream: d_logprobs, d_entropy, d_logsumexp, d_kl: [N] float32, contiguous, or None.
    """
    num_rows, vocab = logits.shape
    config = ELEMENTWISE["selective_gradient"]
    block = min(config.block, triton.next_power_of_2(vocab))
    launch(
        selective_gradient_kernel,
        (num_rows, triton.cdiv(vocab, block)),
        logits,
        ref_logits,
        targets,
        *saved[1:4],
        *((None, None, None) if ref_logits is None else saved[5:8]),
        *upstream,
        out,
        vocab,
        logits.stride(0),
        0 if ref_logits is None else ref_logits.stride(0),
        out.stride(0),
        inner,
        outer,
        SOFTCAP=softcap,
        BLOCK=block,
        num_warps=config.warps,
    )
