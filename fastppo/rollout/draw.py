"""Draw tokens from logits, each with its own probability, however small.

An inversion in float32 has one uniform number of 24 bits for a row, and its cumulative sums near 1 are as coarse: of
262,144 tokens that share a thousandth of the probability, most cannot be drawn at all. Here everything is float64, and
a race decides, whose random numbers near 0 are multiples of 2⁻⁶⁴.

The random numbers are a function of the sequence's key and of the token's place in it. So a sequence has the same ones
in any batch, in any order, in any process and on any device.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 512  # tokens; about the square root of a vocabulary
_AT_A_TIME, _AT_A_TIME_ON_CPU = 2**25, 2**17  # logits, whose float64 copies take 256 MB, or fit in a core's cache

_GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64
_MIX = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64))


def sequence_keys(rollout: str, count: int) -> Tensor:
    """[count] int64, all different: keys of the sequences of one rollout, by their index in the whole of it.

    Args:
        rollout: what distinguishes it from others, such as the run's seed and the step.
    """
    key = int.from_bytes(hashlib.sha256(rollout.encode()).digest()[:8], "little", signed=True)
    return _hash(torch.tensor(key), torch.arange(count))


def random_numbers(keys: Tensor, place: int, vocabulary: int) -> Tensor:
    """Exponentially distributed float64 numbers for `draw`: [b, _BLOCK + number of blocks].

    Args:
        keys: [b] int64, of `sequence_keys`.
        place: the token's place in its sequence.
    """
    streams = _hash(keys, torch.full_like(keys, place))
    bits = _hash(streams[:, None], torch.arange(_BLOCK + -(-vocabulary // _BLOCK), device=keys.device))
    # Odd multiples of 2⁻⁶⁴: a number of 0 would win against any.
    uniform = (bits & 2**63 - 1).double().add_(0.5).mul_(2.0**-63).clamp_(max=1 - 2.0**-53)
    return uniform.neg_().log1p_().neg_()


def _hash(keys: Tensor, counters: Tensor) -> Tensor:
    """64 random bits for each key and counter, as int64: SplitMix64 (Steele et al., 2014), whose state is the key."""
    z = keys + counters * _GOLDEN_RATIO  # products of int64 wrap around
    for shift, factor in _MIX:
        z ^= z >> shift & 2 ** (64 - shift) - 1  # >> fills with the sign
        z *= factor
    z ^= z >> 31 & 2**33 - 1
    return z


def draw(logits: Tensor, temperature: float, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token of every row from softmax(logits / temperature).

    For exponential numbers E and weights w, ``E_i / w_i`` is the smallest with probability ``w_i / Σ w``. First blocks
    of tokens race with their total weights, then the tokens of the winner with their own.

    Args:
        logits: [b, V].
        numbers: a row of `random_numbers` for each.

    Returns:
        The tokens [b] int64 and their log-probabilities [b] float32.

    Raises:
        FloatingPointError: a row's probabilities are not finite.
    """
    rows = max(1, (_AT_A_TIME_ON_CPU if logits.device.type == "cpu" else _AT_A_TIME) // logits.shape[1])
    parts = []
    for z, exponential in zip(logits.split(rows), numbers.split(rows), strict=True):
        z = z.double() / temperature
        weights = (z - z.amax(-1, keepdim=True)).exp_()
        weights = F.pad(weights, (0, -logits.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))  # [r, blocks, _BLOCK]
        totals = weights.sum(-1)
        block = (exponential[:, _BLOCK:] / totals).argmin(1)
        inside = weights[torch.arange(len(z), device=z.device), block]
        token = (exponential[:, :_BLOCK] / inside).argmin(1, keepdim=True)
        logprobs = (inside.gather(1, token).squeeze(1) / totals.sum(1)).log()
        parts.append((block * _BLOCK + token.squeeze(1), logprobs.float()))
    tokens, logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
    if not torch.isfinite(logprobs).all():
        raise FloatingPointError("the policy's probabilities are not finite")
    return tokens, logprobs
