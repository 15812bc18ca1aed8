"""∂loss/∂logits over the exponentials that `statistics` stored, E = exp(z − shift) [M, V]: no product.

    write_targets     without entropy and softcap: E[m, target] −= S, one element a row. Then with α = −d_logprobs / S,
                      times the transform's slope,
                          ∂z = α E,   ∂hidden = α ⊙ (E weight),   ∂weight = Eᵀ (α ⊙ hidden)
    stored_gradient   otherwise, in place: log p = log E − log S,  ∂z = p (a + b log p) + c [v = target], and the
                      transform's derivative, with a, b, c of `logit_gradient`

In bfloat16 an exponential is rounded once, to a relative 2⁻⁹: p carries that error, as ∂z does when it is rounded in
its turn, and log p carries it absolutely, whatever the size of the logits; the statistics were made before any
rounding. The target's own p is known exactly. Rows are walked to the end of their padding, a multiple of 128 bytes, so
that loads and stores are 16 bytes wide for a vocabulary of any size.

Bytes: 20 a row read and one element of it written; or M · V elements read and M · V written. FLOPs: a few a row, or
about 12 a logit. In both, rows behind the count are written as zeros, so that the products that follow may run over M
rows whatever the count is.
Tiling: one program a row, or BLOCK columns of a row.
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch
from fastppo_kernels.tile import LN2, VERY_NEGATIVE, exp, fast_log2, transform_gradient

# Stands in for what underflowed to 0. Triton takes a constant below the normal numbers for a float64, and then all that
# is computed with it, at a fraction of the speed.
LEAST = tl.constexpr(2e-38)
SPAN_BLOCKS = 16  # that one program takes: a row's scalars are loaded once for all of them


@triton.jit(do_not_specialize_on_alignment=["targets", "logprobs", "log_sum", "d_logprobs"])
def write_targets_kernel(
    stored,  # [M, V], rows `stride` apart
    rows,  # [M] int32
    count,  # [1]
    targets,  # [N]
    logprobs,  # [N]
    log_sum,  # [N]
    d_logprobs,  # [N]
    alpha,  # [M] float32
    vocab,
    stride,
    slope,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    if m < tl.load(count):
        row = tl.load(rows + m)
        target = tl.load(targets + row)
        # E[target] − S = S (p − 1), with p at the target from its exact log-probability.
        normalizer = tl.load(log_sum + row)
        value = exp(normalizer) * (exp(tl.load(logprobs + row)) - 1.0)
        tl.store(alpha + m, -slope * tl.load(d_logprobs + row) * exp(-normalizer))
        tl.store(stored + m * stride + target, value.to(stored.dtype.element_ty), mask=target < vocab)
    else:
        for start in range(0, stride, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(
                stored + m * stride + column, tl.zeros((BLOCK,), dtype=stored.dtype.element_ty), mask=column < stride
            )


def write_targets(
    stored: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    targets: torch.Tensor,
    statistics: torch.Tensor,
    d_logprobs: torch.Tensor,
    slope: float,
) -> torch.Tensor:
    """E[m, target] −= S in stored [M, V], zeros behind the count; returns α [M], not written there.

    By original row: statistics [4, N], targets [N], d_logprobs [N].
    """
    alpha = torch.empty(stored.shape[0], dtype=torch.float32, device=stored.device)
    config = ELEMENTWISE["write_targets"]
    launch(
        write_targets_kernel,
        (stored.shape[0],),
        stored,
        rows,
        count,
        targets,
        statistics[0],
        statistics[3],
        d_logprobs,
        alpha,
        stored.shape[1],
        stored.stride(0),
        slope,
        BLOCK=config.block,
        num_warps=config.warps,
    )
    return alpha


@triton.jit
def general_gradient(
    e, is_target, logprob, top, normalizer, a, b, c, inner, outer, SOFTCAP: tl.constexpr
):  # fmt: skip
    """∂loss/∂x of exponentials e [BLOCK], with any transform."""
    # What underflowed to 0 has no gradient but the target's own; its logarithm stands in for log 0.
    log_p = tl.where(e > 0.0, fast_log2(tl.maximum(e, LEAST)) * LN2 - normalizer, VERY_NEGATIVE)
    log_p = tl.where(is_target, logprob, log_p)
    p = tl.where(is_target | (e == 0.0), exp(log_p), e * exp(-normalizer))
    dz = p * (a + b * log_p) + tl.where(is_target, c, 0.0)
    dz = transform_gradient(dz, (log_p + normalizer) + top, inner, outer, SOFTCAP)
    return tl.where((e == 0.0) & (is_target == 0), 0.0, dz)


@triton.jit(
    do_not_specialize_on_alignment=[
        *("targets", "logprobs", "entropy", "shift", "log_sum", "d_logprobs", "d_entropy"),
    ]
)
def stored_gradient_kernel(
    stored,  # [M, V], rows `stride` apart
    rows,  # [M] int32
    count,  # [1]
    # by original row: [N]
    targets,
    logprobs,
    entropy,
    shift,
    log_sum,
    d_logprobs,
    d_entropy,  # or None
    stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * SPAN
    end = tl.minimum(start + SPAN, stride)
    lane = tl.arange(0, BLOCK)
    place = stored + m * stride
    real = m < tl.load(count)
    row = tl.load(rows + m, mask=real, other=0)
    c = tl.load(d_logprobs + row, mask=real, other=0.0)
    b = 0.0
    if d_entropy is not None:
        b -= tl.load(d_entropy + row, mask=real, other=0.0)
    if (b == 0.0) & (c == 0.0):
        for first in range(start, end, BLOCK):
            column = first + lane
            tl.store(place + column, tl.zeros((BLOCK,), dtype=stored.dtype.element_ty), mask=column < end)
        return
    a = b * tl.load(entropy + row) - c
    top, normalizer = tl.load(shift + row), tl.load(log_sum + row)
    target, logprob = tl.load(targets + row), tl.maximum(tl.load(logprobs + row), VERY_NEGATIVE)
    if SOFTCAP:
        for first in range(start, end, BLOCK):
            column = first + lane
            e = tl.load(place + column, mask=column < end, other=0.0).to(tl.float32)
            dz = general_gradient(
                e, column == target, logprob, top, normalizer, a, b, c, inner, outer, SOFTCAP
            )  # fmt: skip
            tl.store(place + column, dz.to(stored.dtype.element_ty), mask=column < end)
    else:
        # p (a + b log p) of p = E / S: a logarithm, a multiply-add and a multiplication a logit.
        by = outer * exp(-normalizer)
        constant, slope = by * (a - b * normalizer), by * b * LN2
        for first in range(start, end, BLOCK):
            column = first + lane
            e = tl.load(place + column, mask=column < end, other=0.0).to(tl.float32)
            dz = e * (constant + slope * fast_log2(tl.maximum(e, LEAST)))
            tl.store(place + column, dz.to(stored.dtype.element_ty), mask=column < end)
        if (target >= start) & (target < end):
            tl.debug_barrier()  # the same element may have been another thread's
            dz = outer * (exp(logprob) * (a + b * logprob) + c)
            tl.store(place + target, dz.to(stored.dtype.element_ty))


def stored_gradient(
    stored: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    targets: torch.Tensor,
    statistics: torch.Tensor,
    d_logprobs: torch.Tensor,
    d_entropy: torch.Tensor | None,
    transform: dict,
) -> None:
    """∂z over stored [M, V], in place, zeros behind the count; rows `tiling.row_stride(V)` elements apart, their own.

    Args:
        rows [M] int32, count [1] int32: of `rows.compact_rows`.
        targets [N] int64, statistics [4, N] of `statistics.row_statistics`, d_logprobs, d_entropy [N] float32 or None.
        transform: of `tile.transform_factors`.
    """
    config = ELEMENTWISE["stored_gradient"]
    span = SPAN_BLOCKS * config.block
    launch(
        stored_gradient_kernel,
        (stored.shape[0], triton.cdiv(stored.stride(0), span)),
        stored,
        rows,
        count,
        targets,
        *statistics,
        d_logprobs,
        d_entropy,
        stored.stride(0),
        **transform,
        SPAN=span,
        BLOCK=config.block,
        num_warps=config.warps,
    )
