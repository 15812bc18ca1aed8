"""The processes of a run, as a learner sees them: their shares of the work, and what they tell each other.

Every rank has the whole experience, but computes with models only on its share of the rows. What it computes is put
together again before anything is decided by it, so that all ranks decide the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Ranks:
    """A single process; `fastppo.training.distributed` has that of several.

    Methods that exchange something must be called by all ranks, in the same order.
    """

    rank, size = 0, 1

    def share(self, count: int) -> range:
        """This rank's share of `count` items in a row."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def passes(self, count: int, size: int) -> list[tuple[Tensor, bool]]:
        """This rank's share of `count` rows, in parts for passes through a model; as many for every rank.

        Args:
            size: most rows in the parts of all ranks together.

        Returns:
            Row numbers [b], b > 0, and whether they count: a rank with fewer rows than others passes some for nothing.
        """
        most = math.ceil(size / self.size)
        parts = [(rows, True) for rows in torch.tensor(self.share(count), dtype=torch.long).split(most) if len(rows)]
        needed = math.ceil(math.ceil(count / self.size) / most)
        return parts + [(torch.zeros(1, dtype=torch.long), False)] * (needed - len(parts))

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
