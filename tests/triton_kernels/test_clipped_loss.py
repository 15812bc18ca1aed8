"""PPO's loss, its metrics and its gradients by two kernels, against loops and the plain formula in float64."""

from __future__ import annotations

import itertools
import math

import oracle
import pytest
import torch
from fastppo_kernels import clipped_loss as kernels
from launch_count import launches
from test_loss import by_rows, inputs

import fastppo
from fastppo.ops.clipped_loss_gradient import clipped_loss_gradient
from fastppo.ops.loss_options import LossOptions, SampledTokens

PLAIN = LossOptions(0.2, 0.2, None, "token", 0.0, "k1", 0.0, "token-mean")
LEVELS, AGGS = list(kernels.RATIO_LEVELS), list(kernels.LOSS_AGGS)
ESTIMATORS = ["k1", "k2", "k3", "exact"]


def rollout(b, t, device, *, masked=0.3, spread=0.4):
    """(logprobs, entropy, KL) and the tokens, in float32; the second sequence has no token."""
    logprobs = -3 * torch.rand(b, t, device=device)
    old, ref = (logprobs + spread * torch.randn(b, t, device=device) for _ in range(2))
    mask = torch.rand(b, t, device=device) >= masked
    mask[1:2] = False
    statistics = logprobs, 5 * torch.rand(b, t, device=device), torch.rand(b, t, device=device)
    weights = (2.5 * torch.rand(b, t, device=device) - 0.5).clamp(min=0)
    return statistics, SampledTokens(mask, old, torch.randn(b, t, device=device), ref, weights)


def fused(statistics, tokens, options):
    """(loss, metrics, d_logprobs, d_entropy, d_kl), the last two None where the loss has no such term."""
    garbage = [x if x is None else x.masked_fill(~tokens.mask, math.nan) for x in (*statistics, *tokens[1:])]
    out = kernels.clipped_loss(*garbage[:3], tokens.mask, *garbage[3:], *options)
    return [None if x is None else x.double().cpu() for x in out]


def exact(statistics, tokens, options):
    """The same by the formula in float64."""
    statistics = [None if x is None else x.double().cpu() for x in statistics]
    tokens = SampledTokens(tokens.mask.cpu(), *(None if x is None else x.double().cpu() for x in tokens[1:]))
    loss, metrics = tokens.loss(*statistics, options)
    rest = {"ref_logprobs": tokens.ref_logprobs, "importance_weights": tokens.importance_weights, **options._asdict()}
    d_logprobs, d_entropy, _, d_kl = clipped_loss_gradient(statistics[0], *tokens[1:3], tokens.mask, **rest)
    return [loss, torch.stack(list(metrics.values())), d_logprobs, d_entropy, d_kl]


def assert_close(got, want, tolerance=2e-6):
    for a, b in zip(got, want, strict=True):
        if b is None:
            assert a is None
            continue
        sizes = b[b.isfinite()].abs()
        least = 1e-30 if b.dim() else 1.0  # the loss is a mean of terms about one, which may all but cancel
        size = max(least, sizes.max().item()) if sizes.numel() else 1.0
        torch.testing.assert_close(a.view(b.shape), b, atol=tolerance * size, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("agg", AGGS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_and_its_gradients_are_those_of_loops(device, level, agg, estimator):
    statistics, tokens = rollout(4, 7, device)
    options = LossOptions(0.1, 0.25, 1.5, level, 0.3, estimator, 0.02, agg)
    leaves = [x.double().cpu().requires_grad_() for x in statistics]
    arguments = [leaves[0], leaves[1], tokens.old_logprobs.double().cpu(), tokens.advantages.double().cpu()]
    lists = [[list(row) for row in x] for x in (*arguments, tokens.ref_logprobs.double().cpu(), leaves[2])]
    more = {"importance_weights": tokens.importance_weights.double().cpu(), **options._asdict()}
    want = oracle.ppo(*lists[:4], tokens.mask.tolist(), ref=lists[4], exact_kl=lists[5], **more)
    gradients = torch.autograd.grad(want, leaves, allow_unused=True)
    loss, _, *got = fused(statistics, tokens, options)
    assert loss.item() == pytest.approx(want.item(), rel=2e-6, abs=1e-6)
    assert_close(got, [*gradients[:2], gradients[2] if estimator == "exact" else None])


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 515), (5, 300), (3, 1337)])
@pytest.mark.parametrize("level", LEVELS)
def test_every_result_at_odd_sizes(device, shape, level):
    """Less and more than a block, tokens and sequences of no multiple of it; with each kind of KL and of weights."""
    statistics, tokens = rollout(*shape, device)
    for agg, estimator in zip(AGGS, ESTIMATORS, strict=True):
        options = LossOptions(0.2, 0.3, 2.0, level, 0.1, estimator, 0.01, agg)
        assert_close(fused(statistics, tokens, options), exact(statistics, tokens, options), 1e-5)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)), ids=str)
