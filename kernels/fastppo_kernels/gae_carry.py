"""The state at the right edge of each chunk, from the chunks' composite maps.

    summary [chunks, S, 5], bootstrap [S]  ->  carry [chunks, S, 2] float32: A, V

Bytes: 20 read, 8 written a chunk and sequence. Tiling: a program has a block of sequences and walks the chunks from
the right.
"""

import triton
import triton.language as tl

from fastppo_kernels.gae_maps import apply_map


@triton.jit
def gae_carry_kernel(summary, bootstrap, carry, num_sequences, chunks, ROWS: tl.constexpr):
    sequence = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = sequence < num_sequences
    advantage = tl.zeros((ROWS,), dtype=tl.float32)
    value = tl.zeros((ROWS,), dtype=tl.float32)
    if bootstrap is not None:
        value = tl.load(bootstrap + sequence, mask=inside, other=0.0)
    for back in range(chunks):
        place = (chunks - 1 - back) * num_sequences + sequence
        tl.store(carry + place * 2, advantage, mask=inside)
        tl.store(carry + place * 2 + 1, value, mask=inside)
        chunk_map = summary + place * 5
        alpha = tl.load(chunk_map, mask=inside, other=1.0)
        beta = tl.load(chunk_map + 1, mask=inside, other=0.0)
        c = tl.load(chunk_map + 2, mask=inside, other=0.0)
        delta = tl.load(chunk_map + 3, mask=inside, other=1.0)
        w = tl.load(chunk_map + 4, mask=inside, other=0.0)
        advantage = apply_map(alpha, beta, c, advantage, value)
        value = tl.where(delta == 0.0, 0.0, delta * value) + w
