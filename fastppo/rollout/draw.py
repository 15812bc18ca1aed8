"""Draw tokens from logits, each with its own probability, however small.

An inversion in float32 has one uniform number of 24 bits for a row, and its cumulative sums near 1 are as coarse: of
262,144 tokens that share a thousandth of the probability, most cannot be drawn at all. Here everything is float64, and
a race decides, whose random numbers near 0 have all their bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 512  # tokens; about the square root of a vocabulary
_AT_A_TIME, _AT_A_TIME_ON_CPU = 2**25, 2**17  # logits, whose float64 copies take 256 MB, or fit in a core's cache


def random_numbers(rows: int, vocabulary: int, device: torch.device | str = "cpu") -> Tensor:
    """Exponentially distributed float64 numbers for `draw`: [rows, _BLOCK + number of blocks]."""
    shape = (2, rows, _BLOCK + -(-vocabulary // _BLOCK))
    coarse, fine = torch.rand(shape, dtype=torch.float64, device=device)
    # torch.rand gives multiples of 2⁻⁵³, on a GPU half a step higher.
    uniform = (((coarse * 2.0**53).floor() + fine) * 2.0**-53).clamp(max=1 - 2.0**-53)
    return -torch.log1p(-uniform)


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
