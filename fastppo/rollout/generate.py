"""Sample completions by transformers' generate(), on any device and of any model that it knows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fastppo.models import backbone_of
from fastppo.rollout.draw import draw, random_numbers
from fastppo.rollout.engine import Sampling
from fastppo.rollout.padded import PaddedEngine


class TransformersEngine(PaddedEngine):
    def decode(
        self, ids: Tensor, mask: Tensor, keys: Tensor, sampling: Sampling, progress: Callable[[int], None]
    ) -> tuple[Tensor, Tensor]:
        options = {"max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
        pad = sampling.tokenizer.pad_token_id
        return generate(self.policy, ids, mask, keys, eos=sampling.eos, pad=pad, **options)


def generate(
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
