"""Perplexity on ordinary text: what a policy forgets of its language while it learns to please a reward."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastppo.models import LMHead
from fastppo.ops.linear_logprob import linear_logprob
from fastppo.training.data import DataError

Hidden = Callable[[Tensor, Tensor, int], tuple[Tensor, LMHead]]
"""f(sequences [B, P + T], attention_mask [B, P + T], T) -> (states that predict the last T tokens [B, T, D], head)."""


def load_texts(path: str, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None) -> list[list[int]]:
    """Token ids of a file's texts, one a line; what is longer than the model's context is cut.

    Raises:
        DataError: the file cannot be read, or holds no text of two tokens.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"eval.perplexity: {path} cannot be read as text ({error})") from None
    texts = [line for line in lines if line.strip()]
    ids = [row[:context_length] for row in tokenizer(texts, verbose=False)["input_ids"]] if texts else []
    # The first token is only read: nothing predicts it.
    if not any(len(row) > 1 for row in ids):
        raise DataError(f"eval.perplexity: {path} holds no text of two tokens or more")
    return [row for row in ids if len(row) > 1]


@torch.no_grad()
def perplexity(
    hidden: Hidden,
    texts: list[list[int]],
    *,
    pad: int,
    batch_size: int,
    device: torch.device,
    backend: str | None = None,
) -> float:
    """exp(−mean log-probability of a token), over every token but each text's first, at temperature 1.

    Args:
        hidden: `PolicyModels.hidden` of the policy, or `reference_hidden`.
        texts: token ids, at least two each.
        pad: a token id to fill up with; never read.
        batch_size: texts in a forward pass.
        device: where the model is.
        backend: of the operator.
    """
    total, count = 0.0, 0
    # Texts of one length next to each other: less padding. The order has no other effect.
    texts = sorted(texts, key=len)
    for start in range(0, len(texts), batch_size):
        rows = texts[start : start + batch_size]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        states, head = hidden(ids, attention, width - 1)
        output = linear_logprob(
            states,
            head.weight,
            ids[:, 1:].masked_fill(attention[:, 1:] == 0, -100),
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            backend=backend,
        )
        total += output.logprobs.double().sum().item()
        count += int(attention[:, 1:].sum())
    mean = -total / count
    # A model that gives a token no probability at all has no finite perplexity.
    return math.exp(mean) if mean < 700 else math.inf
