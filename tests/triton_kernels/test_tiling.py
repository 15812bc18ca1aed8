"""Which tiling a loss is computed by: arithmetic on shapes."""

from __future__ import annotations

from fastppo_kernels.configs import Ceilings
from fastppo_kernels.tiling import LossShape, choose, stored_bytes, tile_of_columns
from hypothesis import given, settings
from hypothesis import strategies as st

CHIP = Ceilings(flops_per_s=1e15, bytes_per_s=3e12)
LLAMA = LossShape(rows=8192, vocab=128_256, dim=4096, itemsize=2, weight_itemsize=2)
MIB, GIB = 2**20, 2**30


def test_one_chunk_of_all_rows_is_taken_where_it_fits():
    tiling = choose(LLAMA, 4 * GIB, CHIP)
    assert tiling.whole
    assert tiling.rows == LLAMA.rows


def test_a_small_budget_leaves_tiles_of_the_vocabulary():
    tiling = choose(LLAMA, 256 * MIB, CHIP)
    assert not tiling.whole
    assert tiling.rows == LLAMA.rows


def test_small_chunks_lose_to_the_traffic_of_the_weight_gradient():
    """A float32 ∂weight needs no sum beside it, so chunks of any size fit; they are not worth their traffic."""
    problem = LLAMA._replace(rows=32_768, weight_itemsize=4, copies_weight=True)
    copy = 2 * LLAMA.vocab * LLAMA.dim  # of the weight, in the products' dtype
    assert not choose(problem, copy + stored_bytes(256, LLAMA.vocab, 2), CHIP).whole
    assert choose(problem, copy + stored_bytes(16_384, LLAMA.vocab, 2), CHIP).whole


def test_more_bandwidth_favors_small_chunks_and_less_favors_tiles():
    problem = LLAMA._replace(rows=32_768, weight_itemsize=4)
    wide = choose(problem, 3 * GIB, CHIP._replace(bytes_per_s=1e15))
    narrow = choose(problem, 3 * GIB, CHIP._replace(bytes_per_s=1e11))
    assert wide.whole
    assert not narrow.whole


def test_a_sequence_that_does_not_fit_goes_by_tiles_of_the_vocabulary():
    budget = stored_bytes(1024, LLAMA.vocab, 2) + 4 * LLAMA.vocab * LLAMA.dim
    fast, problem = CHIP._replace(bytes_per_s=1e15), LLAMA._replace(rows=32_768)
    together = choose(problem._replace(unit=500), budget, fast)
    assert together.whole
    assert together.rows % 500 == 0
    assert not choose(problem._replace(unit=2048), budget, fast).whole


def test_float16_never_goes_by_whole_rows():
    assert not choose(LLAMA, 4 * GIB, CHIP, whole_rows=False).whole


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 40_000),
    vocab=st.integers(1, 300_000),
    dim=st.integers(1, 9000),
    itemsize=st.sampled_from([2, 4]),
    weight_itemsize=st.sampled_from([2, 4]),
    unit=st.integers(1, 5000),
    budget=st.integers(1, 2**34),
)
def test_what_is_chosen_fits_the_budget(rows, vocab, dim, itemsize, weight_itemsize, unit, budget):
    problem = LossShape(rows, vocab, dim, itemsize, weight_itemsize, unit)
    tiling = choose(problem, budget, CHIP)
    assert 1 <= tiling.rows <= rows
    assert tiling.seconds > 0
    if tiling.whole:
        summed = 4 * vocab * dim if tiling.rows < rows and weight_itemsize != 4 else 0
        assert stored_bytes(tiling.rows, vocab, itemsize) + summed <= budget
        assert tiling.rows == rows or tiling.rows % unit == 0
    else:
        without_sums = tile_of_columns(rows, vocab, 0, itemsize, budget)
        all_rows = without_sums[0] == rows
        assert (tiling.rows, tiling.columns) == (
            without_sums if all_rows else tile_of_columns(rows, vocab, dim, itemsize, budget)
        )
