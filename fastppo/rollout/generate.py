"""Sample completions by transformers' generate(), on any device and of any model that it knows."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fastppo.rollout.draw import draw, random_numbers
from fastppo.rollout.padded import Batch, PaddedEngine


class TransformersEngine(PaddedEngine):
    def decode(self, ids: Tensor, mask: Tensor, keys: Tensor, batch: Batch) -> None:
        sampler = _Draw(keys, batch)
        options = {
            "logits_processor": LogitsProcessorList([sampler]),
            "stopping_criteria": StoppingCriteriaList([_Ended(sampler)]),
        }
        # A generation config that is only passed to generate() is completed from the model's own, so a model that ships
        # with a repetition penalty would be sampled from another distribution than the one it is scored with. Wrappers,
        # such as peft's and torch.compile's, forward to the model that owns it.
        before = [(m, m.generation_config) for m in self.policy.modules() if "generation_config" in vars(m)]
        # Otherwise the first product is one for each row, see `logits_of`.
        head = self.policy.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
        try:
            for owner, _ in before:
                owner.generation_config = GenerationConfig(max_new_tokens=batch.sampling.max_new_tokens)
            self.policy.generate(input_ids=ids, attention_mask=mask, **options)
        finally:
            hook.remove()
            for owner, own in before:
                owner.generation_config = own


class _Draw(LogitsProcessor):
    """Draw a token of each row from its logits, and leave that one alone."""

    def __init__(self, keys: Tensor, batch: Batch) -> None:
        self.keys, self.batch = keys, batch
        self.place = 0  # of the token in its completion

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        numbers = random_numbers(self.keys, self.place, scores.shape[1])
        tokens, logprobs = draw(scores, self.batch.sampling.temperature, numbers)
        self.going = self.batch.add(range(len(tokens)), tokens, logprobs)
        self.place += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Which rows have ended. They draw further tokens, unheeded, until all have."""

    def __init__(self, sampler: _Draw) -> None:
        self.sampler = sampler

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return ~self.sampler.going
