"""The forward pass that scores a rollout, kept with its activations for the update that begins with it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class KeptPass(NamedTuple):
    """A forward pass whose backward pass has not run yet."""

    version: int  # `parameter_version` of the policy at the time of the pass
    sequences: Tensor  # [B, P + T] int64
    attention_mask: Tensor  # [B, P + T]
    hidden: Tensor  # [B, T, D], with its graph

    def states(self, version: int, sequences: Tensor, attention_mask: Tensor) -> Tensor | None:
        """States [B, T, D] of sequences of this pass, in any order; None for others or if the parameters changed."""
        if version != self.version or sequences.shape != self.sequences.shape:
            return None
        row_of = {row: index for index, row in enumerate(_rows(self.sequences, self.attention_mask))}
        order = [row_of.get(row) for row in _rows(sequences, attention_mask)]
        # Equal sequences have equal states, so one row may stand for several of them.
        return None if None in order else self.hidden[torch.tensor(order, device=self.hidden.device)]


def parameter_version(model: nn.Module) -> int:
    """A number that grows with every in-place change of a parameter, except by fused optimizers."""
    return sum(parameter._version for parameter in model.parameters())


def _rows(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row) for row in torch.cat(tensors, 1).tolist()]
