"""What an algorithm learns from: a batch of sampled sequences and everything that was computed about them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.ops.checks import NonFiniteValue, first_true

_WITH_PROMPT = ("sequences", "attention_mask")
_PER_SEQUENCE = ("scores", "ended", "groups", "objective_scores")


@dataclass
class Experience:
    """B sequences: prompts of P columns (padded on the left), completions of T columns (padded on the right).

    Everything of shape [B, T] stands at the completion's tokens and is float32, 0 on padding; log-probabilities and
    values belong to the state before the token. All of it is detached.
    """

    sequences: Tensor
    """[B, P + T] int64 token ids."""
    attention_mask: Tensor
    """[B, P + T] int64, 1 for tokens."""
    mask: Tensor
    """[B, T] bool, True for a sampled token, what ended the completion included."""
    old_logprobs: Tensor
    """[B, T] log-probabilities under the policy that sampled the tokens."""
    scores: Tensor
    """[B] what the reward functions gave the whole completion."""
    old_values: Tensor | None = None
    """[B, T] values at sampling time, or [B, T, K] where each objective has its own; None without a critic."""
    ended: Tensor | None = None
    """[B] bool, whether EOS or a stop string ended the completion, rather than its allowed length."""
    groups: Tensor | None = None
    """[B] int64, equal for completions of the same prompt."""
    objective_scores: Tensor | None = None
    """[B, K] what each of K reward functions gave, normalized where that is asked for, but not weighted."""
    objective_token_scores: Tensor | None = None
    """[B, T, K] what those of them gave that give a reward to every token; None where none does."""
    objectives: dict[str, float] | None = None
    """K names and weights; `scores` is the weighted sum of `objective_scores`."""
    rollout_logprobs: Tensor | None = None
    """[B, T] log-probabilities of the tokens as the engine sampled them; `old_logprobs` are the models' own."""
    importance_weights: Tensor | None = None
    """[B, T] ≥ 0, weights of the tokens' surrogates that correct for the engine's distribution; None for 1."""
    kl: Tensor | None = None
    """[B, T] KL of the sampling policy to the reference, by the configured estimator; None without a reference."""
    ref_logprobs: Tensor | None = None
    """[B, T] log-probabilities under the reference."""
    ref_hidden: Tensor | None = None
    """[B, T, D'] the reference's last hidden states, kept where the loss needs its whole distribution."""
    old_hidden: Tensor | None = None
    """[B, T, D] last hidden states of the policy that sampled the tokens, where its whole distribution is needed."""
    target_hidden: Tensor | None = None
    """[B, T, D] those of another policy that this one is to become like."""
    advantages: Tensor | None = None
    """[B, T]"""
    returns: Tensor | None = None
    """The value function's targets, of its shape."""

    def __len__(self) -> int:
        return self.sequences.shape[0]

    @property
    def targets(self) -> Tensor:
        """[B, T] the sampled tokens; -100, which the operators ignore, on padding, whose id may have no logit."""
        return self.sequences[:, -self.mask.shape[1] :].masked_fill(~self.mask, -100)

    def token_share(self, whole: Experience) -> float:
        """How many of `whole`'s sampled tokens are these, from 0 to 1."""
        return self.mask.sum().item() / max(whole.mask.sum().item(), 1)

    def select(self, rows: Tensor, prompt: int | None = None, completion: int | None = None) -> Experience:
        """The sequences `rows` [b] (int64 indices), of prompts and completions of no more than so many columns."""
        length = self.mask.shape[1]
        width = self.sequences.shape[1] - length
        start = 0 if prompt is None else width - prompt
        stop = length if completion is None else completion
        selected = {}
        for name in (item.name for item in dataclasses.fields(self)):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if name in _WITH_PROMPT:
                    value = value[:, start : width + stop]
                elif name not in _PER_SEQUENCE:
                    value = value[:, :stop]
                value = value[rows]
            selected[name] = value
        return Experience(**selected)


def count_tokens(attention_mask: Tensor, num_completion: int) -> tuple[list[int], list[int]]:
    """The tokens of each sequence's prompt and completion, of a mask [B, P + T] with T = `num_completion`.

    Waits for the device.
    """
    completions = attention_mask[:, -num_completion:].sum(1)
    prompts, completions = torch.stack([attention_mask.sum(1) - completions, completions]).tolist()
    return prompts, completions


def check_finite(what: str, values: Tensor, mask: Tensor) -> None:
    """Check values [B, T] or [B, T, K] where mask [B, T] is True, on any device.

    Raises:
        NonFiniteValue: there is a NaN or Inf; the message begins with `what` and names the first.
    """
    bad = ~torch.isfinite(values) & (mask if values.dim() == 2 else mask[..., None])
    if (where := first_true(bad)) is not None:
        error = NonFiniteValue(f"{what}: {values[where].item()} at token {where[1]} of completion {where[0]}")
        error.row = where[0]
        raise error
