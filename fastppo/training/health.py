"""What a rollout and its advantages look like, in numbers that show a policy going wrong before its reward does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastppo.algorithms.experience import Experience
from fastppo.rollout.sample import Rollout

_REPEATED = 4  # tokens: long enough that ordinary text rarely repeats them within a completion


def text_health(rollout: Rollout) -> dict[str, float]:
    """Variety and repetition of a rollout's completions, by tokens.

    text/distinct_1, text/distinct_2: different n-grams as a share of all, over the whole rollout (Li et al., 2016,
    arXiv:1510.03055); low where completions resemble each other or themselves.

    text/repetition: the share of a completion's 4-grams that it has had before, the mean over completions that are long
    enough to have two (seq-rep-4 of Welleck et al., 2020, arXiv:1908.04319).

    A name is left out where no completion is long enough for it.
    """
    tokens = rollout.sequences[:, -rollout.mask.shape[1] :].tolist()
    completions = [row[:length] for row, length in zip(tokens, rollout.mask.sum(1).tolist(), strict=True)]
    health = {}
    for n in (1, 2):
        if grams := [gram for completion in completions for gram in _ngrams(completion, n)]:
            health[f"text/distinct_{n}"] = len(set(grams)) / len(grams)
    by_completion = [_ngrams(completion, _REPEATED) for completion in completions]
    if repeats := [1 - len(set(grams)) / len(grams) for grams in by_completion if len(grams) > 1]:
        health["text/repetition"] = sum(repeats) / len(repeats)
    return health


def _ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(tokens[start:] for start in range(n)), strict=False))


def advantage_health(experience: Experience) -> dict[str, float]:
    """advantage/extreme: the farthest advantage from their mean, in standard deviations; 0 where all are the same.

    One far above 10 is a token that outweighs the rest of its batch.
    """
    advantages: Tensor = experience.advantages[experience.mask].double()
    if advantages.numel() == 0:
        return {}
    deviation = advantages.std(correction=0)
    # Below this the deviation is the rounding of float32.
    if deviation <= 1e-6 * advantages.abs().max():
        return {"advantage/extreme": 0.0}
    return {"advantage/extreme": ((advantages - advantages.mean()).abs().max() / deviation).item()}


def length_health(rollout: Rollout) -> dict[str, float]:
    """completion/length_std, completion/length_max, in tokens."""
    lengths = rollout.mask.sum(1).to(torch.float64)
    return {
        "completion/length_std": lengths.std(correction=0).item(),
        "completion/length_max": lengths.max().item(),
    }
