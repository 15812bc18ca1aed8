"""Certified gradient filtering: the error stays within its bound, on peaked and on flat distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo
from fastppo.ops import gradient_filter

ROWS, DIM, VOCAB, TILE = 24, 9, 330, 32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(gradient_filter, "TILE", TILE)


def head(sharpness, dtype=torch.float64):
    """Hidden states and a weight whose logits have a standard deviation of `sharpness`."""
    hidden = torch.randn(ROWS, DIM, dtype=torch.float64)
    weight = sharpness * torch.randn(VOCAB, DIM, dtype=torch.float64) / math.sqrt(DIM)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def gradients(hidden, weight, targets, upstream, backend, **options):
    out = fastppo.linear_logprob(hidden, weight, targets, return_entropy=True, backend=backend, **options)
    return out, torch.autograd.grad(sum((g * o).sum() for g, o in zip(upstream, out, strict=True)), (hidden, weight))


@settings(max_examples=25, deadline=None)
@given(
    sharpness=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    mass=st.sampled_from([1e-6, 1e-3, 0.05, 0.5]),
    transform=st.sampled_from([{}, {"temperature": 0.7, "logit_scale": 1.5}, {"softcap": 8.0, "temperature": 0.9}]),
    seed=st.integers(0, 2**31),
)
def test_the_gradients_error_stays_within_the_bound(sharpness, mass, transform, seed):
    torch.manual_seed(seed)
    gradient_filter.TILE = TILE  # hypothesis runs all examples within one fixture
    hidden, weight = head(sharpness)
    targets, upstream = torch.randint(0, VOCAB, (ROWS,)), torch.randn(3, ROWS, dtype=torch.float64)
    out, exact = gradients(hidden, weight, targets, upstream, "reference", **transform)
    filtered_out, filtered = gradients(hidden, weight, targets, upstream, "chunked", filter_mass=mass, **transform)
    for got, want in zip(filtered_out, out, strict=True):
        torch.testing.assert_close(got, want)  # the values are not filtered
    d_logprob, d_entropy, d_logsumexp = upstream
    a = d_logsumexp - d_logprob - d_entropy * out.entropy.detach()
    slope = abs(transform.get("logit_scale", 1.0)) / transform.get("temperature", 1.0)
    bound = slope * mass * (a.abs() + d_entropy.abs() * math.log(VOCAB / mass))
    error_h, error_w = (f - e for f, e in zip(filtered, exact, strict=True))
    assert (error_h.norm(dim=1) <= bound * weight.detach().norm(dim=1).max() + 1e-9).all()
    assert error_w.norm(dim=1).sum() <= (bound * hidden.detach().norm(dim=1)).sum() + 1e-9


@pytest.mark.parametrize(("sharpness", "work"), [(0.0, 1.0), (0.3, 0.9), (300.0, 0.35)])
def test_a_flat_distribution_keeps_every_tile_and_a_peaked_one_few(sharpness, work, monkeypatch):
    rows_seen = []
    vjp = gradient_filter.chunked.vjp
    monkeypatch.setattr(
        gradient_filter.chunked, "vjp", lambda hidden, *rest: rows_seen.append(len(hidden)) or vjp(hidden, *rest)
    )
    hidden, weight = head(sharpness)
    targets = torch.randint(0, VOCAB, (ROWS,))
    gradients(hidden, weight, targets, torch.randn(3, ROWS, dtype=torch.float64), "chunked", filter_mass=1e-3)
    share = sum(rows_seen) / (ROWS * -(-VOCAB // TILE))
    assert share <= work if sharpness > 1 else share >= work


def test_without_a_mass_nothing_is_dropped_and_the_ppo_loss_takes_it_too():
    hidden, weight = head(5.0)
    targets, advantages = torch.randint(0, VOCAB, (ROWS,)), torch.randn(ROWS, dtype=torch.float64)
    with torch.no_grad():
        old = fastppo.linear_logprob(hidden, weight, targets).logprobs + 0.1 * torch.randn(ROWS, dtype=torch.float64)
    found = {}
    for mass in (0.0, 1e-12, 0.3):
        h, w = (x.detach().clone().requires_grad_() for x in (hidden, weight))
        out = fastppo.linear_ppo_loss(
            h, w, targets, old, advantages, entropy_coef=0.1, filter_mass=mass, backend="chunked"
        )
        out.loss.backward()
        found[mass] = (out.loss.detach(), h.grad, w.grad)
    for got, want in zip(found[1e-12], found[0.0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(found[0.3][0], found[0.0][0])
    assert not torch.equal(found[0.3][2], found[0.0][2])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_engines_without_it_compute_in_full(backend):
    hidden, weight = head(10.0, torch.float32)
    targets, upstream = torch.randint(0, VOCAB, (ROWS,)), torch.randn(3, ROWS)
    try:
        plain = gradients(hidden, weight, targets, upstream, backend)[1]
    except ValueError as error:
        pytest.skip(str(error))
    for got, want in zip(gradients(hidden, weight, targets, upstream, backend, filter_mass=0.5)[1], plain, strict=True):
        torch.testing.assert_close(got, want)


def test_masked_rows_bias_and_low_precision():
    hidden, weight = head(8.0, torch.bfloat16)
    bias = torch.randn(VOCAB, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, VOCAB, (ROWS,))
    targets[::3] = -100
    found = []
    for mass in (0.0, 1e-5):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
        out = fastppo.linear_logprob(
            *leaves[:2], targets, bias=leaves[2], return_entropy=True, filter_mass=mass, backend="chunked"
        )
        (out.logprobs + out.entropy).sum().backward()
        found.append([x.grad for x in leaves])
        assert out.logprobs[::3].abs().sum() == 0
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=0.05 * want.abs().max().item(), rtol=0.05)


def test_a_tile_of_excluded_tokens_gives_no_nan():
    hidden, weight = head(5.0)
    bias = torch.zeros(VOCAB, dtype=torch.float64)
    bias[TILE : 2 * TILE] = -torch.inf
    targets, found = torch.randint(0, TILE, (ROWS,)), []
    for mass in (0.0, 1e-12):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        out = fastppo.linear_logprob(
            *leaves, targets, bias=bias, return_entropy=True, filter_mass=mass, backend="chunked"
        )
        (out.logprobs + out.entropy).sum().backward()
        found.append([*(x.detach() for x in out), *(x.grad for x in leaves)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-6)


def test_operators_keep_their_contract():
    hidden, weight = (x.detach() for x in head(5.0, torch.float32))
    targets = torch.randint(0, VOCAB, (ROWS,))
    options, checks = (1.0, 1.0, None, torch.float32, 2**20), ("test_schema", "test_faketensor")
    arguments = (hidden, weight, None, targets, None, None, None, "")
    torch.library.opcheck(gradient_filter._statistics, (*arguments, *options, "chunked"), test_utils=checks)
    saved = gradient_filter._statistics(*arguments, *options, "chunked")
    upstream = (torch.randn(ROWS), None, torch.randn(ROWS), None)
    torch.library.opcheck(
        gradient_filter._vjp, (*arguments, saved, *upstream, *options, True, True, False, "chunked", 1e-3),
        test_utils=checks,
    )  # fmt: skip


@pytest.mark.parametrize("mass", [-0.1, 1.0, float("nan")])
def test_a_mass_out_of_range_is_refused(mass):
    hidden, weight = head(1.0)
    with pytest.raises(ValueError, match="filter_mass"):
        fastppo.linear_logprob(hidden, weight, torch.zeros(ROWS, dtype=torch.long), filter_mass=mass)
