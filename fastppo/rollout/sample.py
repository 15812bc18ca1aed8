"""Sample completions from the policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from fastppo.errors import quote
from fastppo.models import ModelError, backbone_of, readable_ids
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.decode import can_decode, decode
from fastppo.rollout.draw import draw, random_numbers
from fastppo.rollout.prompt import Prompt


class Rollout(NamedTuple):
    """B sampled completions: prompts of P columns padded on the left, completions of T columns padded on the right."""

    sequences: Tensor  # [B, P + T] int64
    attention_mask: Tensor  # [B, P + T] int64
    mask: Tensor  # [B, T] bool: sampled tokens, EOS included
    completions: list[str]  # decoded, without special tokens
    ended: Tensor  # [B] bool: whether the completion ended by EOS rather than by max_new_tokens
    groups: Tensor  # [B] int64: completions of the same prompt have the same number
    logprobs: Tensor | None = None  # [B, T] float32, of the tokens as they were sampled, 0 on padding; if requested


@torch.no_grad()
def sample(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    keys: Tensor,
    config: RolloutConfig,
    *,
    device: torch.device,
    with_logprobs: bool = False,
    eos_ids: list[int] | None = None,
    progress: Callable[[int], None] = lambda ended: None,
) -> Rollout:
    """Sample one completion for every prompt (repeat a prompt for several), from the policy's own distribution.

    Only the temperature changes that distribution, so log-probabilities that are computed of the tokens later equal
    those at sampling time, up to rounding.

    Args:
        keys: of `sequence_keys`, one for every prompt. A completion depends on its prompt and key and on no other's, up
            to the rounding of the model's products.
        with_logprobs: record the log-probabilities at sampling time.
        eos_ids: tokens that end a completion; by default the policy's own, or the tokenizer's.
        progress: is told how many completions have ended, whenever more have.

    Raises:
        FloatingPointError: the policy's probabilities are not finite.
        ModelError: a prompt holds a token without an embedding, or none at all; or the policy's `eos_token_id`
            is no token id or list of them.
    """
    for number, prompt in enumerate(prompts):
        if not prompt.input_ids:  # nothing that the first token could be predicted from
            raise ModelError(f"prompt {number} of the batch has no tokens; begin it with the tokenizer's BOS or EOS")
    pad, eos = tokenizer.pad_token_id, eos_ids
    if eos is None:
        own = policy.generation_config.eos_token_id  # chat models often have several
        eos = tokenizer.eos_token_id if own is None else own
        eos = [eos] if isinstance(eos, int) else eos
        if not isinstance(eos, list) or not all(isinstance(token, int) for token in eos):
            raise ModelError(f"the model's eos_token_id: expected a token id or a list of them, got {quote(eos)}")
    rows = [torch.tensor(prompt.input_ids, dtype=torch.long) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    prompt_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    known = readable_ids(backbone_of(policy), ids, prompt_mask)
    ids, prompt_mask, known, keys = (tensor.to(device) for tensor in (ids, prompt_mask, known, keys))

    limits = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    # On a CPU most of generate()'s time is not the model's.
    sampler = decode if device.type == "cpu" and can_decode(policy) else _generate
    size, parts, done = config.generation_batch_size, [], 0
    for batch in zip(known.split(size), prompt_mask.split(size), keys.split(size), strict=True):
        if sampler is decode:
            limits["progress"] = lambda ended, done=done: progress(done + ended)
        parts.append(sampler(policy, *batch, eos=eos, pad=pad, **limits))
        progress(done := done + len(batch[0]))
    sampled, logprobs = zip(*parts, strict=True)

    tokens = _join(sampled, pad)
    is_eos = torch.isin(tokens, torch.tensor(eos, dtype=torch.long, device=device))
    # Tokens count up to the first EOS, which is included; generate() pads after it, often with EOS itself.
    mask = (is_eos.cumsum(1) - is_eos.long()) == 0
    tokens = tokens.masked_fill(~mask, pad)
    numbers: dict[int, int] = {}  # of each prompt, which is one object however often it is repeated
    groups = [numbers.setdefault(id(prompt), len(numbers)) for prompt in prompts]
    return Rollout(
        sequences=torch.cat([ids, tokens], dim=1),
        attention_mask=torch.cat([prompt_mask, mask.long()], dim=1),
        mask=mask,
        completions=tokenizer.batch_decode(tokens, skip_special_tokens=True),
        ended=(is_eos & mask).any(1),
        groups=torch.tensor(groups, device=device),
        logprobs=_join(logprobs, 0.0).masked_fill(~mask, 0.0) if with_logprobs else None,
    )


def _generate(
    policy: nn.Module,
    ids: Tensor,
    mask: Tensor,
    keys: Tensor,
    *,
    eos: list[int],
    pad: int,
    max_new_tokens: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """As `decode`, on any device and of any model, by transformers' generate().

    A generation config that is only passed to generate() is completed from the model's own, so a model that ships with
    a repetition penalty would be sampled from another distribution than the one it is scored with.
    """
    # It reads its own pad tokens after a row's end.
    known = pad if pad < backbone_of(policy).get_input_embeddings().weight.shape[0] else 0
    generation = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=eos or None, pad_token_id=known)
    sampler = _Draw(keys, temperature)
    head = policy.get_output_embeddings()
    # Wrappers, such as peft's and torch.compile's, forward to the model that owns it.
    before = [(m, m.generation_config) for m in policy.modules() if "generation_config" in vars(m)]
    # Otherwise the first product is one for each row, see `logits_of`.
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        for owner, _ in before:
            owner.generation_config = generation
        out = policy.generate(input_ids=ids, attention_mask=mask, logits_processor=LogitsProcessorList([sampler]))
    finally:
        hook.remove()
        for owner, own in before:
            owner.generation_config = own
    return out[:, ids.shape[1] :], torch.stack(sampler.logprobs, 1)


class _Draw(LogitsProcessor):
    """Leave one token of each row, drawn from its logits, and record its log-probability."""

    def __init__(self, keys: Tensor, temperature: float) -> None:
        self.keys, self.temperature = keys, temperature
        self.logprobs: list[Tensor] = []  # [b] each

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        numbers = random_numbers(self.keys, len(self.logprobs), scores.shape[1])
        tokens, logprobs = draw(scores, self.temperature, numbers)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def _join(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Parts [b, T_i] as one [B, T], filled on the right."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])
