"""Sampling completions from the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from fastppo.models import backbone_and_head
from fastppo.models.packing import can_pack
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.decode import decode
from fastppo.rollout.prompt import Prompt


class Rollout(NamedTuple):
    """B sampled completions: prompts of P columns padded on the left, completions of T columns padded on the right."""

    sequences: Tensor
    """[B, P + T] int64"""
    attention_mask: Tensor
    """[B, P + T] int64"""
    mask: Tensor
    """[B, T] bool: sampled tokens, EOS included."""
    completions: list[str]
    """Decoded, without special tokens."""
    ended: Tensor
    """[B] bool: whether the completion ended by EOS rather than by max_new_tokens."""
    groups: Tensor
    """[B] int64: completions of the same prompt have the same number."""
    logprobs: Tensor | None = None
    """[B, T] float32, of the tokens as they were sampled, 0 on padding; None where they were not asked for."""


@torch.no_grad()
def sample(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    config: RolloutConfig,
    *,
    device: torch.device,
    with_logprobs: bool = False,
    eos_ids: list[int] | None = None,
) -> Rollout:
    """Sample one completion for every prompt (repeat a prompt for several), from the policy's own distribution.

    Nothing but the temperature changes that distribution, so the log-probabilities that are computed of the tokens
    later are those they were sampled with, up to rounding. `with_logprobs` keeps those of the sampling itself.

    Args:
        eos_ids: tokens that end a completion; the policy's own, or the tokenizer's, if not given.

    Raises:
        FloatingPointError: the policy's probabilities are not finite.
    """
    eos = _eos_ids(policy, tokenizer) if eos_ids is None else eos_ids
    generation = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    width = max(len(prompt.input_ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id, dtype=torch.long)
    prompt_mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
        prompt_mask[row, width - len(prompt.input_ids) :] = 1
    ids, prompt_mask = ids.to(device), prompt_mask.to(device)

    # On a CPU most of generate()'s time is not the model's.
    fast = device.type == "cpu" and not with_logprobs and can_pack(backbone_and_head(policy)[0])
    parts, logprobs = [], []
    with _own_defaults(policy, generation):
        for start in range(0, len(prompts), config.generation_batch_size):
            rows = slice(start, start + config.generation_batch_size)
            if fast:
                parts.append(
                    decode(
                        policy,
                        ids[rows],
                        prompt_mask[rows],
                        eos=eos,
                        pad=tokenizer.pad_token_id,
                        max_new_tokens=config.max_new_tokens,
                        temperature=config.temperature,
                    )
                )
                continue
            recorder = _RecordLogprobs(config.temperature)
            processors = LogitsProcessorList([recorder] if with_logprobs else [])
            try:
                out = policy.generate(
                    input_ids=ids[rows], attention_mask=prompt_mask[rows], logits_processor=processors
                )
            except RuntimeError as error:
                if "probability tensor contains" in str(error):  # torch.multinomial's word for it
                    raise FloatingPointError("the policy's probabilities are not finite") from error
                raise
            parts.append(out[:, width:])
            if with_logprobs:
                logprobs.append(recorder.finish(out))
    longest = max(part.shape[1] for part in parts)
    tokens = torch.cat([F.pad(part, (0, longest - part.shape[1]), value=tokenizer.pad_token_id) for part in parts])

    if with_logprobs:
        logprobs = torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in logprobs])
    is_eos = torch.isin(tokens, torch.tensor(eos, dtype=torch.long, device=device))
    # A token is real up to and with the first EOS; generate() pads after that, often with EOS itself.
    mask = (is_eos.cumsum(1) - is_eos.long()) == 0
    return Rollout(
        sequences=torch.cat([ids, tokens], dim=1),
        attention_mask=torch.cat([prompt_mask, mask.long()], dim=1),
        mask=mask,
        completions=tokenizer.batch_decode(tokens.masked_fill(~mask, tokenizer.pad_token_id), skip_special_tokens=True),
        ended=(is_eos & mask).any(1),
        groups=_groups(prompts).to(device),
        logprobs=logprobs.masked_fill(~mask, 0.0) if with_logprobs else None,
    )


class _RecordLogprobs(LogitsProcessor):
    """Keeps the log-probability of every token that `generate` samples; the logits pass through unchanged.

    The token that was drawn from some logits is known when the next ones come, so one [b, V] stays at a time.
    """

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature  # generate() divides by it after this
        self._waiting: Tensor | None = None
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self._waiting = (scores.float() / self._temperature).log_softmax(-1)
        return scores

    def _take(self, input_ids: Tensor) -> None:
        if self._waiting is not None:
            self._steps.append(self._waiting.gather(1, input_ids[:, -1:]))
            self._waiting = None

    def finish(self, output: Tensor) -> Tensor:
        """[b, T] of the tokens of generate()'s output."""
        self._take(output)
        return torch.cat(self._steps, dim=1)


def _groups(prompts: list[Prompt]) -> Tensor:
    """[B]: the number of each prompt in the order of its first appearance; a prompt is one object, however often."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(id(prompt), len(numbers)) for prompt in prompts])


@contextmanager
def _own_defaults(policy: nn.Module, generation: GenerationConfig) -> Iterator[None]:
    """`generation` in the place of the model's own generation config, adapters or not.

    Passing it to generate() is not enough: what it leaves at a default is filled in from the model's, and a model that
    ships with top-p or a repetition penalty would be sampled from another distribution than it is scored with.
    """
    base = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    owners = {id(owner): owner for owner in (policy, base)}.values()
    before = [(owner, owner.generation_config) for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = generation
        yield
    finally:
        for owner, own in before:
            owner.generation_config = own


def _eos_ids(policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the model's own list (chat models often have several) or the tokenizer's."""
    ids = policy.generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    return [ids] if isinstance(ids, int) else list(ids)
