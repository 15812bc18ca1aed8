"""The composite map of each chunk of time of each sequence: five numbers that stand for all its tokens.

    rewards, values, mask, dones  ->  summary [chunks, S, 5] float32: α, β, c, δ, w

Bytes: 8 read a token, and 1 for each of mask and dones; `gae_scan` reads them again, mostly from L2. FLOPs: about 40
a token.
Tiling: as `gae_scan`.
"""

import triton
import triton.language as tl

from fastppo_kernels.gae_maps import bounds, compose, leftmost, scan_block


@triton.jit
def gae_summary_kernel(
    rewards,
    values,
    mask,
    dones,
    offsets,
    summary,
    num_sequences,
    time,
    chunk,
    gamma,
    lam,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, length = bounds(offsets, sequence, num_sequences, time)
    t_in_block = tl.arange(0, BLOCK)
    alpha = tl.full((ROWS,), 1.0, dtype=tl.float32)
    beta = tl.zeros((ROWS,), dtype=tl.float32)
    c = tl.zeros((ROWS,), dtype=tl.float32)
    delta = tl.full((ROWS,), 1.0, dtype=tl.float32)
    w = tl.zeros((ROWS,), dtype=tl.float32)
    left = tl.program_id(1) * chunk
    right = tl.minimum(left + chunk, tl.max(length, 0).to(tl.int32))
    for back in range(tl.cdiv(right - left, BLOCK)):
        t = left + (tl.cdiv(right - left, BLOCK) - 1 - back) * BLOCK + t_in_block
        alpha2, beta2, c2, delta2, w2, _v, _real, _exists, _where = scan_block(
            rewards, values, mask, dones, offsets, first, length, t, time, gamma, lam
        )
        alpha, beta, c, delta, w = compose(
            alpha,
            beta,
            c,
            delta,
            w,
            leftmost(alpha2, t_in_block),
            leftmost(beta2, t_in_block),
            leftmost(c2, t_in_block),
            leftmost(delta2, t_in_block),
            leftmost(w2, t_in_block),
        )
    inside = sequence < num_sequences
    out = summary + (tl.program_id(1) * num_sequences + sequence) * 5
    tl.store(out, alpha, mask=inside)
    tl.store(out + 1, beta, mask=inside)
    tl.store(out + 2, c, mask=inside)
    tl.store(out + 3, delta, mask=inside)
    tl.store(out + 4, w, mask=inside)
