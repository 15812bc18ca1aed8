"""Perplexity on ordinary text. It rises while a policy that is optimized for a reward forgets its language."""

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
"""f(sequences [B, P + T], attention_mask [B, P + T], T) -> (hidden states before the last T tokens [B, T, D], head)."""


def load_texts(path: str, tokenizer: PreTrainedTokenizerBase, *, context_length: int | None) -> list[list[int]]:
    """Token ids of a file's texts, one per line, truncated to the model's context.

    Raises:
        DataError: the file cannot be read, or no text has two tokens.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"eval.perplexity: {path} cannot be read as text ({error})") from None
    texts = [line for line in lines if line.strip()]
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
    batch_size: int,
    device: torch.device,
    backend: str | None = None,
) -> float:
    """exp(−mean log-probability), over all tokens but each text's first, at temperature 1.

    Args:
        hidden: `PolicyModels.hidden` for the policy, or `PolicyModels.reference_hidden`.
        texts: token ids, at least two each.
        pad: any token id, for padding.
        batch_size: texts per forward pass.
        device: device of the model.
        backend: backend of `linear_logprob`.
    """
    total, count = 0.0, 0
    texts = sorted(texts, key=len)  # texts of similar length share a batch: less padding
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
    return math.exp(mean) if mean < 700 else math.inf  # math.exp raises where a float overflows
