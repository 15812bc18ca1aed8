"""The processes of a run, as a learner sees them: their shares of the work, and what they tell each other.

Every rank has the whole experience, but computes with models only on its share of the rows. What it computes is put
together again before anything is decided by it, so that all ranks decide the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastppo.algorithms.micro_batches import micro_batches

T = TypeVar("T")


class Ranks:
    """A single process; `fastppo.training.distributed` has that of several.

    Methods that exchange something must be called by all ranks, in the same order.
    """

    rank, size = 0, 1

    def share(self, count: int) -> range:
        """This rank's share of `count` items in a row."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def passes(self, prompts: list[int], completions: list[int], **size: Any) -> Passes:
        """The passes of sequences with so many tokens through a model, divided by `micro_batches`."""
        return Passes(self, prompts, completions, micro_batches(prompts, completions, ranks=self.size, **size))

    def each(self, function: Callable[[], T]) -> list[T]:
        """What function() returns on each rank, by rank; what it raises on one of them is raised on all."""
        return [function()]

    def first(self, function: Callable[[], T]) -> T:
        """What function() returns on rank 0, called there alone; what it raises is raised on all ranks."""
        return self.each(lambda: function() if self.rank == 0 else None)[0]

    def agreed(self) -> contextlib.AbstractContextManager:
        """A block without exchange, of which what is raised on one rank is raised on all."""
        return contextlib.nullcontext()

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, by rank."""
        return rows

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over the ranks, in place."""

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum up the gradients over the ranks, where backward passes have not done so."""

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The norm of all gradients together."""
        return nn.utils.get_total_norm(gradients)

    def local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that may be sharded; it shares its memory."""
        return tensor

    def nonfinite(self, tensors: dict[str, Tensor]) -> list[str]:
        """The names of those that hold a NaN or Inf on any rank."""
        bad = self.each(lambda: [name for name, tensor in tensors.items() if not self.local(tensor).isfinite().all()])
        return [name for name in tensors if any(name in names for names in bad)]

    def orphaned(self) -> bool:
        """Whether the launcher has ended, which would end the others if one fails."""
        return False

    def check_equal(self, facts: dict[str, Any], needed: str) -> None:
        """Raise ConfigError, which ends with `needed`, if ranks have other values under a name, or other names."""

    # Models

    def load(self, load: Callable[..., nn.Module]) -> nn.Module:
        """load(), or its model without weights on a rank that `place` gives its share."""
        return load()

    def place(self, model: nn.Module) -> None:
        """Shard or equalize a loaded model, in place."""

    def whole(self, model: nn.Module | None) -> nn.Module | None:
        """The model, on rank 0 whole and not to be trained; on others, None if it is sharded."""
        return model


class Pass(NamedTuple):
    """What a rank computes in one pass."""

    rows: Tensor  # [b] int64 row numbers, b > 0
    counts: bool  # False on a rank that has fewer passes than others, and computes one for nothing
    prompt: int  # tokens of the longest prompt, at least 1
    completion: int  # of the longest completion, at least 1


@dataclass
class Passes:
    """The passes of B sequences through a model. Iteration gives this rank's; every rank has as many."""

    ranks: Ranks
    prompts: list[int]
    completions: list[int]
    division: list[list[list[int]]]  # of `micro_batches`

    def __len__(self) -> int:
        return len(self.division[0])

    def __iter__(self) -> Iterator[Pass]:
        for rows in self.division[self.ranks.rank]:
            own = rows or [0]
            longest = (max(1, *(counts[row] for row in own)) for counts in (self.prompts, self.completions))
            yield Pass(torch.tensor(own), bool(rows), *longest)

    def join(self, parts: list[Tensor], length: int) -> Tensor:
        """What all ranks have computed, [B, length, ...] in the order of the sequences, with 0 where a part ends.

        Args:
            parts: [b, t, ...] of each of this rank's passes.
        """
        padded = [F.pad(part, (0, 0) * (part.dim() - 2) + (0, length - part.shape[1])) for part in parts]
        own = self.division[self.ranks.rank]
        counted = [part if rows else part[:0] for part, rows in zip(padded, own, strict=True)]
        joined = self.ranks.gather_rows(torch.cat(counted))
        order = torch.tensor([row for passes in self.division for rows in passes for row in rows])
        return joined[order.argsort().to(joined.device)]
