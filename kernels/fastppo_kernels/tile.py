"""What the vocabulary kernels share on the device: a tile of logits, the transform, the softmax merge, the tile order.

Every sum is relative to a row constant near the logits z, so that a common offset of all logits (±1e4) costs hardly any
accuracy: z − shift is formed first and only then scaled for exp2, or both in one multiply-add (`binary_exponents`).
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpretedFunction

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
def _fast_log2(x):
    """One instruction where tl.log2 takes 20; the error is 2⁻²², absolute near 1 and relative elsewhere."""
    return libdevice.fast_log2f(x)


@triton.jit
def _log2(x):
    return tl.log2(x)


fast_log2 = _log2 if isinstance(exp, InterpretedFunction) else _fast_log2  # the interpreter has no libdevice


@triton.jit
def grouped_order(item, blocks_m, tiles, GROUP_M: tl.constexpr):
    """Work item -> (row block, tile of columns): GROUP_M row blocks take a tile of columns before the next tile.

    The programs that run at one time then read a patch of both operands that stays in L2.
    """
    per_group = GROUP_M * tiles
    first = (item // per_group) * GROUP_M
    size = tl.minimum(blocks_m - first, GROUP_M)
    within = item % per_group
    return first + within % size, within // size


@triton.jit
def described(x, rows, columns, stride, MADE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A descriptor of x [rows, columns], rows `stride` apart, in blocks of ROWS × COLUMNS, zeros beyond either end.

    MADE: x is one already, made by the host, and the bulk copy engine reads it (see `launch.operand`). On older chips x
    is a pointer: a descriptor's loads become loads through pointers there, and only if the kernel makes it does the
    compiler know that rows are aligned, and loads 16 bytes at a time, asynchronously.
    """
    if MADE:
        return x
    else:
        return tl.make_tensor_descriptor(x, shape=[rows, columns], strides=[stride, 1], block_shape=[ROWS, COLUMNS])


