"""Advantages and returns of a chunk of time of a block of sequences, from the state at its right edge.

    rewards, values, mask, dones [S, T] or packed  ->  advantages, returns; with moments also count, mean, Σ (A − mean)²

Bytes: 8 read and 8 written a token, and 1 for each of mask and dones. FLOPs: about 40 a token.
Tiling: a program has ROWS sequences and walks its chunk from the right, BLOCK tokens at a time: an associative scan
inside the block, the state (A, V) carried between blocks. Where sequences are many a chunk is the whole of T; where
they are few and long, `gae_summary` and `gae_carry` give each chunk its state first.
"""

import triton
import triton.language as tl

from fastppo_kernels.gae_maps import apply_map, bounds, leftmost, scan_block


@triton.jit
def gae_scan_kernel(
    rewards,
    values,
    mask,
    dones,
    bootstrap,
    offsets,
    carry,
    advantages,
    returns,
    moments,
    num_sequences,
    time,
    chunk,
    gamma,
    lam,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = sequence < num_sequences
    first, length = bounds(offsets, sequence, num_sequences, time)
    t_in_block = tl.arange(0, BLOCK)
    if carry is not None:
        state = carry + (tl.program_id(1) * num_sequences + sequence) * 2
        advantage = tl.load(state, mask=inside, other=0.0)
        value = tl.load(state + 1, mask=inside, other=0.0)
    else:
        advantage = tl.zeros((ROWS,), dtype=tl.float32)
        value = tl.zeros((ROWS,), dtype=tl.float32)
        if bootstrap is not None:
            value = tl.load(bootstrap + sequence, mask=inside, other=0.0)
    left = tl.program_id(1) * chunk
    right = tl.minimum(left + chunk, tl.max(length, 0).to(tl.int32))
    count, mean, spread = 0.0, 0.0, 0.0
    for back in range(tl.cdiv(right - left, BLOCK)):
        t = left + (tl.cdiv(right - left, BLOCK) - 1 - back) * BLOCK + t_in_block
        alpha, beta, c, delta, w, v, real, exists, where = scan_block(
            rewards, values, mask, dones, offsets, first, length, t, time, gamma, lam
        )
        a = apply_map(alpha, beta, c, advantage[:, None], value[:, None])
        tl.store(advantages + where, tl.where(real, a, 0.0), mask=exists)
        tl.store(returns + where, tl.where(real, a + v, 0.0), mask=exists)
        advantage = leftmost(a, t_in_block)
        value = leftmost(tl.where(delta == 0.0, 0.0, delta * value[:, None]) + w, t_in_block)
        if moments is not None:
            # Two sets merged (Chan et al., 1979): exact where a sum of squares would cancel.
            n = tl.sum(tl.sum(real.to(tl.float32), 1), 0)
            block_mean = tl.sum(tl.sum(tl.where(real, a, 0.0), 1), 0) / tl.maximum(n, 1.0)
            off = tl.where(real, a - block_mean, 0.0)
            both = tl.maximum(count + n, 1.0)
            step = block_mean - mean
            spread += tl.sum(tl.sum(off * off, 1), 0) + step * step * count * n / both
            mean += step * n / both
            count += n
    if moments is not None:
        out = moments + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 3
        tl.store(out, count)
        tl.store(out + 1, mean)
        tl.store(out + 2, spread)
