"""Generalized advantage estimation (Schulman et al., 2016, arXiv:1506.02438) over padded or packed sequences.

    rewards, values, mask, dones [S, T], or packed [N]  ->  advantages, returns, float32, 0 at padding

        A_t = r_t − V_t + γ (V_{t+1} + λ A_{t+1})        return_t = A_t + V_t

where t + 1 is the next real token, nothing follows a token that is done, and the bootstrap value follows the last one.

Bytes a token: rewards and values read in their own dtype, 1 each for mask and dones, 8 written (12 in all for bfloat16
without masks, 16 for float32). FLOPs: about 40 a token. Whitening reads and writes the advantages once more, 8.

Tiling: all sequences are one stream of N tokens in memory, cut after the last token of each, so that every load is
aligned whatever T is. A program walks a span of the stream from the right, BLOCK tokens at a time.

    many rows, or short ones   a span is whole rows                             one launch
    few long rows, or packed   spans are of equal length, and a first pass      two launches; the inputs are read twice,
                               sums up each, for those on its left              the second time from L2 where they fit

The algebra. The token before t needs one number of t, h_t = V_t + λ A_t. Both are affine in h = h_{t+1}:

    A_t = α h + κ      α = γ, κ = r_t − V_t;  where done α = 0;  at the end of a sequence α = 0 and κ += γ · bootstrap
    h_t = a h + c      a = λ α, c = V_t + λ κ;  padding leaves h as it is: a = 1, c = 0

Affine maps compose to affine maps, associatively, so a block is a scan, each token's map from the state at the block's
right edge. Two numbers would do for an inclusive scan; A_t needs the state before its own token, hence (p, q) beside
(a, c) in `next_group`.

The scan runs forward. `tl.associative_scan(…, reverse=True)` over tuples is reported to give wrong results on a GPU
(triton issue 4362, of Triton 3.0 and still open, whose reporter got right ones by flipping or by a descending range;
issue 8412 of October 2025 reports the same, closed). So groups of 4 neighboring tokens are read in descending order,
the 4 as one vector in ascending order, which keeps loads and stores wide, and a thread composes its 4 in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.configs import ELEMENTWISE
from fastppo_kernels.launch import launch

PROGRAMS = 4096  # about as many as a large chip has at a time
LONG = 1024  # tokens; rows beyond, and packed ones, are walked in blocks of more tokens by more warps
SPANS = 1024  # of equal length; each looks through the summaries to its right until it meets the end of a sequence
MIN_ROWS = 1024  # from here on a program for each row, however long, keeps the chip busy
MAX_BLOCKS = 8  # up to here a row is walked in one go, however few there are
PIECE = 128  # summaries that a program looks at together


@triton.jit
def then(a1, c1, a2, c2):
    """x -> a1 x + c1, then x -> a2 x + c2. A factor of 0 cuts off whatever stands there, NaN included."""
    return a2 * a1, tl.where(a2 == 0.0, c2, a2 * c1 + c2)


@triton.jit
def apply(a, c, x):
    return tl.where(a == 0.0, c, a * x + c)


@triton.jit
def next_group(a1, c1, p1, q1, a2, c2, p2, q2):
    """(a, c): from the right edge of all groups to the left edge of the last; (p, q): to its right edge."""
    a, c = then(a1, c1, a2, c2)
    p, q = then(a1, c1, p2, q2)
    return a, c, p, q


@triton.jit
def columns(x):
    """[GROUPS, 4] -> four [GROUPS]; the 4 are a thread's own, so nothing moves."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def beside(x0, x1, x2, x3):
    """The reverse of `columns`."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [x0.shape[0], 4])


@triton.jit
def load(x, token, remaining, BLOCK: tl.constexpr):
    """x[token], 0 beyond the stream's end. A guard would make the load narrow, so only the last block has one."""
    if remaining >= BLOCK:
        out = tl.load(x + token)
    else:
        out = tl.load(x + token, mask=token < remaining, other=0)
    return out


