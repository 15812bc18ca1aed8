"""Draws against exact thresholds: the smallest of E / w wins, so probabilities are right if the thresholds of E are."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.rollout import draw as draw_module
from fastppo.rollout.draw import draw, random_numbers

BLOCK = draw_module._BLOCK


@pytest.mark.parametrize("shift", [0.0, 2.0**-54], ids=["cpu", "cuda"])
def test_random_numbers_near_zero_have_all_their_bits(monkeypatch, shift):
    """A token of probability p wins if its number is below about p, so p is only as exact as numbers of that size."""
    coarse = torch.tensor([0, 1, 2, 1000, 2**52], dtype=torch.float64) * 2.0**-53
    fine = torch.arange(1, 65, dtype=torch.float64) / 64
    grid = torch.stack([(coarse + shift)[:, None].expand(-1, 64), fine.expand(5, -1)])
    monkeypatch.setattr(torch, "rand", lambda shape, **_: grid)
    numbers = random_numbers(5, 1)
    for row, start in zip(numbers[:4].tolist(), coarse.tolist(), strict=False):
        expected = [-math.log1p(-(start + 2.0**-53 * part)) for part in fine.tolist()]
        assert row == pytest.approx(expected, rel=1e-15)
        assert len(set(row)) == 64
    assert torch.isfinite(numbers).all()


@pytest.mark.parametrize("tail", [-1.0, -20.0, -60.0])
def test_a_token_of_any_probability_is_drawn_up_to_its_exact_threshold(tail):
    """One token at logit 0 and 262,143 with `tail` and less, down to a probability of 1e-31.

    Float32 sums near 1 are multiples of 6e-8, which is the probability of hundreds of tokens with a tail of -20.
    """
    vocabulary, temperature = 262_144, 0.7
    logits = torch.full((vocabulary,), tail)
    logits[1::2] -= 0.5
    peak, drawn = 3 * BLOCK + 5, vocabulary - BLOCK // 2  # in other blocks
    logits[peak] = 0.0
    weight = [math.exp(z / temperature) for z in logits.double().tolist()]
    block_of = [weight[start : start + BLOCK] for start in range(0, vocabulary, BLOCK)]
    total = [math.fsum(block) for block in block_of]

    # First two blocks race, then two tokens of the winner; all others come last.
    numbers = torch.full((3, BLOCK + len(total)), 1e9, dtype=torch.float64)
    numbers[:, BLOCK + peak // BLOCK] = 1.0
    threshold = total[drawn // BLOCK] / total[peak // BLOCK]
    below, above = 1 - 1e-12, 1 + 1e-12
    numbers[:, BLOCK + drawn // BLOCK] = threshold * torch.tensor([below, below, above], dtype=torch.float64)
    numbers[2, peak % BLOCK] = 1e-9
    rival = drawn + 1
    numbers[:, rival % BLOCK] = 1.0
    numbers[:, drawn % BLOCK] = weight[drawn] / weight[rival] * torch.tensor([below, above, below], dtype=torch.float64)
    tokens, logprobs = draw(logits.expand(3, -1), temperature, numbers)
    assert tokens.tolist() == [drawn, rival, peak]
    everything = math.fsum(total)
    expected = [math.log(weight[token] / everything) for token in tokens.tolist()]
    assert logprobs.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_draws_follow_the_probabilities():
    """Over three blocks, the last not full; seeded by the suite."""
    count, vocabulary = 8_000, 2 * BLOCK + 77
    logits = 2 * torch.randn(1, vocabulary)
    logits[0, [0, BLOCK, vocabulary - 1]] = -torch.inf
    numbers = random_numbers(count, vocabulary)
    tokens, logprobs = draw(logits.expand(count, -1), 0.8, numbers)
    probabilities = (logits[0].double() / 0.8).softmax(-1)
    expected = count * probabilities
    found = torch.bincount(tokens, minlength=vocabulary)
    assert len(found) == vocabulary
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() < 6 * expected.sqrt() + 6).all()
    torch.testing.assert_close(logprobs.double(), probabilities.log()[tokens], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named(wrong):
    logits = torch.randn(3, 9)
    logits[1] = wrong
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(logits, 1.0, random_numbers(3, 9))
