"""Which tiling computes a loss with its gradients, and in what pieces: arithmetic on shapes, no tensor in sight.

    columns   8NDV: statistics; then for each tile of the vocabulary the logits once more, ∂z, ∂weight tile, ∂hidden
    rows      6NDV: for each chunk of rows all of V: statistics that store E = exp(z − shift), ∂hidden, ∂weight

Rows need R · V of the products' dtype, and with several chunks ∂weight is summed in float32, [V, D], which is read
and written once a chunk: few chunks or none. What does not fit the budget is not considered.
"""

from __future__ import annotations

from typing import NamedTuple

from fastppo_kernels.configs import Ceilings

# A product over fewer columns than this leaves tensor cores idle; the budget then cuts the rows instead.
MIN_WIDTH = 512
# Blocks of rows begin at multiples of this, so that the shapes of the products are few and aligned.
ROW_MULTIPLE = 128
# Rows of a scratch matrix begin at multiples of this many elements: loads and stores stay 16 bytes wide whatever V is.
STRIDE_MULTIPLE = 64


class LossShape(NamedTuple):
    """N rows of hidden size D against V columns; bytes of an element in the products and of ∂weight's dtype.

    unit: rows that must stay in one chunk, a sequence's where one ratio stands for all of it.
    copies_weight: the products read a copy of the weight, in their dtype, padded or turned.
    """

    rows: int
    vocab: int
    dim: int
    itemsize: int
    weight_itemsize: int
    unit: int = 1
    copies_weight: bool = False


class Tiling(NamedTuple):
    """A tile of `rows` × `columns`; whole: rows hold the whole vocabulary (6NDV). seconds: what the model expects."""

    rows: int
    columns: int
    whole: bool
    seconds: float


def choose(problem: LossShape, budget: int, ceilings: Ceilings, *, whole_rows: bool = True) -> Tiling:
    """The faster of the two tilings at these ceilings, of those that fit `budget` bytes; `whole_rows` allows rows."""
    candidates = [_columns(problem, budget, ceilings), _rows(problem, budget, ceilings) if whole_rows else None]
    return min((c for c in candidates if c is not None), key=lambda c: c.seconds)


def row_stride(columns: int) -> int:
    """Elements from one row of a scratch matrix to the next."""
    return -(-columns // STRIDE_MULTIPLE) * STRIDE_MULTIPLE


def tile_of_columns(num_rows: int, vocab: int, accumulator_dim: int, itemsize: int, budget: int) -> tuple[int, int]:
    """(rows, columns) of a tile of ∂z: it and the float32 ∂weight tile [columns, accumulator_dim] fit the budget.

    All rows at once where that leaves MIN_WIDTH columns: ∂weight is then written without being added up.
    """
    width = min(vocab, MIN_WIDTH)
    rows_that_fit = (budget // width - 4 * accumulator_dim) // itemsize
    if rows_that_fit < num_rows:
        return min(num_rows, max(ROW_MULTIPLE, rows_that_fit // ROW_MULTIPLE * ROW_MULTIPLE)), width
    fits = budget // (num_rows * itemsize + 4 * accumulator_dim)
    return num_rows, vocab if fits >= vocab else max(width, fits // MIN_WIDTH * MIN_WIDTH)


def stored_bytes(rows: int, vocab: int, itemsize: int) -> int:
    """Of E [rows, V] and of three partial statistics for every 64 columns."""
    return rows * (row_stride(vocab) * itemsize + 12 * -(-vocab // 64))


def sums_in_float32(problem: LossShape, chunks: int) -> bool:
    """Whether ∂weight needs a float32 sum beside it: a float32 ∂weight is its own."""
    return chunks > 1 and problem.weight_itemsize != 4


def _columns(p: LossShape, budget: int, ceilings: Ceilings) -> Tiling:
    block, width = tile_of_columns(p.rows, p.vocab, 0, p.itemsize, budget)
    if block < p.rows:
        block, width = tile_of_columns(p.rows, p.vocab, p.dim, p.itemsize, budget)
    blocks, tiles = -(-p.rows // block), -(-p.vocab // width)
    moved = (
        _weight_reads(p, blocks + 2)
        + 3 * p.itemsize * p.rows * p.vocab  # ∂z: written once, read twice
        # ∂weight: written at once, or summed in float32 and then copied
        + ((4 * 2 * blocks if blocks > 1 else 0) + p.weight_itemsize) * p.vocab * p.dim
        + (8 * tiles + p.itemsize * (tiles + 2)) * p.rows * p.dim  # ∂hidden read and written a tile; hidden read
    )
    return Tiling(block, width, False, _seconds(8, p, moved, ceilings))


def _rows(p: LossShape, budget: int, ceilings: Ceilings) -> Tiling | None:
    each = stored_bytes(1, p.vocab, p.itemsize)
    copy = p.itemsize * p.vocab * p.dim if p.copies_weight else 0
    chunk = min(p.rows, (budget - copy) // each)
    if chunk < p.rows:
        chunk = (budget - copy - sums_in_float32(p, 2) * 4 * p.vocab * p.dim) // each
        multiple = ROW_MULTIPLE if p.unit == 1 else p.unit
        chunk = chunk // multiple * multiple
    if chunk < 1:
        return None
    chunks = -(-p.rows // chunk)
    summed = 8 * (chunks - 1) + sums_in_float32(p, chunks) * 4  # bytes moved for each element of ∂weight's sum
    moved = (
        _weight_reads(p, 2 * chunks)
        + 5 * p.itemsize * p.rows * p.vocab  # E written, read, ∂z written over it, read twice
        + (summed + p.weight_itemsize) * p.vocab * p.dim
        + (8 + 4 * p.itemsize) * p.rows * p.dim
    )
    return Tiling(chunk, p.vocab, True, _seconds(6, p, moved, ceilings))


def _weight_reads(p: LossShape, times: int) -> int:
    return times * p.itemsize * p.vocab * p.dim


def _seconds(products: int, p: LossShape, moved: float, ceilings: Ceilings) -> float:
    """Products and traffic overlap within a kernel and not between them: neither max nor sum, a mean of the two.

    Only the order of two tilings of one problem matters.
    """
    rate = ceilings.flops_per_s * 2 / p.itemsize
    compute, traffic = products * p.rows * p.dim * p.vocab / rate, moved / ceilings.bytes_per_s
    return 0.5 * (max(compute, traffic) + compute + traffic)
