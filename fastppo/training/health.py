"""Metrics that show a policy going wrong before its reward does: of its completions, advantages and language."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.algorithms.experience import Experience
from fastppo.algorithms.micro_batches import micro_batches
from fastppo.models import LMHead
from fastppo.ops.linear_logprob import linear_logprob
from fastppo.rollout.sample import Rollout
from fastppo.training.data import DataError
from fastppo.training.files import read_text, why_unreadable

_REPEATED = 4  # tokens; ordinary text rarely repeats so many within a completion

Hidden = Callable[[Tensor, Tensor, int], tuple[Tensor, LMHead]]
"""f(sequences [B, P + T], attention_mask [B, P + T], T) -> (hidden states before the last T tokens [B, T, D], head)."""


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


def load_texts(path: str, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None) -> list[list[int]]:
    """Token ids of a file's texts, one per line, truncated to the model's context.

    Raises:
        DataError: the file cannot be read, or no text has two tokens.
    """
    try:
        text = read_text(os.path.expanduser(path))
    except (OSError, ValueError) as error:
        raise DataError(f"eval.perplexity: {path} cannot be read as text ({why_unreadable(error)})") from None
    texts = [line for line in re.split("\r\n?|\n", text) if line.strip()]
    ids = [row[:context_length] for row in tokenizer(texts, verbose=False)["input_ids"]] if texts else []
    ids = [row for row in ids if len(row) > 1]  # nothing predicts the first token
    if not ids:
        raise DataError(f"eval.perplexity: {path} holds no text of two tokens or more")
    return ids


@torch.no_grad()
def perplexity(
    hidden: Hidden,
    texts: list[list[int]],
    *,
    pad: int,
    most_sequences: int,
    max_tokens: int | None = None,
    padded: bool = False,
    device: torch.device,
    backend: str | None = None,
) -> float:
    """exp(−mean log-probability), over all tokens but each text's first, at temperature 1.

    On ordinary text it rises while a policy that is optimized for a reward forgets its language.

    Args:
        hidden: `PolicyModels.hidden` for the policy, or `PolicyModels.reference_hidden`.
        texts: token ids, at least two each.
        pad: any token id, for padding.
        most_sequences, max_tokens, padded: of a forward pass; see `micro_batches`.
        device: device of the model.
        backend: backend of `linear_logprob`.
    """
    total, count = 0.0, 0
    texts = sorted(texts, key=len, reverse=True)  # texts of similar length share a batch: less padding
    completions = [len(text) - 1 for text in texts]
    size = {"most_sequences": most_sequences, "max_tokens": max_tokens, "padded": padded}
    (batches,) = micro_batches([1] * len(texts), completions, **size)
    for batch in batches:
        rows = [texts[index] for index in batch]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        states, head = hidden(ids, attention, width - 1)
        targets = ids[:, 1:].masked_fill(attention[:, 1:] == 0, -100)
        output = linear_logprob(states, targets=targets, backend=backend, **head._asdict())
        total += output.logprobs.double().sum().item()
        count += int(attention[:, 1:].sum())
    mean = -total / count
    return math.inf if mean > 700 else math.exp(mean)  # which raises where a float overflows
