"""What the engines share that decode batches of padded prompts with the policy itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fastppo.models import backbone_of
from fastppo.rollout.ending import Growing
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
        ids, mask = pad_left(prompts, 0)  # 0 has an embedding; a pad token added to the tokenizer may have none
        size = sampling.batch_size
        device = backbone_of(self.policy).get_input_embeddings().weight.device
        completions: list[Completion] = []
        for part in zip(*(x.to(device).split(size) for x in (ids, mask, keys)), strict=True):
            done = len(completions)
            batch = Batch(len(part[0]), sampling, lambda ended, done=done: progress(done + ended))
            self.decode(*part, batch)
            completions += [row.completion for row in batch.rows]
        return completions

    def decode(self, ids: Tensor, mask: Tensor, keys: Tensor, batch: Batch) -> None:
        """Add tokens to each row of the batch until none goes on.

        Args:
            ids, mask: [b, P] int64, prompts padded on the left.
            keys: [b] int64, of `sequence_keys`.
        """
        raise NotImplementedError


class Batch:
    """Completions that are decoded together."""

    def __init__(self, count: int, sampling: Sampling, progress: Callable[[int], None]) -> None:
        self.sampling, self.rows = sampling, [Growing(sampling) for _ in range(count)]
        self._progress, self._ended = progress, 0

    def add(self, rows: Sequence[int], tokens: Tensor, logprobs: Tensor) -> Tensor:
        """Add one token [b] to each of b rows; a row that is over stays as it is.

        Returns:
            [b] bool, on the device of `tokens`: which of them go on.
        """
        new = zip(rows, tokens.tolist(), logprobs.tolist(), strict=True)
        going = torch.tensor([self.rows[row].add(token, logprob) for row, token, logprob in new])
        if (ended := sum(not row.goes_on for row in self.rows)) > self._ended:
            self._ended = ended
            self._progress(ended)
        return going.to(tokens.device)


def pad_left(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, P] int64, of prompts padded on the left."""
    rows = [torch.tensor(prompt, dtype=torch.long) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
