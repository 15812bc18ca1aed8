"""Draws against exact thresholds: the smallest of E / w wins, so probabilities are right if the thresholds of E are."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.rollout import draw as draw_module
from fastppo.rollout.draw import draw, random_numbers, sequence_keys

BLOCK = draw_module._BLOCK


def test_random_bits_are_those_of_splitmix64():
    """The first outputs for the seed 1234567 of the authors' own code, whose counters begin at 1."""
    own = draw_module._hash(torch.tensor([1234567]), torch.arange(1, 6))
    assert [bits % 2**64 for bits in own.tolist()] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_random_numbers_of_any_bits(monkeypatch):
    """A token of probability p wins if its number is below about p, so p is only as exact as numbers of that size."""
    bits = [0, 1, 2, 1000, 2**52 + 1, 2**62, 2**63 - 1, -(2**63), -1]  # without their signs: also 0 and 2⁶³ − 1
    monkeypatch.setattr(draw_module, "_hash", lambda *_: torch.tensor([bits]))
    (numbers,) = random_numbers(torch.zeros(1, dtype=torch.long), 0, 1).tolist()
    expected = [-math.log1p(-min((number % 2**63 + 0.5) * 2.0**-63, 1 - 2.0**-53)) for number in bits]
    assert numbers == pytest.approx(expected, rel=1e-15)
    assert 0 < min(numbers) < max(numbers) < 37


def test_keys_differ_within_a_rollout_and_between_rollouts():
    keys = torch.stack([sequence_keys(f"{seed}/step {step}", 50) for seed in range(3) for step in range(4)])
    assert len(keys.unique()) == keys.numel()
    assert torch.equal(sequence_keys("2/step 3", 7), keys[-1, :7])  # nor does a key depend on how many there are


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


@pytest.mark.parametrize("over", ["sequences", "places", "rollouts"])
def test_draws_follow_the_probabilities(over):
    """Over three blocks, the last not full; seeded by the suite, as are the rollouts' names."""
    count, vocabulary, name = 8_000, 2 * BLOCK + 77, torch.initial_seed()
    logits = 2 * torch.randn(1, vocabulary)
    logits[0, [0, BLOCK, vocabulary - 1]] = -torch.inf
    if over == "sequences":
        numbers = random_numbers(sequence_keys(f"{name}", count), 3, vocabulary)
    elif over == "places":
        key = sequence_keys(f"{name}", 5)[4:]
        numbers = torch.cat([random_numbers(key, place, vocabulary) for place in range(count)])
    else:
        numbers = random_numbers(torch.cat([sequence_keys(f"{name + i}", 1) for i in range(count)]), 0, vocabulary)
    tokens, logprobs = draw(logits.expand(count, -1), 0.8, numbers)
    probabilities = (logits[0].double() / 0.8).softmax(-1)
    expected = count * probabilities
    found = torch.bincount(tokens, minlength=vocabulary)
    assert len(found) == vocabulary
    assert (found[expected == 0] == 0).all()
    assert ((found - expected).abs() < 6 * expected.sqrt() + 6).all()
    # Chi-square of the tokens that are expected often enough, normal to a good approximation.
    often = expected >= 5
    statistic = ((found - expected).square() / expected)[often].sum().item()
    assert abs(statistic - often.sum()) < 6 * math.sqrt(2 * often.sum())
    torch.testing.assert_close(logprobs.double(), probabilities.log()[tokens], rtol=1e-6, atol=1e-7)


def test_numbers_of_neighbours_are_independent():
    """Of one sequence and the next, one place and the next, one slot and the next: no correlation beyond chance."""
    keys = sequence_keys(f"{torch.initial_seed()}", 200)
    ranks = torch.stack([random_numbers(keys, place, 300) for place in range(8)]).neg().exp() - 0.5  # [8, 200, 513]
    variance = 1 / 12
    assert ranks.mean().item() == pytest.approx(0, abs=6 * math.sqrt(variance / ranks.numel()))
    for dim in range(3):
        one, other = ranks.narrow(dim, 0, ranks.shape[dim] - 1), ranks.narrow(dim, 1, ranks.shape[dim] - 1)
        assert (one * other).mean().item() == pytest.approx(0, abs=6 * variance / math.sqrt(one.numel()))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_named(wrong):
    logits = torch.randn(3, 9)
    logits[1] = wrong
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(logits, 1.0, random_numbers(sequence_keys("", 3), 0, 9))
