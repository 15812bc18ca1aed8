"""Log-probability, entropy and logsumexp from logits that are already there, and their gradient.

    statistics   logits [N, V]  (and a reference model's)
                     ->  logprobs, entropy, row_max, log_sum  (and kl, kl_center, ref_row_max, ref_log_sum)  [N] float32
    vjp_into     logits, these and a few scalars a row  ->  ∂logits [N, V] in the logits' dtype, over them on request

        ∂z = p (a + b log p) + c [v = target] + d_kl · p (log p − log q − KL), then the transform's derivative

with a = d_logsumexp − d_logprobs − d_entropy · entropy, b = −d_entropy, c = d_logprobs, and kl = Σ p (log p − log q),
from one sum of the differences of the two models' logits: the difference of two large sums would lose a small
divergence in rounding.

Bytes: the statistics read N · V logits once, of either model, and write 16 N, or 32 N; the gradient reads them again
and writes N · V. Rows without a target, or whose gradient is 0, are not read. FLOPs a logit: about 9, with a reference
19; the gradient 9, with a reference 17.

Instructions: the memory of an H200 (4.3 TB/s as measured, 132 multiprocessors at nominally 2 GHz) brings each of these
8 logits in bfloat16 a clock, in which it issues 128 instructions of a thread. So what a logit takes must stay well
below 16, and below 32 in the gradient, which writes as many: the statistics take 10, the gradient 9, and 7 more for
what a thread does before the 16 logits that it has.

Tiling: the statistics give a program a row, BLOCK columns at a time. The online softmax is kept a lane, that is for
each 16 bytes of logits that one thread loads together: a maximum and sums of its own, merged once at the end of the
row. The loop then has no reduction across threads, one exponential a logit and one a lane for rescaling; with a maximum
for each column, two a logit would keep the exponential units as busy as the memory. The gradient gives a program BLOCK
columns of a row, which no other program reads or writes; the one tile with the target goes with the guarded ones.

Rows need not be aligned (V = 50,257 in bfloat16 starts every other row at an odd address of 2 bytes). Tiles therefore
start at the last 16-byte boundary before the row, so that all but the first and the last tile of a row are loaded and
stored 16 bytes a thread. Those two, guarded a column, go one element a thread: the same sectors of memory by more
instructions. So do all tiles of a tensor that is aligned otherwise than the logits, such as a contiguous gradient of
logits whose rows lie further apart. Rows of fewer than BLOCK columns are a single, guarded tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch
from fastppo_kernels.tile import (
    LN2,
    LOG2E,
    LOWEST,
    below,
    log,
    logprob_and_entropy,
    transform,
    transform_factors,
    transform_gradient,
)

LEAST_SHIFT = tl.constexpr(-1e9)


@triton.jit
def lead(row):
    """Elements from the 16-byte boundary before this pointer to it."""
    return (row.to(tl.int64) % 16 // (row.dtype.element_ty.primitive_bitwidth // 8)).to(tl.int32)


@triton.jit
def wide(row, first, vocab, BLOCK: tl.constexpr):
    """Whether the tile of columns first … first + BLOCK − 1 lies within the row and starts at a 16-byte boundary."""
    return (first >= 0) & (first + BLOCK <= vocab) & ((row + first).to(tl.int64) % 16 == 0)


@triton.jit
def load_tile(row, first, lane, vocab, BLOCK: tl.constexpr):
    """row[first + lane] in float32, 0 outside the row; lane: 0 … BLOCK − 1, in any shape."""
    if wide(row, first, vocab, BLOCK):
        x = tl.load(tl.multiple_of(row + first, 16) + lane)
    else:
        x = tl.load(row + first + lane, mask=(first + lane >= 0) & (first + lane < vocab), other=0.0)
    return x.to(tl.float32)


@triton.jit
def load_logits(row, first, lane, vocab, inner, outer, SOFTCAP: tl.constexpr, BLOCK: tl.constexpr):
    """Transformed logits of a tile, −inf outside the row."""
    inside = (first + lane >= 0) & (first + lane < vocab)
    if SOFTCAP or not wide(row, first, vocab, BLOCK):
        z = transform(load_tile(row, first, lane, vocab, BLOCK), inner, outer, SOFTCAP)
        z = tl.where(inside, z, float("-inf"))
    else:  # spared the guards, a quarter of its instructions; a softcap's code, which is long, is there once
        z = transform(tl.load(tl.multiple_of(row + first, 16) + lane).to(tl.float32), inner, outer, SOFTCAP)
    return z


@triton.jit
def raise_shift(high, shift, z):
    """`raise_max` of a tile [LANES, WIDTH] in powers of two, by one multiply-add a logit.

    The shift is the maximum times log₂ e, rounded, and all exponents are relative to the rounded number: the product of
    a logit and log₂ e is not rounded before the shift is taken from it, so a common offset of the logits costs nothing.
    Where logits are beyond ±1e9 that rounding would leave the range of exp2. Below LEAST_SHIFT they count as nothing,
    as where a part of the vocabulary is masked by −1e30; a row whose maximum lies outside gives NaN or infinities.

    Returns the new maximum and shift, the old shift less the new one, and z log₂ e less the new one.
    """
    highest = tl.max(z, 1)
    higher = tl.maximum(shift, highest * LOG2E)
    x = tl.fma(z, LOG2E, -higher[:, None])
    return tl.maximum(high, highest), higher, below(shift, higher), below(x, 0.0)


@triton.jit(do_not_specialize=["vocab", "stride", "ref_stride"])
def selective_statistics_kernel(
    logits,  # [N, V]
    ref_logits,  # [N, V] or None
    targets,  # [N] int64, negative: no target
    logprobs,  # this and the following: [N] float32
    entropy,
    row_max,
    log_sum,
    kl,  # this and the following: None without a reference
    kl_center,
    ref_row_max,
    ref_log_sum,
    vocab,
    stride,
    ref_stride,
    max_entropy,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + n)
    if target < 0:
        tl.store(logprobs + n, 0.0)
        tl.store(entropy + n, 0.0)
        tl.store(row_max + n, 0.0)
        tl.store(log_sum + n, 0.0)
        if ref_logits is not None:
            tl.store(kl + n, 0.0)
            tl.store(kl_center + n, 0.0)
            tl.store(ref_row_max + n, 0.0)
            tl.store(ref_log_sum + n, 0.0)
        return
    row = logits + n * stride
    WIDTH: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = BLOCK // WIDTH
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    high = tl.full((LANES,), LOWEST, dtype=tl.float32)
    shift = tl.full((LANES,), LEAST_SHIFT, dtype=tl.float32)
    total = tl.zeros((LANES,), dtype=tl.float32)  # Σ 2ˣ over exponents x = z log₂ e − shift
    weighted = tl.zeros((LANES,), dtype=tl.float32)  # Σ 2ˣ x
    if ref_logits is not None:
        ref_row = ref_logits + n * ref_stride
        ref_high, ref_shift, ref_total = high, shift, total
        difference = tl.zeros((LANES,), dtype=tl.float32)  # Σ 2ˣ (x − the reference's)
    for first in range(-lead(row), vocab, BLOCK):
        z = load_logits(row, first, lane, vocab, inner, outer, SOFTCAP, BLOCK)
        high, shift, fall, x = raise_shift(high, shift, z)
        e, scale = tl.exp2(x), tl.exp2(fall)
        if ref_logits is not None:
            ref_z = load_logits(ref_row, first, lane, vocab, inner, outer, SOFTCAP, BLOCK)
            ref_high, ref_shift, ref_fall, ref_x = raise_shift(ref_high, ref_shift, ref_z)
            difference = (difference + total * (fall - ref_fall)) * scale + tl.sum(e * (x - ref_x), 1)
            ref_total = ref_total * tl.exp2(ref_fall) + tl.sum(tl.exp2(ref_x), 1)
        weighted = (weighted + total * fall) * scale + tl.sum(e * x, 1)
        total = total * scale + tl.sum(e, 1)
    greatest, top = tl.max(high, 0), tl.max(shift, 0)
    fall = below(shift, top)
    scale = tl.exp2(fall)
    weighted_sum = tl.sum((weighted + total * fall) * scale, 0)
    total_sum = tl.sum(total * scale, 0)
    # From here on relative to the maximum itself, off from the shift by the rounding of their product.
    rounding = tl.fma(greatest, LOG2E, -top)
    unit = tl.exp2(-rounding)
    # A target outside the vocabulary must not pass for a probability, nor be read.
    taken = tl.load(row + target, mask=target < vocab, other=float("nan")).to(tl.float32)
    taken = transform(taken, inner, outer, SOFTCAP)
    logprob, row_entropy, log_total = logprob_and_entropy(
        taken, greatest, total_sum * unit, (weighted_sum - rounding * total_sum) * LN2 * unit, max_entropy
    )
    tl.store(logprobs + n, logprob)
    tl.store(entropy + n, row_entropy)
    tl.store(row_max + n, greatest)
    tl.store(log_sum + n, log_total)
    if ref_logits is not None:
        ref_greatest, ref_top = tl.max(ref_high, 0), tl.max(ref_shift, 0)
        ref_fall = below(ref_shift, ref_top)
        ref_total_sum = tl.sum(ref_total * tl.exp2(ref_fall), 0)
        ref_log_total = log(ref_total_sum * tl.exp2(-tl.fma(ref_greatest, LOG2E, -ref_top)))
        difference_sum = tl.sum((difference + total * (fall - ref_fall)) * scale, 0)
        center = difference_sum / total_sum * LN2 - log(total_sum) + log(ref_total_sum)
        # A reference whose row is out of range must not pass for an equal one.
        tl.store(kl + n, tl.where((center < 0.0) & (ref_total_sum > 0.0), 0.0, center))
        tl.store(kl_center + n, center)
        tl.store(ref_row_max + n, ref_greatest)
        tl.store(ref_log_sum + n, ref_log_total)


@triton.jit
def log2_softmax(x, top, log_total, inner, outer, SOFTCAP: tl.constexpr):
    """Raw logits -> transformed ones and log₂ p. With a large common offset, z − top is exact."""
    z = transform(x.to(tl.float32), inner, outer, SOFTCAP)
    return z, below((z - top) * LOG2E, log_total * LOG2E)


@triton.jit
def tile_gradient(
    x, ref_x, at_target, a, b, k, top, log_total, ref_top, ref_log_total, inner, outer, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """∂logits of a tile of raw logits, and of a reference's: p (a + b log₂ p + k (log₂ p − log₂ q)) + at_target.

    Without a softcap the transform's constant derivative is in a, b, k and at_target already.
    """
    z, log_p = log2_softmax(x, top, log_total, inner, outer, SOFTCAP)
    factor = a + b * log_p
    if ref_x is not None:
        _ref_z, log_q = log2_softmax(ref_x, ref_top, ref_log_total, inner, outer, SOFTCAP)
        factor += k * (log_p - log_q)
    dz = tl.exp2(log_p) * factor
    if at_target is not None:
        dz += at_target
    if SOFTCAP:
        dz = transform_gradient(dz, z, inner, outer, SOFTCAP)
    return dz


@triton.jit(do_not_specialize=["vocab", "stride", "ref_stride", "out_stride"])
def selective_gradient_kernel(
    logits,  # [N, V]
    ref_logits,  # [N, V] or None
    targets,  # [N] int64, negative: no target
    entropy,  # this and the following: [N] float32
    row_max,
    log_sum,
    kl_center,  # this and the following: None without a reference
    ref_row_max,
    ref_log_sum,
    d_logprobs,  # [N] float32 or None, and the following
    d_entropy,
    d_logsumexp,
    d_kl,
    out,  # [N, V], may be the logits
    vocab,
    stride,
    ref_stride,
    out_stride,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row, out_row = logits + n * stride, out + n * out_stride
    first = tl.program_id(1) * BLOCK - lead(row)
    if first >= vocab:  # the grid allows for the greatest lead
        return
    lane = tl.arange(0, BLOCK)
    target = tl.load(targets + n).to(tl.int32)
    a, b, c, k = 0.0, 0.0, 0.0, 0.0
    if d_logprobs is not None:
        c += tl.load(d_logprobs + n)
    if d_entropy is not None:
        b -= tl.load(d_entropy + n)
    if d_logsumexp is not None:
        a += tl.load(d_logsumexp + n)
    if ref_logits is not None:
        k += tl.load(d_kl + n)
    whole = wide(row, first, vocab, BLOCK) & wide(out_row, first, vocab, BLOCK)
    if (target < 0) | ((a == 0.0) & (b == 0.0) & (c == 0.0) & (k == 0.0)):
        zeros = tl.zeros((BLOCK,), dtype=out.dtype.element_ty)
        if whole:
            tl.store(tl.multiple_of(out_row + first, 16) + lane, zeros)
        else:
            tl.store(out_row + first + lane, zeros, mask=(first + lane >= 0) & (first + lane < vocab))
        return
    a = a - c + b * tl.load(entropy + n)
    top, log_total = tl.load(row_max + n), tl.load(log_sum + n)
    ref_top, ref_log_total, ref_row = 0.0, 0.0, row
    if ref_logits is not None:
        a -= k * tl.load(kl_center + n)
        ref_top, ref_log_total = tl.load(ref_row_max + n), tl.load(ref_log_sum + n)
        ref_row = ref_logits + n * ref_stride
        whole = whole & wide(ref_row, first, vocab, BLOCK)
    b, k = b * LN2, k * LN2
    if SOFTCAP == 0:
        a, b, c, k = a * outer, b * outer, c * outer, k * outer
    # Twice the same, whole: a tile that came 16 bytes a thread and left one element a thread, or the reverse, would be
    # handed from thread to thread through shared memory, and with it all that is computed in between. Most tiles are
    # within the row and hold no target, so they need not look for either.
    ref_x = None
    if whole & ((target < first) | (target >= first + BLOCK)):
        x = tl.load(tl.multiple_of(row + first, 16) + lane)
        if ref_logits is not None:
            ref_x = tl.load(tl.multiple_of(ref_row + first, 16) + lane)
        dz = tile_gradient(
            x, ref_x, None, a, b, k, top, log_total, ref_top, ref_log_total, inner, outer, SOFTCAP
        )  # fmt: skip
        tl.store(tl.multiple_of(out_row + first, 16) + lane, dz.to(out.dtype.element_ty))
    else:
        inside = (first + lane >= 0) & (first + lane < vocab)
        x = tl.load(row + first + lane, mask=inside, other=0.0)
        if ref_logits is not None:
            ref_x = tl.load(ref_row + first + lane, mask=inside, other=0.0)
        at_target = tl.where(first + lane == target, c, 0.0)
        dz = tile_gradient(
            x, ref_x, at_target, a, b, k, top, log_total, ref_top, ref_log_total, inner, outer, SOFTCAP
        )  # fmt: skip
        tl.store(out_row + first + lane, dz.to(out.dtype.element_ty), mask=inside)


def statistics(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> list[Tensor]:
    """logits [N, V], targets [N] int64 -> logprobs, entropy, row_max, log_sum [N] float32; zeros where target < 0.

    With ref_logits [N, V] also kl(p ‖ q), kl_center, ref_row_max, ref_log_sum. Logits are float32, bfloat16 or float16.
    """
    logits, ref_logits = _rows(logits), _rows(ref_logits)
    num_rows, vocab = logits.shape
    out = [
        torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(4 if ref_logits is None else 8)
    ]
    config = ELEMENTWISE["selective_statistics" if ref_logits is None else "selective_statistics_kl"]
    launch(
        selective_statistics_kernel,
        (num_rows,),
        logits,
        ref_logits,
        targets.contiguous(),
        *out,
        *[None] * (8 - len(out)),
        vocab,
        logits.stride(0),
        0 if ref_logits is None else ref_logits.stride(0),
        max_entropy=math.log(vocab),
        **transform_factors(temperature, logit_scale, softcap),
        BLOCK=_block(vocab, config.block),
        num_warps=config.warps,
    )
    return out


def vjp_into(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    d_kl: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """∂logits into out [N, V], last dimension contiguous, which may be the logits themselves.

    Args:
        saved: what `statistics` returned for the same arguments.
        d_logprobs, d_entropy, d_logsumexp, d_kl: upstream scalars [N], or None where that term is absent.
    """
    upstream = (None if g is None else g.float().contiguous() for g in (d_logprobs, d_entropy, d_logsumexp, d_kl))
    logits, ref_logits = _rows(logits), None if d_kl is None else _rows(ref_logits)
    num_rows, vocab = logits.shape
    config = ELEMENTWISE["selective_gradient"]
    block = _block(vocab, config.block)
    greatest_lead = 16 // logits.element_size() - 1
    launch(
        selective_gradient_kernel,
        (num_rows, triton.cdiv(greatest_lead + vocab, block)),
        logits,
        ref_logits,
        targets.contiguous(),
        *saved[1:4],
        *((None, None, None) if ref_logits is None else saved[5:8]),
        *upstream,
        out,
        vocab,
        logits.stride(0),
        0 if ref_logits is None else ref_logits.stride(0),
        out.stride(0),
        **transform_factors(temperature, logit_scale, softcap),
        BLOCK=block,
        num_warps=config.warps,
    )


def _block(vocab: int, greatest: int) -> int:
    """Columns a program: a power of two, at least what a warp loads at a time, so that few sizes are ever compiled."""
    return min(greatest, max(128, triton.next_power_of_2(vocab)))


def _rows(logits: Tensor | None) -> Tensor | None:
    """With a contiguous last dimension; of one column only, its stride says nothing."""
    return logits if logits is None or logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