def test_what_is_not_given(device, given):
    """No entropy, no exact KL, no reference: the metrics that they would give are left out. No importance weights."""
    (logprobs, entropy, kl), tokens = rollout(3, 9, device)
    statistics = [logprobs, entropy if given[0] else None, kl if given[1] else None]
    tokens = (tokens if given[2] else tokens._replace(ref_logprobs=None))._replace(importance_weights=None)
    for options in (PLAIN, PLAIN._replace(kl_estimator="exact"), PLAIN._replace(ratio_level="sequence")):
        assert_close(fused(statistics, tokens, options), exact(statistics, tokens, options))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 5), (700, 1)])
@pytest.mark.parametrize(("level", "agg"), [("token", "token-mean"), ("sequence-geometric", "seq-mean-token-mean")])
def test_no_real_token_gives_zeros(device, shape, level, agg):
    ones = torch.ones(shape, device=device)
    tokens = SampledTokens(torch.zeros(shape, dtype=torch.bool, device=device), ones, ones, ones)
    options = LossOptions(0.2, 0.2, None, level, 0.1, "k3", 0.01, agg)
    loss, metrics, d_logprobs, d_entropy, _ = fused((ones, ones, ones), tokens, options)
    assert loss.item() == 0.0
    assert metrics.tolist() == [0.0] * 5 + [1.0, 1.0] + [0.0] * 2
    assert not d_logprobs.any()
    assert not d_entropy.any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_tokens_ruled_out_and_far_log_ratios(device, level, estimator):
    statistics, tokens = rollout(5, 9, device, masked=0.0)
    statistics[0][0, 3] = -math.inf
    statistics[0][2, :5] = torch.tensor([-50.0, -59.0, -61.0, -100.0, -1e4], device=device)
    tokens.old_logprobs[3, :3] = torch.tensor([-59.0, -70.0, -1000.0], device=device)
    tokens.ref_logprobs[4, :4] = torch.tensor([-40.0, -59.5, -61.0, -300.0], device=device)
    for kl_coef in (0.0, 0.1):
        options = PLAIN._replace(ratio_level=level, kl_coef=kl_coef, kl_estimator=estimator)
        got, want = fused(statistics, tokens, options), exact(statistics, tokens, options)
        assert math.isfinite(want[0]) == (kl_coef == 0.0)
        assert_close(got, want)


@pytest.mark.parametrize("level", LEVELS)
def test_nan_spreads_as_in_the_formula(device, level):
    """A target outside of the vocabulary has a log-probability of NaN: no bound and no minimum may hide it."""
    statistics, tokens = rollout(3, 9, device, masked=0.0)
    statistics[0][0, 3] = math.nan
    options = LossOptions(0.2, 0.2, 2.0, level, 0.1, "k3", 0.01, "seq-mean-token-mean")
    got, want = fused(statistics, tokens, options), exact(statistics, tokens, options)
    assert got[0].isnan()
    assert got[1][4:7].isnan().all()
    assert_close(got, want)


