"""What the ranks of a run exchange, by torch.distributed."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastppo.algorithms.ranks import Ranks, T
from fastppo.errors import ConfigError, FastPPOError, one_line, quote


class Processes(Ranks):
    """All processes of the default group, each with a copy of every model.

    Args:
        device: this rank's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.size = device, dist.get_rank(), dist.get_world_size()
        self._launcher = os.getppid()

    def each(self, function: Callable[[], T]) -> list[T]:
        with self.agreed():
            value = function()
        return self._gather(value)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        for rank, other in enumerate(self._gather(error and _sendable(error))):
            if other is not None:
                other = error if rank == self.rank else other
                if len(other.args) == 1 and isinstance(other.args[0], str):
                    other.args = (f"rank {rank}: {other.args[0]}",)
                other.rank = rank  # whose it is; see `fastppo.training.distributed.tells`
                raise other

    def _gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        counts = self._gather(len(rows))
        # Of one size, and of a type that every backend takes.
        sent = rows.new_zeros(max(counts), *rows.shape[1:])
        sent[: len(rows)] = rows
        sent = sent.to(torch.uint8) if rows.dtype == torch.bool else sent
        parts = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(parts, sent)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.dtype)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        self.sum_([self.local(p.grad) for p in parameters if p.grad is not None and not is_sharded(p)])

    def norm(self, gradients: list[Tensor]) -> Tensor:
        total = torch.zeros(2, device=self.device)
        for kind in (False, True):
            own = [self.local(gradient) for gradient in gradients if is_sharded(gradient) is kind]
            total[int(kind)] = nn.utils.get_total_norm(own).square()
        dist.all_reduce(total[1])
        return total.sum().sqrt()

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def orphaned(self) -> bool:
        return os.getppid() != self._launcher

    def check_equal(self, facts: dict[str, Any], needed: str) -> None:
        first, *others = self.each(lambda: facts)
        for rank, other in enumerate(others, 1):
            for name in first | other:
                if (here := other.get(name)) != (there := first.get(name)):
                    raise ConfigError(f"{name}: {quote(here)} on rank {rank}, {quote(there)} on rank 0; {needed}")

    # Models

    @torch.no_grad()
    def place(self, model: nn.Module) -> None:
        self._check_same(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter, 0)  # adapters are random, and devices differ in their random numbers

    def _check_same(self, model: nn.Module) -> None:
        """Check that all ranks have read the same weights, of which they would make one model."""
        read = model.state_dict()  # of quantized weights also the scales, which are no parameters
        named = dict(model.named_parameters(remove_duplicate=False))
        if not all(p.requires_grad for p in named.values()):
            read = {name: t for name, t in read.items() if name not in named or not named[name].requires_grad}
        kind = type(model).__name__
        sums = {name: int(t.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)) for name, t in read.items()}
        facts = {f"{kind}, {name}": f"{t.dtype} {[*t.shape]}, sum {sums[name]}" for name, t in read.items()}
        self.check_equal(facts, "all ranks need the same model")


def is_sharded(tensor: Tensor) -> bool:
    """Whether ranks have different parts of the tensor, rather than copies."""
    return isinstance(tensor, DTensor) and any(placement.is_shard() for placement in tensor.placements)


def _sendable(error: Exception) -> Exception:
    """The error, or one of the same text if it can't be pickled."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # a constructor of its own, or what it refers to
        return FastPPOError(f"{type(error).__name__}: {one_line(error)}")
