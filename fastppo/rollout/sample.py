"""Sample completions from the policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from fastppo.models import backbone_and_head
from fastppo.models.packing import can_pack
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.decode import decode
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
    config: RolloutConfig,
    *,
    device: torch.device,
    with_logprobs: bool = False,
    eos_ids: list[int] | None = None,
) -> Rollout:
    """Sample one completion for every prompt (repeat a prompt for several), from the policy's own distribution.

    Only the temperature changes that distribution, so log-probabilities that are computed of the tokens later equal
    those at sampling time, up to rounding.

    Args:
        with_logprobs: record the log-probabilities at sampling time.
        eos_ids: tokens that end a completion; by default the policy's own, or the tokenizer's.

    Raises:
        FloatingPointError: the policy's probabilities are not finite.
    """
    pad, eos = tokenizer.pad_token_id, eos_ids
    if eos is None:
        own = policy.generation_config.eos_token_id  # chat models often have several
        eos = tokenizer.eos_token_id if own is None else own
        eos = [eos] if isinstance(eos, int) else list(eos)
    rows = [torch.tensor(prompt.input_ids, dtype=torch.long) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(device)
    prompt_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left").to(device)

    limits = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    generation = GenerationConfig(
        do_sample=True, top_k=0, top_p=1.0, eos_token_id=eos or None, pad_token_id=pad, **limits
    )
    # On a CPU most of generate()'s time is not the model's.
    use_decode = device.type == "cpu" and not with_logprobs and can_pack(backbone_and_head(policy)[0])
    size, parts, recorded = config.generation_batch_size, [], []
    for batch in zip(ids.split(size), prompt_mask.split(size), strict=True):
        if use_decode:
            parts.append(decode(policy, *batch, eos=eos, pad=pad, **limits))
            continue
        recorder = _RecordLogprobs(config.temperature)
        out = _generate(policy, *batch, generation, LogitsProcessorList([recorder] if with_logprobs else []))
        parts.append(out[:, ids.shape[1] :])
        if with_logprobs:
            recorder.take(out)
            recorded.append(torch.cat(recorder.steps, 1))

    tokens = _join(parts, pad)
    is_eos = torch.isin(tokens, torch.tensor(eos, dtype=torch.long, device=device))
    # Tokens count up to the first EOS, which is included; generate() pads after it, often with EOS itself.
    mask = (is_eos.cumsum(1) - is_eos.long()) == 0
    numbers: dict[int, int] = {}  # of each prompt, which is one object however often it is repeated
    groups = [numbers.setdefault(id(prompt), len(numbers)) for prompt in prompts]
    return Rollout(
        sequences=torch.cat([ids, tokens], dim=1),
        attention_mask=torch.cat([prompt_mask, mask.long()], dim=1),
        mask=mask,
        completions=tokenizer.batch_decode(tokens.masked_fill(~mask, pad), skip_special_tokens=True),
        ended=(is_eos & mask).any(1),
        groups=torch.tensor(groups, device=device),
        logprobs=_join(recorded, 0.0).masked_fill(~mask, 0.0) if with_logprobs else None,
    )


def _generate(
    policy: nn.Module, ids: Tensor, mask: Tensor, generation: GenerationConfig, processors: LogitsProcessorList
) -> Tensor:
    """[b, P + T] tokens by transformers' generate(), with `generation` in place of the model's own generation config.

    A config that is only passed to generate() is completed from the model's own, so a model that ships with a
    repetition penalty would be sampled from another distribution than the one it is scored with.
    """
    # Wrappers, such as peft's and torch.compile's, forward to the model that owns it.
    before = [(m, m.generation_config) for m in policy.modules() if "generation_config" in vars(m)]
    try:
        for owner, _ in before:
            owner.generation_config = generation
        return policy.generate(input_ids=ids, attention_mask=mask, logits_processor=processors)
    except RuntimeError as error:
        if "probability tensor contains" in str(error):  # raised by torch.multinomial
            raise FloatingPointError("the policy's probabilities are not finite") from error
        raise
    finally:
        for owner, own in before:
            owner.generation_config = own


class _RecordLogprobs(LogitsProcessor):
    """Record the log-probability of every token that `generate` samples; the logits pass through unchanged.

    The token drawn from some logits is known when the next ones arrive, so one [b, V] is kept at a time.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature  # generate() divides by it after this
        self.steps: list[Tensor] = []  # [b, 1] each
        self.waiting: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.take(input_ids)
        self.waiting = (scores.float() / self.temperature).log_softmax(-1)
        return scores

    def take(self, input_ids: Tensor) -> None:
        if self.waiting is not None:
            self.steps.append(self.waiting.gather(1, input_ids[:, -1:]))


def _join(parts: list[Tensor], fill: float) -> Tensor:
    """Parts [b, T_i] as one [B, T], filled on the right."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])