@triton.jit
def store(x, token, value, remaining, BLOCK: tl.constexpr):
    if remaining >= BLOCK:
        tl.store(x + token, value)
    else:
        tl.store(x + token, value, mask=token < remaining)


@triton.jit
def find(offsets, start, token, low, high):
    """The sequence of low … high that holds token start + token: the last whose offset is not beyond it."""
    width = high - low
    low, high = low + token * 0, high + token * 0
    while width > 0:
        middle = (low + high + 1) // 2
        beyond = tl.load(offsets + middle) - start > token
        low = tl.where(beyond, low, middle)
        high = tl.where(beyond, middle - 1, high)
        width //= 2
    return low


@triton.jit
def ends(bootstrap, offsets, start, token, exists, remaining, time, first, final):
    """Of each token whether it is the last of its sequence, and the bootstrap value there (0 elsewhere)."""
    if offsets is not None:
        low = find(offsets, start, 0, first, final)
        high = find(offsets, start, remaining - 1, low, final)
        sequence = find(offsets, start, token, low, high)
        last = exists & (tl.load(offsets + sequence + 1) - start == token + 1)
    else:
        row = start // time
        along = (start - row * time).to(tl.int32) + token
        sequence = row + along // time
        last = exists & (along % time == time - 1)
    edge = tl.zeros_like(token).to(tl.float32)
    if bootstrap is not None:
        edge = tl.load(bootstrap + sequence, mask=last, other=0.0).to(tl.float32)
    return last, edge