def test_sums_of_hundreds_of_thousands_of_tokens(device):
    """Nearly the rollout's own policy: the KL's estimates are tiny differences, and sums of half a million terms."""
    b, t = 37, 13_001
    logprobs = -3 * torch.rand(b, t, device=device)
    old, ref = (logprobs + 1e-3 * torch.randn(b, t, device=device) for _ in range(2))
    advantages = 3 + torch.randn(b, t, device=device)
    tokens = SampledTokens(torch.rand(b, t, device=device) < 0.9, old, advantages, ref)
    for level, agg in (("token", "token-mean"), ("sequence-geometric", "seq-mean-token-mean")):
        options = LossOptions(0.2, 0.2, None, level, 0.1, "k3", 0.01, agg)
        statistics = (logprobs, 5 + torch.rand(b, t, device=device), None)
        got, want = fused(statistics, tokens, options), exact(statistics, tokens, options)
        torch.testing.assert_close(got[0], want[0], atol=0.0, rtol=1e-6)
        torch.testing.assert_close(got[1], want[1], atol=1e-7, rtol=1e-6)
        assert want[1][1] < 1e-6
        # The old log-probabilities' difference, rounded to float32, is what the estimates start from.
        for kl in (1, 8):
            assert got[1][kl].item() == pytest.approx(want[1][kl].item(), rel=1e-5)


def test_same_bits_every_time(device):
    statistics, tokens = rollout(40, 301, device)
    options = LossOptions(0.2, 0.2, None, "sequence", 0.1, "k2", 0.01, "seq-mean-token-sum")
    runs = [fused(statistics, tokens, options) for _ in range(2)]
    assert all(a is b or torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("ppo", [PLAIN, PLAIN._replace(kl_coef=0.1, kl_estimator="exact", entropy_coef=0.01)], ids=str)
def test_the_operator_keeps_its_contract(device, ppo):
    statistics, tokens = rollout(3, 9, device)
    torch.library.opcheck(torch.ops.fastppo.clipped_loss, (*statistics, *tokens, *ppo), test_utils="test_faketensor")


LOSSES = [
    {"entropy_coef": 0.01},
    {"entropy_coef": 0.01, "kl_coef": 0.1, "kl_estimator": "k3", "dual_clip": 3.0},
    {"ratio_level": "sequence-geometric", "loss_agg": "seq-mean-token-mean"},
]


@pytest.mark.parametrize("options", LOSSES, ids=str)
@pytest.mark.parametrize("whole_rows", [False, True])
def test_a_loss_takes_few_launches(device, options, whole_rows, monkeypatch):
    """From hidden states, forward and backward, with everything that surrounds the three products."""
    hidden, weight, _, targets, old, advantages, mask = inputs(4, 16, 32, 99, device)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    if whole_rows:
        by_rows(monkeypatch, 64)

    def step():
        hidden.grad = weight.grad = None
        ref = old if "kl_coef" in options else None
        arguments = {"mask": mask, "ref_logprobs": ref, "backend": "triton", **options}
        fastppo.linear_ppo_loss(hidden, weight, targets, old, advantages, **arguments).loss.backward()

    assert len(launches(step)) < 40, launches(step)


@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_a_loss_from_logits_takes_few_launches(device, options):
    logits = torch.randn(4, 16, 99, device=device, requires_grad=True)
    (old, *_), tokens = rollout(4, 16, device)
    targets = torch.randint(0, 99, (4, 16), device=device)

    def step():
        logits.grad = None
        ref = old if "kl_coef" in options else None
        arguments = {"mask": tokens.mask, "ref_logprobs": ref, "backend": "triton", **options}
        fastppo.ppo_loss(old, tokens.advantages, logits=logits, targets=targets, **arguments).loss.backward()

    assert len(launches(step)) < 30, launches(step)
