"""Metrics of a rollout and its advantages that show a policy going wrong before its reward does."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastppo.algorithms.experience import Experience
from fastppo.rollout.sample import Rollout

_REPEATED = 4  # tokens; ordinary text rarely repeats so many within a completion


def text_health(rollout: Rollout) -> dict[str, float]:
    """Variety and repetition of a rollout's completions, by tokens.

    text/distinct_1, text/distinct_2: distinct n-grams as a share of all n-grams of the rollout (Li et al., 2016,
    arXiv:1510.03055). It is low where completions resemble each other or repeat themselves.

    text/repetition: share of a completion's 4-grams that occurred earlier in it, averaged over completions that have at
    least two (seq-rep-4 of Welleck et al., 2020, arXiv:1908.04319).

    A metric is left out if no completion is long enough for it.
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
    """advantage/extreme: largest distance of an advantage from the mean, in standard deviations; 0 if all are equal.

    Far above 10, one token outweighs the rest of its batch.
    """
    advantages = experience.advantages[experience.mask].double()
    if advantages.numel() == 0:
        return {}
    deviation = advantages.std(correction=0)
    if deviation <= 1e-6 * advantages.abs().max():  # rounding error of float32
        return {"advantage/extreme": 0.0}
    return {"advantage/extreme": ((advantages - advantages.mean()).abs().max() / deviation).item()}


def length_health(rollout: Rollout) -> dict[str, float]:
    """completion/length_std, completion/length_max, in tokens."""
    lengths = rollout.mask.sum(1).to(torch.float64)
    return {"completion/length_std": lengths.std(correction=0).item(), "completion/length_max": lengths.max().item()}