@triton.jit
def scan_block(
    rewards, values, mask, dones, bootstrap, offsets, block, tokens, time, first, final, gamma, lam,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The maps of a block [BLOCK / 4, 4] of tokens, groups in descending order, from the state at its right edge.

    Returns α, κ of each token; a, c of the whole block; V, whether the token is real, its place in the block; how many
    tokens the block has.
    """
    start = block.to(tl.int64) * BLOCK
    remaining = tl.minimum(tokens - start, BLOCK).to(tl.int32)
    group = BLOCK // 4 - 1 - tl.arange(0, BLOCK // 4)
    token = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    exists = token < remaining
    real = exists
    if mask is not None:
        real = load(mask + start, token, remaining, BLOCK) != 0
    goes_on = real
    if dones is not None:
        goes_on = real & (load(dones + start, token, remaining, BLOCK) == 0)
    reward = tl.where(real, load(rewards + start, token, remaining, BLOCK).to(tl.float32), 0.0)
    value = tl.where(real, load(values + start, token, remaining, BLOCK).to(tl.float32), 0.0)
    last, edge = ends(bootstrap, offsets, start, token, exists, remaining, time, first, final)

    alpha = tl.where(goes_on & (last == 0), gamma, 0.0)
    kappa = reward - value + tl.where(goes_on & last, gamma * edge, 0.0)
    a = tl.where(real, lam * alpha, tl.where(last, 0.0, 1.0))
    c = tl.where(real, value + lam * kappa, edge)

    # Within each group, from right to left: (a, c) of the tokens so far take the group's right edge to the next token.
    alpha0, alpha1, alpha2, alpha3 = columns(alpha)
    kappa0, kappa1, kappa2, kappa3 = columns(kappa)
    a0, a1, a2, a3 = columns(a)
    c0, c1, c2, c3 = columns(c)
    alpha2, kappa2 = then(a3, c3, alpha2, kappa2)
    a2, c2 = then(a3, c3, a2, c2)
    alpha1, kappa1 = then(a2, c2, alpha1, kappa1)
    a1, c1 = then(a2, c2, a1, c1)
    alpha0, kappa0 = then(a1, c1, alpha0, kappa0)
    a0, c0 = then(a1, c1, a0, c0)

    # From group to group: (p, q) take the block's right edge to the group's.
    one, zero = tl.full([BLOCK // 4], 1.0, tl.float32), tl.zeros([BLOCK // 4], tl.float32)
    a, c, p, q = tl.associative_scan((a0, c0, one, zero), 0, next_group)
    alpha0, kappa0 = then(p, q, alpha0, kappa0)
    alpha1, kappa1 = then(p, q, alpha1, kappa1)
    alpha2, kappa2 = then(p, q, alpha2, kappa2)
    alpha3, kappa3 = then(p, q, alpha3, kappa3)
    alpha, kappa = beside(alpha0, alpha1, alpha2, alpha3), beside(kappa0, kappa1, kappa2, kappa3)
    whole_a, whole_c = tl.sum(tl.where(group == 0, a, 0.0), 0), tl.sum(tl.where(group == 0, c, 0.0), 0)
    return alpha, kappa, whole_a, whole_c, value, real, token, remaining


@triton.jit
def blocks_of_span(tokens, span, BLOCK: tl.constexpr):
    """(first block, first block beyond) of this program's span, whose edges are rounded down to whole blocks."""
    program = tl.program_id(0).to(tl.int64)
    left = (program * span // BLOCK).to(tl.int32)
    right = ((program + 1) * span // BLOCK).to(tl.int32)
    end = ((tokens + BLOCK - 1) // BLOCK).to(tl.int32)
    return left, tl.where(program == tl.num_programs(0) - 1, end, right), end


@triton.jit
def sequences_of_span(offsets, left, right, tokens, sequences, BLOCK: tl.constexpr):
    """(first, last) packed sequence with a token in these blocks."""
    first, final = 0, 0
    if offsets is not None:
        start = left.to(tl.int64) * BLOCK
        first = find(offsets, start, 0, 0, sequences - 1)
        final = find(offsets, tl.minimum(right.to(tl.int64) * BLOCK, tokens) - 1, 0, first, sequences - 1)
    return first, final


@triton.jit(do_not_specialize=["tokens", "sequences", "time", "span"])
def gae_summary_kernel(
    rewards,  # [N]
    values,  # [N]
    mask,  # [N] bytes or None
    dones,  # [N] bytes or None
    bootstrap,  # [S] or None
    offsets,  # [S + 1] or None: then all sequences have length `time`
    summary,  # [programs, 2] float32: a, c of each span
    tokens,
    sequences,
    time,
    span,
    gamma,
    lam,
    BLOCK: tl.constexpr,
):
    left, right, _ = blocks_of_span(tokens, span, BLOCK)
    first, final = sequences_of_span(offsets, left, right, tokens, sequences, BLOCK)
    a, c = 1.0, 0.0
    for back in range(right - left):
        _alpha, _kappa, block_a, block_c, _value, _real, _token, _remaining = scan_block(
            rewards, values, mask, dones, bootstrap, offsets, right - 1 - back, tokens, time, first, final, gamma, lam,
            BLOCK,
        )  # fmt: skip
        a, c = then(a, c, block_a, block_c)
    tl.store(summary + tl.program_id(0) * 2, a)
    tl.store(summary + tl.program_id(0) * 2 + 1, c)


@triton.jit
def state_from_the_right(summary, PIECE: tl.constexpr):
    """h at the right edge of this program's span, from the summaries of those to its right, the nearest first."""
    a, c = 1.0, 0.0
    nearest = tl.program_id(0) + 1
    index = PIECE - 1 - tl.arange(0, PIECE)
    while (nearest < tl.num_programs(0)) & (a != 0.0):
        inside = nearest + index < tl.num_programs(0)
        span_a = tl.load(summary + (nearest + index) * 2, mask=inside, other=1.0)
        span_c = tl.load(summary + (nearest + index) * 2 + 1, mask=inside, other=0.0)
        span_a, span_c = tl.associative_scan((span_a, span_c), 0, then)
        piece_a, piece_c = tl.sum(tl.where(index == 0, span_a, 0.0), 0), tl.sum(tl.where(index == 0, span_c, 0.0), 0)
        a, c = then(piece_a, piece_c, a, c)
        nearest += PIECE
    return c  # nothing stands beyond the stream's end


@triton.jit(do_not_specialize=["tokens", "sequences", "time", "span", "ahead"])
def gae_kernel(
    rewards,  # [N]
    values,  # [N]
    mask,  # [N] bytes or None
    dones,  # [N] bytes or None
    bootstrap,  # [S] or None
    offsets,  # [S + 1] or None: then all sequences have length `time`
    summary,  # [programs, 2] or None: then a sequence ends within `ahead` blocks of every span's right edge
    advantages,  # [N] float32
    returns,  # [N] float32
    moments,  # [programs, 3] float32 or None: number of real tokens, mean of A, Σ (A − mean)²
    tokens,
    sequences,
    time,
    span,
    ahead,
    gamma,
    lam,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    left, right, end = blocks_of_span(tokens, span, BLOCK)
    begin = tl.minimum(right + ahead, end)
    first, final = sequences_of_span(offsets, left, begin, tokens, sequences, BLOCK)
    h = 0.0
    if summary is not None:
        h = state_from_the_right(summary, PIECE)
    count, mean, spread = 0.0, 0.0, 0.0
    for back in range(begin - left):
        block = begin - 1 - back
        alpha, kappa, a, c, value, real, token, remaining = scan_block(
            rewards, values, mask, dones, bootstrap, offsets, block, tokens, time, first, final, gamma, lam, BLOCK
        )
        advantage = tl.where(real, apply(alpha, kappa, h), 0.0)
        h = apply(a, c, h)
        if block < right:
            start = block.to(tl.int64) * BLOCK
            store(advantages + start, token, advantage, remaining, BLOCK)
            store(returns + start, token, advantage + value, remaining, BLOCK)
            if moments is not None:
                # Two sets merged (Chan et al., 1979): exact where a sum of squares would cancel.
                n = tl.sum(real.to(tl.float32))
                block_mean = tl.sum(advantage) / tl.maximum(n, 1.0)
                off = tl.where(real, advantage - block_mean, 0.0)
                both = tl.maximum(count + n, 1.0)
                step = block_mean - mean
                spread += tl.sum(off * off) + step * step * count * n / both
                mean += step * n / both
                count += n
    if moments is not None:
        out = moments + tl.program_id(0) * 3
        tl.store(out, count)
        tl.store(out + 1, mean)
        tl.store(out + 2, spread)


@triton.jit(do_not_specialize=["programs"])
def gae_moments_kernel(
    moments,  # [programs, 3] float32
    scale,  # [2] float32
    programs,
    BLOCK: tl.constexpr,
):
    """All programs' moments -> the mean and 1 / sqrt(unbiased variance + 1e-8)."""
    index = tl.arange(0, BLOCK)
    count, total = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        part, inside = moments + (start + index) * 3, start + index < programs
        n = tl.load(part, mask=inside, other=0.0).to(tl.float64)
        count += n
        total += n * tl.load(part + 1, mask=inside, other=0.0)
    tokens = tl.sum(count, 0)
    mean = tl.sum(total, 0) / tl.maximum(tokens, 1.0)
    spread = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        part, inside = moments + (start + index) * 3, start + index < programs
        off = tl.load(part + 1, mask=inside, other=0.0) - mean
        spread += tl.load(part + 2, mask=inside, other=0.0) + tl.load(part, mask=inside, other=0.0) * off * off
    variance = tl.sum(spread, 0) / tl.maximum(tokens - 1.0, 1.0)
    tl.store(scale, mean.to(tl.float32))
    tl.store(scale + 1, 1.0 / tl.sqrt((variance + 1e-8).to(tl.float32)))


@triton.jit(do_not_specialize=["tokens"])
def gae_whiten_kernel(
    advantages,  # [N] float32, in place
    mask,  # [N] bytes or None
    scale,  # [2] float32, of gae_moments_kernel
    tokens,
    BLOCK: tl.constexpr,
):
    """Mean 0 and variance 1, 0 at padding."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    remaining = tl.minimum(tokens - start, BLOCK).to(tl.int32)
    token = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]  # bytes and floats in one layout
    a = (load(advantages + start, token, remaining, BLOCK) - tl.load(scale)) * tl.load(scale + 1)
    if mask is not None:
        a = tl.where(load(mask + start, token, remaining, BLOCK) != 0, a, 0.0)
    store(advantages + start, token, a, remaining, BLOCK)


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    dones: Tensor | None,
    bootstrap: Tensor | None,
    cu_seqlens: Tensor | None,
    gamma: float,
    lam: float,
    *,
    whiten: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns: shape of rewards, float32, 0 at padding. The host never waits for the device.

    Args:
        rewards, values: [S, T], or packed [N] with cu_seqlens; float32, bfloat16 or float16, N > 0.
        mask, dones: bool, same shape, or None; bootstrap: [S], of the same dtypes, or None.
        cu_seqlens: [S + 1] int32 or int64: sequence s is the tokens cu_seqlens[s] … cu_seqlens[s + 1] − 1.
        whiten: give the real advantages mean 0 and variance 1.
    """
    rewards, values, mask, dones, bootstrap, offsets = (
        None if x is None else x.contiguous() for x in (rewards, values, mask, dones, bootstrap, cu_seqlens)
    )
    mask, dones = (None if x is None else x.view(torch.uint8) for x in (mask, dones))  # read as bytes
    tokens, device = rewards.numel(), rewards.device
    advantages, returns = (torch.empty(rewards.shape, dtype=torch.float32, device=device) for _ in range(2))
    sequences, time = rewards.shape if offsets is None else (offsets.numel() - 1, 1)
    config = ELEMENTWISE["gae" if offsets is None and time <= LONG else "gae_long"]
    programs, span, ahead = _spans(tokens, sequences, time if offsets is None else None, config.block)
    inputs = (rewards, values, mask, dones, bootstrap, offsets)
    sizes, factors = (tokens, sequences, time, span), (gamma, lam)
    options = {"BLOCK": config.block, "num_warps": config.warps}

    summary = moments = None
    if ahead is None:
        summary = torch.empty(programs, 2, dtype=torch.float32, device=device)
        launch(gae_summary_kernel, (programs,), *inputs, summary, *sizes, *factors, **options)
    if whiten:
        moments = torch.empty(programs, 3, dtype=torch.float32, device=device)
    outputs = (advantages, returns, moments)
    launch(gae_kernel, (programs,), *inputs, summary, *outputs, *sizes, ahead or 0, *factors, PIECE=PIECE, **options)
    if whiten:
        scale = torch.empty(2, dtype=torch.float32, device=device)
        launch(gae_moments_kernel, (1,), moments, scale, programs, BLOCK=1024, num_warps=4)
        config = ELEMENTWISE["gae_whiten"]
        options = {"BLOCK": config.block, "num_warps": config.warps}
        launch(gae_whiten_kernel, (triton.cdiv(tokens, config.block),), advantages, mask, scale, tokens, **options)
    return advantages, returns


def _spans(tokens: int, sequences: int, time: int | None, block: int) -> tuple[int, int, int | None]:
    """(programs, tokens in the span of each, blocks ahead that hold the end of its last sequence).

    No number of blocks ahead where none is known to be small: then the spans need each other's summaries. `time` is
    None for packed sequences. Nothing here depends on the chip, so the bits don't either.
    """
    blocks = triton.cdiv(tokens, block)
    if time is not None and (sequences >= MIN_ROWS or time <= MAX_BLOCKS * block):
        rows = max(triton.cdiv(block, time), triton.cdiv(sequences, PROGRAMS))
        return triton.cdiv(sequences, rows), rows * time, 1 if rows * time % block else 0
    span = block * triton.cdiv(blocks, SPANS)
    programs = triton.cdiv(tokens, span)
    return programs, span, None if programs > 1 else 0
