"""What the vocabulary kernels share on the device: a logits tile, the transform, the online softmax, the tile order.

Logits z are kept in natural units and every sum is relative to the running row maximum, so that a common offset of all
logits (±1e4) costs no accuracy: z − m is formed first and only then scaled for exp2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Its exponential is 0, and 0 times it is still 0, where 0 · (−inf) would be NaN. No finite logit of use lies so far
# below its row's maximum, so that a divergence counts the whole distance to a reference that all but excludes a token;
# from one that gives it no mass at all, it is huge instead of infinite.
VERY_NEGATIVE = tl.constexpr(-1e20)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def log(x):
    return tl.log2(x) * LN2


@triton.jit
def grouped_order(item, blocks_m, others, GROUP_M: tl.constexpr):
    """Work item -> (row block, other): GROUP_M row blocks share what `other` names before the next one is touched.

    The programs that run at one time then read a patch of both operands that stays in L2.
    """
    per_group = GROUP_M * others
    first = (item // per_group) * GROUP_M
    size = tl.minimum(blocks_m - first, GROUP_M)
    within = item % per_group
    return first + within % size, within // size


@triton.jit
def raw_logits(
    hidden,  # pointer to [*, D], or a TMA descriptor of the compacted rows
    weight,  # pointer to [V, D], or a TMA descriptor
    index,  # [BLOCK_M] int64: rows of hidden (pointer only)
    row,  # first row of the block (descriptor only)
    column,  # first column of the tile
    vocab,
    dim,
    hidden_stride,
    weight_stride,
    weight_stride_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    HIDDEN_TMA: tl.constexpr,
    WEIGHT_TMA: tl.constexpr,
):
    """hidden[rows] @ weight[column : column + BLOCK_N].T -> [BLOCK_M, BLOCK_N] float32.

    Columns beyond the vocabulary repeat its last one, which spares the loads a mask; the caller discards them.
    """
    offs_k = tl.arange(0, BLOCK_K)
    if not HIDDEN_TMA:
        h_pointers = hidden + index[:, None] * hidden_stride + offs_k[None, :]
    if not WEIGHT_TMA:
        offs_n = tl.minimum(column + tl.arange(0, BLOCK_N), vocab - 1).to(tl.int64)
        w_pointers = weight + offs_n[:, None] * weight_stride + offs_k[None, :] * weight_stride_k
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, dim, BLOCK_K):
        if HIDDEN_TMA:
            h = hidden.load([row, k])
        elif EVEN_K:
            h = tl.load(h_pointers + k)
        else:
            h = tl.load(h_pointers + k, mask=offs_k[None, :] < dim - k, other=0.0)
        if WEIGHT_TMA:
            w = weight.load([column, k])
        elif EVEN_K:
            w = tl.load(w_pointers + k * weight_stride_k)
        else:
            w = tl.load(w_pointers + k * weight_stride_k, mask=offs_k[None, :] < dim - k, other=0.0)
        acc = tl.dot(h.to(COMPUTE), w.to(COMPUTE).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def tanh(x):
    """1 − 2 / (e²ˣ + 1): right at both ends, also where e²ˣ overflows; absolute error 1e-7."""
    return 1.0 - 2.0 / (exp(2.0 * x) + 1.0)


@triton.jit
def transform(x, inner, outer, SOFTCAP: tl.constexpr):
    """Raw logits -> logits: outer · tanh(inner · x) with a softcap, else outer · x."""
    if SOFTCAP:
        x = tanh(x * inner)
    return x * outer


@triton.jit
def transform_gradient(dz, z, inner, outer, SOFTCAP: tl.constexpr):
    """∂/∂z -> ∂/∂x of the transform, from its value z."""
    if SOFTCAP:
        capped = z / outer
        dz = dz * (1.0 - capped * capped) * inner
    return dz * outer


@triton.jit
def load_bias(bias, columns, vocab):
    """[1, BLOCK_N] float32 of the tile's columns; 0 where there is no bias."""
    return tl.load(bias + columns, mask=columns < vocab, other=0.0).to(tl.float32)[None, :]


@triton.jit
def finish_logits(acc, bias, columns, vocab, inner, outer, SOFTCAP: tl.constexpr):
    """Raw products [M, N] -> transformed logits, −inf beyond the vocabulary."""
    if bias is not None:
        acc += load_bias(bias, columns, vocab)
    return tl.where(columns[None, :] < vocab, transform(acc, inner, outer, SOFTCAP), float("-inf"))


@triton.jit
def raise_max(row_max, z):
    """(new maximum, z − maximum, shift ≤ 0 of what was summed before), both differences at least VERY_NEGATIVE."""
    higher = tl.maximum(row_max, tl.max(z, 1))
    return higher, tl.maximum(z - higher[:, None], VERY_NEGATIVE), tl.maximum(row_max - higher, VERY_NEGATIVE)


@triton.jit
def log_softmax(z, row_max, log_sum):
    """z [M, N] -> log p; the two subtractions stay apart for the sake of logits with a large common offset."""
    return tl.maximum((z - row_max[:, None]) - log_sum[:, None], VERY_NEGATIVE)


@triton.jit
def log_mean(log_p, log_q):
    """log ½ (p + q)"""
    top = tl.maximum(log_p, log_q)
    return top + log(0.5 * (exp(log_p - top) + exp(log_q - top)))


def transform_factors(temperature: float, logit_scale: float, softcap: float | None) -> dict[str, float | bool]:
    """The arguments of `transform`: z = softcap · tanh(logit_scale · x / softcap) / temperature."""
    if softcap is None:
        return {"inner": 1.0, "outer": logit_scale / temperature, "softcap": False}
    return {"inner": logit_scale / softcap, "outer": softcap / temperature, "softcap": True}
