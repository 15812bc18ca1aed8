"""What the engines share that decode batches of padded prompts with the policy itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastppo.models import backbone_of, readable_ids
from fastppo.rollout.engine import Completion, Engine, Sampling


class PaddedEngine(Engine):
    """Decodes `Sampling.batch_size` prompts at a time, padded on the left, on the policy's device."""

    policy: nn.Module

    def sync(self, policy: nn.Module) -> None:
        self.policy = policy

    @torch.no_grad()
    def sample(
        self,
        prompts: list[list[int]],
        keys: Tensor,
        sampling: Sampling,
        progress: Callable[[int], None] = lambda ended: None,
    ) -> list[Completion]:
        pad, eos, size = sampling.tokenizer.pad_token_id, set(sampling.eos), sampling.batch_size
        rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
        ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        ids = readable_ids(backbone_of(self.policy), ids, mask)
        device = backbone_of(self.policy).get_input_embeddings().weight.device
        completions: list[Completion] = []
        for batch in zip(*(x.to(device).split(size) for x in (ids, mask, keys)), strict=True):
            done = len(completions)
            tokens, logprobs = self.decode(*batch, sampling, lambda ended, done=done: progress(done + ended))
            for row, values in zip(tokens.tolist(), logprobs.tolist(), strict=True):
                # Tokens count up to the first EOS, which is included; what follows is padding.
                length = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
                completions.append(Completion(row[:length], values[:length], row[length - 1] in eos))
            progress(len(completions))
        return completions

    def decode(
        self, ids: Tensor, mask: Tensor, keys: Tensor, sampling: Sampling, progress: Callable[[int], None]
    ) -> tuple[Tensor, Tensor]:
        """Tokens [b, T] int64 and log-probabilities [b, T] float32 of one batch, padded after a row's end.

        Args:
            ids, mask: [b, P] int64, prompts padded on the left.
            keys: [b] int64.
        """
        raise NotImplementedError
