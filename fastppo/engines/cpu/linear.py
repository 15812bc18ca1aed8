"""The passes of `fastppo.engines.chunked` in C++ (csrc/head/linear.h), near the matrix-multiply floor.

A bfloat16 `torch.mm` on a CPU comes rounded to bfloat16, and ∂h is a sum over vocabulary tiles that must not be rounded
tile by tile. oneDNN's microkernels, which PyTorch exports for the code that torch.compile generates, accumulate into
float32 instead, and use AMX or AVX512-BF16 as the machine has them. All three products run on these, a block of 64
tokens at a time, with the softmax done between them while the block is in the L2 cache. docs/LOG.md
has what that gains in time and accuracy.

Where PyTorch exports no microkernels, for float64, and for weights not stored row by row, `chunked` does the work.

Logits are computed once where there is memory to keep them: pass 1 leaves them, in 16 bits less an anchor of the row
(float32 for float32), in ∂weight's own memory, which nothing else uses before pass 2 has read them, and in what the
budget leaves over; pass 2 recomputes the rest. A terminal loss so costs between 6NDV and 8NDV.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.engines import chunked, extension
from fastppo.engines.budget import spare
from fastppo.engines.cpu import products
from fastppo.engines.engine import (
    Gradients,
    Head,
    Needs,
    Options,
    Problem,
    RowCoefficients,
    TerminalLoss,
    Upstream,
    contributing,
)
from fastppo.engines.transform import LogitTransform

# The budget holds what this many threads need, whatever number there is: the tiles must not depend on it, for a result
# shall have the same bits on any number of threads. Each thread beyond adds its own block.
THREADS = 8
PANEL = 64  # csrc/head/rows.h: columns of a packed panel, tokens of a block
WIDTH = 1024  # vocabulary rows of a tile: a block of logits [64, 1024] leaves room in an L2 cache of 1 MiB


def linear_statistics(problem: Problem) -> list[Tensor]:
    return _Passes(problem).statistics() if _serves(problem) else chunked.linear_statistics(problem)


def linear_vjp(problem: Problem, saved: list[Tensor], upstream: Upstream, needs: Needs) -> Gradients:
    if not _serves(problem):
        return chunked.linear_vjp(problem, saved, upstream, needs)
    return _Passes(problem).vjp(saved, upstream, needs)


def linear_loss(problem: Problem, loss: TerminalLoss, needs: Needs) -> tuple[list[Tensor], Gradients]:
    if not _serves(problem):
        return chunked.linear_loss(problem, loss, needs)
    passes = _Passes(problem, keep_logits=needs.weight)
    saved = passes.statistics()
    return saved, passes.vjp(saved, loss.row_gradients(saved), needs)


class _Passes:
    """The two passes over one problem, with the tensors as the extension takes them.

    Args:
        keep_logits: let pass 1 leave logits in ∂weight's memory for pass 2.
    """

    def __init__(self, problem: Problem, *, keep_logits: bool = False) -> None:
        self.policy, self.targets, self.reference, self.kl_kind, self.options = problem
        self.valid = self.targets >= 0
        self.kept: _Kept | None = None
        self.memory: tuple | None = None  # pass 2 reads what pass 1 wrote, whoever else takes `spare` between them
        if keep_logits:
            self.kept = _Kept.open(self.policy, self._tiling(len(self.targets)).width)

    def statistics(self) -> list[Tensor]:
        rows = self.valid.nonzero().squeeze(-1)
        out = torch.zeros(4 if self.reference is None else 8, self.targets.numel(), dtype=torch.float32)
        if rows.numel():
            self.memory = self._kept_logits(rows.numel())
            extension.load().linear_statistics(*self._problem(self.reference, rows), self.memory, out)
        return list(out)

    def vjp(self, saved: list[Tensor], upstream: Upstream, needs: Needs) -> Gradients:
        hidden, weight, bias = self.policy
        rows = contributing(self.targets, upstream).nonzero().squeeze(-1)
        d_hidden = hidden.new_zeros(hidden.shape) if needs.hidden else hidden.new_empty(0)
        if self.kept is not None:
            d_weight = self.kept.d_weight
        else:
            d_weight = _empty_like(weight) if needs.weight else weight.new_empty(0)
        if rows.numel() == 0:
            return d_hidden, d_weight.zero_(), torch.zeros_like(bias) if needs.bias else weight.new_empty(0)

        vocab, dim = weight.shape
        sums = torch.zeros(_pad(rows.numel()), _pad(dim), dtype=torch.float32) if needs.hidden else None
        d_bias = torch.zeros(vocab, dtype=torch.float32) if needs.bias else None
        reference = self.reference if upstream.kl is not None else None
        if self.memory is None:
            self._kept_logits(rows.numel())  # none, but `spare` makes room
        extension.load().linear_gradients(
            *self._problem(reference, rows),
            self.memory,
            None if self.kept is None else (self.valid.cumsum(0) - 1)[rows],
            row_scalars(rows, saved, upstream),
            None if sums is None else sums.view(-1),
            d_weight if needs.weight else None,
            d_bias,
        )
        if needs.hidden:
            d_hidden[rows] = sums[: rows.numel(), :dim].to(d_hidden.dtype)
        return d_hidden, d_weight, d_bias.to(bias.dtype) if needs.bias else weight.new_empty(0)

    def _problem(self, reference: Head | None, rows: Tensor) -> tuple:
        """The extension's arguments up to where logits are kept."""
        heads = (None if head is None else _as_read(head) for head in (self.policy, reference))
        kl_kind = self.kl_kind if reference is not None else ""
        tiling = self._tiling(rows.numel())
        scratch = max(self.options.budget, tiling.bytes) - spare.memory.numel()  # that may wait for the next call
        threads = torch.get_num_threads()
        options = (kl_kind, *self._precisions(), tiling.width, tiling.block, scratch, threads, products.isa)
        return *heads, transform_numbers(self.options.transform), rows, self.targets, options

    def _precisions(self) -> tuple[str, str]:
        """Of what the operands are rounded to, and of the products."""
        compute_dtype = self.options.compute_dtype
        halves = "float16" if _halves(self.policy.hidden, compute_dtype) else "float32"
        operand = "bfloat16" if compute_dtype == torch.bfloat16 else halves
        return operand, "bfloat16" if _product_size(compute_dtype) == 2 else "float32"

    def _tiling(self, rows: int) -> _Tiling:
        # Where logits are kept both passes must cut the vocabulary alike, however many rows each of them has.
        rows = rows if self.kept is None else len(self.targets)
        return _Tiling.choose(rows, self.policy.weight, self.reference, self.options)

    def _kept_logits(self, rows: int) -> tuple | None:
        """Where each tile's logits [rows, width] go: into ∂weight's memory, into spare memory, or nowhere."""
        weight, tiling = self.policy.weight, self._tiling(rows)
        rest = max(self.options.budget - tiling.bytes, 0)
        if self.kept is None:
            spare.reserve(0, most=rest)
            return None
        slot = rows * tiling.width * (2 if _halves(self.policy.hidden, self.options.compute_dtype) else 4)
        memory = self.kept.d_weight.view(-1).view(torch.uint8)
        tiles = self.kept.whole.numel()
        # A tile's rows of ∂weight must end before the next tile's slot starts.
        stride = max(slot, tiling.width * weight.shape[1] * weight.element_size())
        front = min(tiles, (memory.numel() - slot) // stride + 1) if memory.numel() >= slot else 0
        back = min(tiles - front, rest // slot)
        spare.reserve(back * slot, most=rest)
        return memory, stride, front, spare.memory, back, rows, self.kept.anchors, self.kept.whole


class _Kept(NamedTuple):
    """Where logits wait between the passes, and how to read them."""

    d_weight: Tensor  # like weight, contiguous; in the end ∂weight
    anchors: Tensor  # [N] float32: what was subtracted from a row's logits before they were rounded to 16 bits
    whole: Tensor  # [tiles] uint8: 1 where 16 bits could hold every logit of the tile

    @classmethod
    def open(cls, policy: Head, width: int) -> _Kept:
        rows, vocab = policy.hidden.shape[0], policy.weight.shape[0]
        tiles = torch.empty(-(-vocab // width), dtype=torch.uint8)
        return cls(_empty_like(policy.weight), torch.empty(rows, dtype=torch.float32), tiles)


def row_scalars(rows: Tensor, saved: list[Tensor], upstream: Upstream) -> Tensor:
    """[5 or 9, n] float32: row_max, log_sum, a, b, c, d_kl, kl_center, ref_row_max, ref_log_sum of csrc/head/linear.h.

    Without a divergence in the loss only the first five.
    """
    a, b, c, d_kl = RowCoefficients.of(saved[1], upstream, rows)
    b = torch.zeros_like(a) if b is None else b
    divergence = [] if d_kl is None else [d_kl, *(x[rows] for x in saved[5:8])]
    return torch.stack([saved[2][rows], saved[3][rows], a, b, c, *divergence])


class _Tiling(NamedTuple):
    """How the vocabulary and the tokens are cut.

    Wide tiles share the packing of ∂W's other factor and the passes over ∂h among more products; a token's part of them
    must stay in the L2 cache. Every stretch of tokens costs a float32 ∂W tile and packing the hidden states anew.
    """

    width: int  # vocabulary rows of a tile
    block: int  # tokens whose ∂zᵀ is collected for one ∂W product
    bytes: int  # scratch that takes

    @classmethod
    def choose(cls, rows: int, weight: Tensor, reference: Head | None, options: Options) -> _Tiling:
        size = _product_size(options.compute_dtype)
        ref_weight = None if reference is None else reference.weight
        width, block = min(WIDTH, _pad(weight.shape[0])), _pad(max(rows, 1))
        while True:
            tiling = cls(width, block, _scratch_bytes(width, block, rows, weight, ref_weight, size))
            if tiling.bytes <= options.budget or (width == PANEL and block == PANEL):
                return tiling
            if block > 2 * width or width == PANEL:
                block = _pad(block // 2)
            else:
                width = _pad(width // 2)


def _scratch_bytes(width: int, block: int, rows: int, weight: Tensor, ref_weight: Tensor | None, size: int) -> int:
    """What csrc/head/linear.cpp takes, at most, for either pass on `THREADS` threads."""
    dim, ref_dim = _pad(weight.shape[1]), 0 if ref_weight is None else _pad(ref_weight.shape[1])
    packed = width * 2 * (dim + ref_dim) * size
    shared = (block + 32) * width * size + block * dim * size + (width * dim * 4 if rows > block else 0)
    block_of_logits = PANEL * width * (4 if ref_weight is None else 8)
    converted = PANEL * width * size if size == 2 else 0
    each = PANEL * max(dim, ref_dim) * size + block_of_logits + converted + PANEL * dim * 4
    return packed + shared + THREADS * each


def _pad(n: int) -> int:
    return -(-n // PANEL) * PANEL


def _product_size(compute_dtype: torch.dtype) -> int:
    """Bytes of an operand of the products: bfloat16 where this machine multiplies it, else float32."""
    return 2 if compute_dtype == torch.bfloat16 and "bfloat16" in products.PRODUCTS else 4


def _halves(hidden: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether logits are kept in 16 bits: where the inputs have no more."""
    return compute_dtype == torch.bfloat16 or hidden.dtype == torch.float16


def _serves(problem: Problem) -> bool:
    """float64, weights that are not stored row by row, and a PyTorch without the products, or with oneDNN switched off,
    are left to `chunked`."""
    weights = [head.weight for head in (problem.policy, problem.reference) if head is not None]
    return (
        bool(products.PRODUCTS)
        and torch.backends.mkldnn.enabled
        and all(x.dtype != torch.float64 and has_rows(x) for x in weights)
    )


def has_rows(x: Tensor) -> bool:
    """Whether each row of a matrix lies in one piece."""
    return x.shape[1] == 1 or x.stride(1) == 1


def _as_read(head: Head) -> tuple[Tensor, Tensor, Tensor | None]:
    hidden = head.hidden.detach()
    bias = None if head.bias is None else head.bias.detach().float().contiguous()
    return hidden if has_rows(hidden) else hidden.contiguous(), head.weight.detach(), bias


def _empty_like(weight: Tensor) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def transform_numbers(transform: LogitTransform) -> tuple[float, float, float]:
    """(scale, inner, cap) of csrc/head/rows.h."""
    temperature, logit_scale, softcap = transform
    scale = logit_scale / temperature
    return (scale, 0.0, 0.0) if softcap is None else (scale, logit_scale / softcap, softcap / temperature)
