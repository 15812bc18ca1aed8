"""How a batch becomes micro-batches, for every small batch and many random ones."""

from __future__ import annotations

import itertools
import random

import pytest

from fastppo.algorithms.micro_batches import micro_batches


def check(prompts, completions, **size):
    """Every sequence once, as many passes on every rank, none above the budget, longest first, the same each time."""
    passes = micro_batches(prompts, completions, **size)
    lengths = [sum(pair) for pair in zip(prompts, completions, strict=True)]
    assert len(passes) == size["ranks"]
    assert len({len(own) for own in passes}) == 1
    assert sorted(row for own in passes for rows in own for row in rows) == list(range(len(prompts)))
    for own in passes:
        longest = [max((lengths[row] for row in rows), default=-1) for rows in own]
        assert longest == sorted(longest, reverse=True)
        for rows in own:
            if size.get("max_tokens") is None:
                assert len(rows) <= -(-size["most_sequences"] // size["ranks"])
                assert rows == sorted(rows)
            elif size["padded"] and rows:
                width = max(prompts[row] for row in rows) + max(completions[row] for row in rows)
                assert len(rows) * width <= size["max_tokens"]
            else:
                assert sum(lengths[row] for row in rows) <= size["max_tokens"]
    assert all(any(own[i] for own in passes) for i in range(len(passes[0])))  # none that is for nothing everywhere
    assert passes == micro_batches(prompts, completions, **size)
    return passes


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_batch_of_up_to_four_sequences(ranks, padded):
    for count in range(5):
        for pairs in itertools.product(itertools.product((1, 2), (0, 3)), repeat=count):
            prompts, completions = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            for budget in (5, 6, 9, 100):
                check(prompts, completions, most_sequences=1, max_tokens=budget, padded=padded, ranks=ranks)
            for most in (1, 2, 3, 4):
                check(prompts, completions, most_sequences=most, ranks=ranks)


@pytest.mark.parametrize("seed", range(20))
def test_large_batches(seed):
    draw = random.Random(seed)
    count, ranks = draw.randint(1, 70), draw.randint(1, 5)
    prompts = [draw.randint(1, 200) for _ in range(count)]
    completions = [draw.randint(0, 300) for _ in range(count)]
    most = draw.randint(1, 70)
    check(prompts, completions, most_sequences=most, ranks=ranks)
    for padded, budget in itertools.product((False, True), (500, 4097)):
        passes = check(prompts, completions, most_sequences=1, max_tokens=budget, padded=padded, ranks=ranks)
        if not padded:  # two passes in a row have more than one pass could have
            total = sum(prompts) + sum(completions)
            assert len(passes[0]) <= 2 * total / ranks / budget + 2


def test_what_the_budget_decides():
    lengths = [4, 7, 9, 2, 7, 5]
    size = {"most_sequences": 1, "max_tokens": 12, "ranks": 2}
    assert micro_batches(lengths, [0] * 6, **size) == [[[2], [4, 0]], [[1, 5], [3]]]
    # A long prompt and a long completion share rows that are longer than either sequence.
    pairs = [9, 1], [1, 9]
    assert micro_batches(*pairs, most_sequences=1, max_tokens=30) == [[[0, 1]]]
    assert micro_batches(*pairs, most_sequences=1, max_tokens=30, padded=True) == [[[0], [1]]]
    with pytest.raises(ValueError, match="a sequence of 9 tokens does not fit in a pass of 8"):
        micro_batches([9], [0], most_sequences=1, max_tokens=8)


@pytest.mark.parametrize("padded", [False, True])
def test_the_work_grows_with_the_number_of_sequences_alone(padded):
    """Not with how many of them a pass takes."""

    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            Counted.reads += 1
            return super().__getitem__(index)

    lengths = Counted([2] * 1000)
    assert len(micro_batches(lengths, lengths, most_sequences=1, max_tokens=4000, padded=padded)[0]) == 1
    assert Counted.reads <= 10 * len(lengths)


def test_counted_rows_are_a_ranks_own_and_stay_in_order():
    assert micro_batches([1] * 5, [3, 1, 1, 9, 2], most_sequences=2) == [[[2, 3], [0, 1], [4]]]
    assert micro_batches([1] * 5, [3, 1, 1, 9, 2], most_sequences=4, ranks=2) == [[[0, 1], []], [[2, 3], [4]]]
    assert micro_batches([1] * 2, [3, 1], most_sequences=4, ranks=4) == [[[]], [[0]], [[]], [[1]]]
