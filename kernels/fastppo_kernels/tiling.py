"""Which tiling computes a loss with its gradients, and in what pieces: arithmetic on shapes, no tensor in sight.

    columns   8NDV: statistics; then for each tile of the vocabulary the logits once more, ∂z, ∂weight tile, ∂hidden
    rows      6NDV: for each chunk of rows all of V: statistics that keep eᶻ⁻ᵐ, ∂z over it, ∂hidden, ∂weight

Rows need R · V of the products' dtype, and with several chunks ∂weight is summed in float32, [V, D], which is read
and written once a chunk: few chunks or none. What does not fit the budget is not considered.
"""

from __future__ import annotations

from typing import NamedTuple

from fastppo_kernels.configs import Ceilings

# A product over fewer columns than this leaves tensor cores idle; the budget then cuts the rows instead.
MIN_WIDTH = 512
# The count of rows is rounded up to this, so that the shapes of the products are few and aligned.
ROW_MULTIPLE = 128


class Problem(NamedTuple):
    """N rows of hidden size D against V columns; bytes of an element in the products and of ∂weight's dtype.

    unit: rows that must stay in one chunk, a sequence's where one ratio stands for all of it.
    """

    rows: int
    vocab: int
    dim: int
    itemsize: int
    weight_itemsize: int
    unit: int = 1


class Tiling(NamedTuple):
    """A tile of `rows` × `columns`; whole: rows hold the whole vocabulary (6NDV). seconds: what the model expects."""

    rows: int
    columns: int
    whole: bool
    seconds: float


def choose(problem: Problem, budget: int, ceilings: Ceilings) -> Tiling:
    """The faster of the two tilings at these ceilings, of those that fit `budget` bytes."""
    candidates = [_columns(problem, budget, ceilings), _rows(problem, budget, ceilings)]
    return min((c for c in candidates if c is not None), key=lambda c: c.seconds)


def tile_of_columns(num_rows: int, vocab: int, accumulator_dim: int, itemsize: int, budget: int) -> tuple[int, int]:
    """(rows, columns) of a tile of ∂z: it and the float32 ∂weight tile [columns, accumulator_dim] fit the budget.

    All rows at once where that leaves MIN_WIDTH columns: ∂weight is then written without being added up.
    """
    width = min(vocab, MIN_WIDTH)
    rows_that_fit = (budget // width - 4 * accumulator_dim) // itemsize
    if rows_that_fit < num_rows:
        return min(num_rows, max(ROW_MULTIPLE, rows_that_fit // ROW_MULTIPLE * ROW_MULTIPLE)), width
    fits = budget // (num_rows * itemsize + 4 * accumulator_dim)
    return num_rows, vocab if fits >= vocab else fits // MIN_WIDTH * MIN_WIDTH


def kept_bytes(rows: int, vocab: int, itemsize: int) -> int:
    """Of eᶻ⁻ᵐ [rows, V], padded to a multiple of 16 columns, and of a maximum for every 64 of them."""
    return rows * (-(-vocab // 16) * 16 * itemsize + 4 * -(-vocab // 64))


def sums_in_float32(problem: Problem, chunks: int) -> bool:
    """Whether ∂weight needs a float32 sum beside it: a float32 ∂weight is its own."""
    return chunks > 1 and problem.weight_itemsize != 4


def cut(real: list[int], most: int) -> list[tuple[int, int]]:
    """Units with so many real rows each -> (first, last) of consecutive ones that hold at most `most` rows together.

    Raises:
        ValueError: a unit that alone has more.
    """
    spans, first, held = [], 0, 0
    for unit, rows in enumerate(real):
        if rows > most:
            raise ValueError(f"a unit of {rows} rows does not fit a chunk of {most}")
        if held + rows > most:
            spans.append((first, unit))
            first, held = unit, 0
        held += rows
    return [*spans, (first, len(real))] if real else []


def _columns(p: Problem, budget: int, ceilings: Ceilings) -> Tiling:
    block, width = tile_of_columns(p.rows, p.vocab, p.dim, p.itemsize, budget)
    blocks, tiles = -(-p.rows // block), -(-p.vocab // width)
    moved = (
        _weight_reads(p, blocks + 2)
        + 3 * p.itemsize * p.rows * p.vocab  # ∂z: written once, read twice
        + (4 * (2 * blocks - 1) + 4 + p.weight_itemsize) * p.vocab * p.dim  # ∂weight tile: summed, then copied
        + (8 * tiles + p.itemsize * (tiles + 2)) * p.rows * p.dim  # ∂hidden read and written a tile; hidden read
    )
    return Tiling(block, width, False, _seconds(8, p, moved, ceilings))


def _rows(p: Problem, budget: int, ceilings: Ceilings) -> Tiling | None:
    each = kept_bytes(1, p.vocab, p.itemsize)
    cast = p.itemsize * p.vocab * p.dim if p.weight_itemsize != p.itemsize else 0  # a copy of the weight
    chunk = min(p.rows, (budget - cast) // each)
    if chunk < p.rows:
        chunk = (budget - cast - sums_in_float32(p, 2) * 4 * p.vocab * p.dim) // each
        chunk = chunk // ROW_MULTIPLE * ROW_MULTIPLE
    if chunk < max(1, min(p.rows, p.unit)):
        return None
    chunks = -(-p.rows // chunk)
    summed = 8 * (chunks - 1) + sums_in_float32(p, chunks) * 4  # bytes moved for each element of ∂weight's sum
    moved = (
        _weight_reads(p, 2 * chunks)
        + 5 * p.itemsize * p.rows * p.vocab  # eᶻ⁻ᵐ written, read, ∂z written over it, read twice
        + (summed + p.weight_itemsize) * p.vocab * p.dim
        + (8 + 4 * p.itemsize) * p.rows * p.dim
    )
    return Tiling(chunk, p.vocab, True, _seconds(6, p, moved, ceilings))


def _weight_reads(p: Problem, times: int) -> int:
    return times * p.itemsize * p.vocab * p.dim


def _seconds(products: int, p: Problem, moved: float, ceilings: Ceilings) -> float:
    """Products and traffic overlap within a kernel and not between them: neither max nor sum, a mean of the two.

    Only the order of two tilings of one problem matters.
    """
    rate = ceilings.flops_per_s * 2 / p.itemsize
    compute, traffic = products * p.rows * p.dim * p.vocab / rate, moved / ceilings.bytes_per_s
    return 0.5 * (max(compute, traffic) + compute + traffic)
