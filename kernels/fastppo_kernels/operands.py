"""Operands as the products want them: contiguous, in the compute dtype, rows a multiple of 16 elements.

Hidden states are always gathered (`rows.gather_rows`). A weight [V, D] is used as it lies where it can be; where it
cannot (float32 under bfloat16 autocast, a transposed or misaligned one, a hidden size that is no multiple of 16),
slices of its rows are copied, one at a time, as many rows as the budget has room for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from fastppo_kernels.rows import padded_dim

# A slice is a multiple of every kernel's block of columns, and starts on a 16-byte boundary.
SLICE_MULTIPLE = 512


class Operands(NamedTuple):
    """Some rows of hidden [M, D'] and some of weight [v, D'], both fit for descriptors; their bias [v] or None."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


class Projection(NamedTuple):
    """Hidden states [M, D'] of `gather_rows`, and the weight [V, D] and bias [V] or None they go with.

    spans: the slices of the vocabulary, (first, last) each, in which the weight is read.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    spans: list[tuple[int, int]]

    @classmethod
    def make(
        cls,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        budget: int,
        width: int | None = None,
    ) -> Projection:
        """Cut into slices of `width` columns, or without one into one slice; fewer where copies need the budget."""
        vocab = weight.shape[0]
        if needs_copy(weight, hidden.dtype):
            row_bytes = hidden.shape[1] * hidden.element_size()
            if width is None and vocab * row_bytes <= budget:
                weight = padded_copy(weight, hidden)
            else:
                width = width or max(SLICE_MULTIPLE, budget // row_bytes // SLICE_MULTIPLE * SLICE_MULTIPLE)
        return cls(hidden, weight, None if bias is None else bias.contiguous(), []).cut(width or vocab)

    def cut(self, width: int) -> Projection:
        """The same in slices of `width` columns."""
        vocab = self.weight.shape[0]
        return self._replace(spans=[(lo, min(lo + width, vocab)) for lo in range(0, vocab, width)])

    def operands(self, rows: slice, lo: int, hi: int, weight_slice: torch.Tensor) -> Operands:
        return Operands(self.hidden[rows], weight_slice, None if self.bias is None else self.bias[lo:hi])

    def weight_slices(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first, last, weight[first:last] [v, D'] ready for the products), a slice at a time."""
        for lo, hi in self.spans:
            yield lo, hi, self.weight_slice(lo, hi)

    def weight_slice(self, lo: int, hi: int) -> torch.Tensor:
        part = self.weight[lo:hi]
        if not needs_copy(self.weight, self.hidden.dtype):
            return part
        return padded_copy(part, self.hidden)


def padded_copy(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """weight [v, D] in the dtype and width D' of the gathered hidden states, zeros behind D."""
    copy = weight.new_zeros(weight.shape[0], hidden.shape[1], dtype=hidden.dtype)
    copy[:, : weight.shape[1]] = weight
    return copy


def needs_copy(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` cannot read this weight as it lies."""
    dim = weight.shape[1]
    # Not is_contiguous(), which lets a single row have any stride: a descriptor is made of the stride.
    fits = weight.stride() == (dim, 1) and weight.data_ptr() % 16 == 0 and padded_dim(dim) == dim
    return weight.dtype != dtype or not fits