@triton.jit
def logits_tile(
    hidden,  # descriptor of [M, D], blocks [BLOCK_M, BLOCK_K]
    weight,  # descriptor of [v, D], blocks [BLOCK_N, BLOCK_K]
    row,
    column,
    dim,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """hidden[row : row + BLOCK_M] @ weight[column : column + BLOCK_N].T -> [BLOCK_M, BLOCK_N] float32.

    Descriptors give zeros beyond either end, so sizes need no masks: the caller discards what lies outside.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, dim, BLOCK_K):
        h = hidden.load([row, k])  # [BLOCK_M, BLOCK_K]
        w = weight.load([column, k])  # [BLOCK_N, BLOCK_K]
        acc = tl.dot(h, w.T, acc, input_precision=PRECISION)
    return acc


# What SOFTCAP is for a softcap far above the logits of any model; below it 1 − 2 / (e²ˣ + 1) is right to 1e-5 a logit.
FAR = tl.constexpr(2)
FAR_SOFTCAP = 100.0


@triton.jit
def tanh(x, SOFTCAP: tl.constexpr):
    """1 − 2 / (e²ˣ + 1): right at both ends, also where e²ˣ overflows; absolute error 1e-7, times the softcap.

    FAR: x · P(x²) / Q(x²), fitted on |x| <= 9 and above 1 at 10, so that large logits give 1; relative error 4e-7, so
    that logits come out as they went in. It takes one MUFU operation less and ten others more.
    """
    if SOFTCAP != FAR:
        return 1.0 - 2.0 / (exp(2.0 * x) + 1.0)
    x = tl.clamp(x, -10.0, 10.0, propagate_nan=tl.PropagateNan.ALL)
    s = x * x
    p = (((1.3353251e-8 * s + 2.0608364e-5) * s + 3.4955596e-3) * s + 0.13381007) * s + 1.0
    q = (((7.776066e-7 * s + 3.285577e-4) * s + 0.02587689) * s + 0.46714324) * s + 1.0
    return tl.clamp(x * p / q, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def transform(x, inner, outer, SOFTCAP: tl.constexpr):
    """Raw logits -> logits: outer · tanh(inner · x) with a softcap, else outer · x."""
    if SOFTCAP:
        x = tanh(x * inner, SOFTCAP)
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
def tanh_of_logits(acc, bias, columns, vocab, inner, SOFTCAP: tl.constexpr):
    """The inner part of a softcap, from raw products [M, N]."""
    if bias is not None:
        acc += load_bias(bias, columns, vocab)
    return tanh(acc * inner, SOFTCAP)


@triton.jit
def binary_exponents(acc, bias, shift, columns, vocab, inner, outer, SOFTCAP: tl.constexpr):
    """(z − shift) log₂ e of raw products [M, N] and a shift [M]: exp2 of it is exp(z − shift).

    Without a softcap one multiply-add a logit: the product is not rounded before the shift is taken from it, so that a
    common offset of all logits costs no more than the rounding of shift · log₂ e, the same for all of a row.
    """
    if SOFTCAP:
        acc = tanh_of_logits(acc, bias, columns, vocab, inner, SOFTCAP)
    elif bias is not None:
        acc += load_bias(bias, columns, vocab)
    return acc * (outer * LOG2E) - (shift * LOG2E)[:, None]


@triton.jit
def binary_log_softmax(acc, bias, row_max, log_sum, columns, vocab, inner, outer, SOFTCAP: tl.constexpr):
    """log₂ p of raw products [M, N], at least that of log p = VERY_NEGATIVE, by the arithmetic that made the sums.

    The two subtractions stay apart for the sake of logits with a large common offset.
    """
    x = binary_exponents(acc, bias, row_max, columns, vocab, inner, outer, SOFTCAP) - (log_sum * LOG2E)[:, None]
    return tl.maximum(x, VERY_NEGATIVE * LOG2E, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def below(z, shift):
    """z − shift, at least VERY_NEGATIVE: the exponent of a softmax. A NaN stays one, in the same single instruction."""
    return tl.maximum(z - shift, VERY_NEGATIVE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log_softmax(z, row_max, log_sum):
    """z [M, N] -> log p; the two subtractions stay apart for the sake of logits with a large common offset."""
    return below(z - row_max[:, None], log_sum[:, None])


@triton.jit
def raise_max(top, z, AXIS: tl.constexpr):
    """The softmax merge: a maximum so far, and a tile of logits, or of maxima, along AXIS of which it is to be raised.

    Returns the new maximum, the shift ≤ 0 of the sums so far, and z less the new maximum. With s = exp of a shift,
    Σ eᶻ⁻ᵐ becomes s · Σ eᶻ⁻ᵐ, and Σ eᶻ⁻ᵐ (z − m) becomes s · (Σ eᶻ⁻ᵐ (z − m) + shift · Σ eᶻ⁻ᵐ).
    """
    higher = tl.maximum(top, tl.max(z, AXIS))
    return higher, below(top, higher), below(z, tl.expand_dims(higher, AXIS))


@triton.jit
def logprob_and_entropy(taken, top, total, weighted, max_entropy):
    """From a target's logit, and a row's shift and sums Σ e, Σ e (z − shift): log-prob, entropy and log Σ e.

    In range whatever the rounding; a NaN stays one.
    """
    log_sum = log(total)
    logprob = (taken - top) - log_sum
    entropy = log_sum - weighted / total
    entropy = tl.where(entropy < 0.0, 0.0, tl.where(entropy > max_entropy, max_entropy, entropy))
    return tl.where(logprob > 0.0, 0.0, logprob), entropy, log_sum


def steepest(transform: dict[str, float]) -> float:
    """The greatest slope of the transform that these factors make."""
    return abs(transform["outer"] * transform["inner"])


def transform_factors(temperature: float, logit_scale: float, softcap: float | None) -> dict[str, float]:
    """The arguments of `transform`: z = softcap · tanh(logit_scale · x / softcap) / temperature."""
    if softcap is None:
        return {"inner": 1.0, "outer": logit_scale / temperature, "SOFTCAP": 0}
    kind = FAR.value if softcap > FAR_SOFTCAP else 1
    return {"inner": logit_scale / softcap, "outer": softcap / temperature, "SOFTCAP": kind}
