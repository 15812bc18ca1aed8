"""Generalized advantage estimation as a composition of maps, what its three kernels share on the device.

A token maps the state (A, V) of the next real token to its own:

    A' = α A + β V + c      α = γ λ, β = γ (both 0 where done), c = r − V_t
    V' = δ V + w            δ = 0, w = V_t

and padding is the identity (α = δ = 1, the rest 0), so that the successor of a token is the next real one. Maps of
this form are closed under composition, which is associative: five numbers each, and a scan in any blocking gives
every A.
"""

import triton
import triton.language as tl


@triton.jit
def compose(alpha1, beta1, c1, delta1, w1, alpha2, beta2, c2, delta2, w2):
    """The second map after the first; in a reverse scan the first is the later in time."""
    return (
        alpha2 * alpha1,
        alpha2 * beta1 + beta2 * delta1,
        alpha2 * c1 + beta2 * w1 + c2,
        delta2 * delta1,
        delta2 * w1 + w2,
    )


@triton.jit
def bounds(offsets, sequence, num_sequences, time):
    """(first token, number of tokens) of each sequence: from cu_seqlens, or of rows of `time` tokens."""
    inside = sequence < num_sequences
    if offsets is not None:
        first = tl.load(offsets + sequence, mask=inside, other=0).to(tl.int64)
        length = tl.load(offsets + sequence + 1, mask=inside, other=0).to(tl.int64) - first
    else:
        first = sequence.to(tl.int64) * time
        length = tl.where(inside, time, 0).to(tl.int64)
    return first, length


@triton.jit
def scan_block(rewards, values, mask, dones, offsets, first, length, t, time, gamma, lam):
    """Composite maps of a block [ROWS, BLOCK] of tokens, each from the right edge of the block to its token.

    Returns the five numbers, V, whether the token is real, whether there is one, and where in memory it lies.
    """
    where = first[:, None] + t[None, :]
    # Loads are guarded by what is known of whole 16-byte groups; what padding holds is dropped afterwards.
    if offsets is not None:
        exists = t[None, :] < length[:, None]
    else:
        exists = (length[:, None] > 0) & (t[None, :] < time)
    real = exists
    if mask is not None:
        real = real & (tl.load(mask + where, mask=exists, other=0) != 0)
    reward = tl.where(real, tl.load(rewards + where, mask=exists, other=0.0), 0.0)
    value = tl.where(real, tl.load(values + where, mask=exists, other=0.0), 0.0)
    flows = real
    if dones is not None:
        flows = flows & (tl.load(dones + where, mask=exists, other=1) == 0)
    alpha = tl.where(real, tl.where(flows, gamma * lam, 0.0), 1.0)
    beta = tl.where(flows, gamma, 0.0)
    delta = tl.where(real, 0.0, 1.0)
    maps = tl.associative_scan((alpha, beta, reward - value, delta, value), 1, compose, reverse=True)
    return maps[0], maps[1], maps[2], maps[3], maps[4], value, real, exists, where


@triton.jit
def apply_map(alpha, beta, c, advantage, value):
    """A' from the state at the right edge; a factor of 0 cuts off whatever stands there, NaN included."""
    return tl.where(alpha == 0.0, 0.0, alpha * advantage) + tl.where(beta == 0.0, 0.0, beta * value) + c


@triton.jit
def leftmost(x, t_in_block):
    """x [ROWS, BLOCK] -> its first column [ROWS]."""
    return tl.sum(tl.where(t_in_block[None, :] == 0, x, 0.0), 1)
