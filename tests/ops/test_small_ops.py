"""value_loss, whiten, the KL controllers, and the hand-made derivative of the loss."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo
from fastppo import reference
from fastppo.ops.clipped_loss_gradient import clipped_loss_gradient


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    level=st.sampled_from(["token", "sequence", "sequence-geometric"]),
    agg=st.sampled_from(["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]),
    dual_clip=st.sampled_from([None, 1.5]),
    estimator=st.sampled_from(["k1", "k2", "k3", "exact"]),
    entropy_coef=st.sampled_from([0.0, 0.1]),
    kl_coef=st.sampled_from([0.0, 0.3]),
    weighted=st.booleans(),
    spread=st.sampled_from([0.5, 60.0]),  # of the log-ratios; beyond 60 they are bounded
    seed=st.integers(0, 2**31),
)
def test_the_loss_derivative_by_hand_is_autograds(
    shape, level, agg, dual_clip, estimator, entropy_coef, kl_coef, weighted, spread, seed
):
    g = torch.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return torch.randn(shape, generator=g, dtype=torch.float64) * scale

    logprobs, entropy, kl = (draw().requires_grad_() for _ in range(3))
    old, ref, advantages = logprobs.detach() + draw(spread), logprobs.detach() + draw(spread), draw()
    mask = torch.rand(shape, generator=g) < 0.7
    options = {
        "clip_low": 0.2, "clip_high": 0.3, "dual_clip": dual_clip, "ratio_level": level, "kl_coef": kl_coef,
        "entropy_coef": entropy_coef, "loss_agg": agg,
        "importance_weights": draw().clamp(min=0) if weighted else None,
    }  # fmt: skip
    penalty = kl if estimator == "exact" else reference.sampled_kl(logprobs, ref, estimator)
    loss, _ = reference.clipped_loss(logprobs, old, advantages, mask, entropy=entropy, kl=penalty, **options)
    expected = torch.autograd.grad(loss, [logprobs, entropy, kl], allow_unused=True)
    got = clipped_loss_gradient(
        logprobs.detach(), old, advantages, mask, ref_logprobs=ref, kl_estimator=estimator, **options
    )
    assert got.logsumexp is None
    for mine, theirs in zip((got.logprobs, got.entropy, got.kl), expected, strict=True):
        mine = torch.zeros(shape, dtype=torch.float64) if mine is None else mine
        theirs = torch.zeros(shape, dtype=torch.float64) if theirs is None else theirs
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_loss_matches_a_loop(clip, dtype):
    values = torch.randn(3, 5).to(dtype).requires_grad_()
    old, returns, mask = torch.randn(3, 5), torch.randn(3, 5), torch.rand(3, 5) < 0.6
    mask[0, 0] = True
    out = fastppo.value_loss(
        values,
        returns.masked_fill(~mask, float("nan")),
        old_values=old.masked_fill(~mask, float("nan")),
        mask=mask,
        cliprange_value=clip,
    )
    out.loss.backward()
    total, clipped, gradient, count = 0.0, 0, torch.zeros(3, 5), mask.sum().item()
    for b, t in mask.nonzero().tolist():
        v, o, r = values[b, t].item(), old[b, t].item(), returns[b, t].item()
        plain, bounded = (v - r) ** 2, math.inf
        if clip is not None:
            bounded = (min(max(v, o - clip), o + clip) - r) ** 2
        use_bounded = clip is not None and bounded > plain
        clipped += use_bounded
        total += 0.5 * (bounded if use_bounded else plain) / count
        inside = clip is None or abs(v - o) < clip
        gradient[b, t] = 0.0 if use_bounded and not inside else (v - r) / count
    assert out.loss.item() == pytest.approx(total, rel=1e-5)
    assert out.metrics["clip_fraction"].item() == pytest.approx(clipped / count)
    torch.testing.assert_close(values.grad.float(), gradient, atol=2e-3 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2)
    real_r, real_v = returns[mask].tolist(), values.detach().float()[mask].tolist()
    if count > 1:
        residual = [r - v for r, v in zip(real_r, real_v, strict=True)]
        expected = 1 - statistics.pvariance(residual) / statistics.pvariance(real_r)
        assert out.metrics["explained_variance"].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_matches_statistics(shift_mean):
    x, mask = torch.randn(4, 9) * 3 + 7, torch.rand(4, 9) < 0.5
    mask[0, :2] = True
    got = fastppo.whiten(x.masked_fill(~mask, float("nan")), mask=mask, shift_mean=shift_mean)
    real = x[mask].double().tolist()
    mean, deviation = statistics.mean(real), statistics.stdev(real)
    expected = [(v - mean) / deviation + (0.0 if shift_mean else mean) for v in real]
    torch.testing.assert_close(got[mask].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=1e-4)
    assert got[~mask].abs().sum() == 0


def test_whiten_of_the_largest_numbers():
    """Their squares and their sum overflow float32."""
    signs = [1, -1, 1, -1, 1]
    small = statistics.NormalDist.from_samples(signs)
    expected = torch.tensor([small.zscore(x) for x in signs])
    torch.testing.assert_close(fastppo.whiten(3e38 * torch.tensor(signs)), expected)


def test_whiten_of_nothing_and_of_one():
    assert torch.equal(fastppo.whiten(torch.randn(3), mask=torch.zeros(3, dtype=torch.bool)), torch.zeros(3))
    assert torch.isfinite(fastppo.whiten(torch.tensor([5.0]))).all()
    assert fastppo.whiten(torch.zeros(0)).shape == (0,)


def test_adaptive_controller_is_the_published_rule():
    controller = fastppo.AdaptiveKLController(0.2, target=6.0, horizon=10000)
    controller.update(6.6, 256)  # 10% over the target
    assert controller.value == pytest.approx(0.2 * (1 + 0.1 * 256 / 10000))
    before = controller.value
    controller.update(600.0, 256)  # the error is clipped at 0.2
    assert controller.value == pytest.approx(before * (1 + 0.2 * 256 / 10000))
    copy = fastppo.AdaptiveKLController(1.0, target=6.0, horizon=10000)
    copy.load_state_dict(controller.state_dict())
    assert copy.value == controller.value
    for error in (ValueError, FloatingPointError):
        with pytest.raises(error, match="current_kl"):
            controller.update(float("nan"), 1)
    copy.value = 1.7e308
    with pytest.raises(FloatingPointError, match=r"kl_coef: inf after 1\.7e"):
        copy.update(600.0, 10000)
    assert copy.value == 1.7e308
    fixed = fastppo.FixedKLController(0.3)
    fixed.update(100.0, 10)
    assert fixed.value == 0.3


def test_adaptive_controller_steers_towards_its_target():
    """On a plant whose KL falls as the coefficient rises, it settles at the target."""
    controller = fastppo.AdaptiveKLController(0.01, target=5.0, horizon=500)
    for _ in range(2000):
        controller.update(1.0 / (0.05 + controller.value), 32)
    assert 1.0 / (0.05 + controller.value) == pytest.approx(5.0, rel=0.02)


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"returns": torch.full((2, 3), float("nan"))}, "returns"),
        ({"returns": torch.zeros(2, 4)}, "returns"),
        ({"old_values": None}, "old_values"),
        ({"cliprange_value": -1.0}, "cliprange_value"),
        ({"loss_agg": "sum"}, "loss_agg"),
        ({"mask": torch.ones(3)}, "mask"),
    ],
)
def test_value_loss_names_bad_input(kwargs, names):
    arguments = {"returns": torch.zeros(2, 3), "old_values": torch.zeros(2, 3)} | kwargs
    with pytest.raises(ValueError, match=names):
        fastppo.value_loss(torch.zeros(2, 3), arguments.pop("returns"), **arguments)


def test_scratch_budget_is_checked_and_restored(monkeypatch):
    from fastppo.engines.budget import DEFAULT_SCRATCH_BYTES, scratch_bytes

    with fastppo.scratch_budget(123):
        assert scratch_bytes() == 123
    assert scratch_bytes() == DEFAULT_SCRATCH_BYTES
    monkeypatch.setenv("FASTPPO_SCRATCH_MB", "0.5")
    assert scratch_bytes() == 2**19
    monkeypatch.setenv("FASTPPO_SCRATCH_MB", "lots")
    with pytest.raises(ValueError, match="FASTPPO_SCRATCH_MB"):
        scratch_bytes()
    with pytest.raises(ValueError, match="scratch"), fastppo.scratch_budget(0):
        pass


def test_scratch_budgets_may_end_in_any_order():
    """Those of several threads do; those of one end the last first."""
    from fastppo.engines.budget import DEFAULT_SCRATCH_BYTES, scratch_bytes

    first, second, third = (fastppo.scratch_budget(num_bytes) for num_bytes in (123, 456, 123))
    first.__enter__()
    second.__enter__()
    with third:
        assert scratch_bytes() == 123
    assert scratch_bytes() == 456
    first.__exit__(None, None, None)
    assert scratch_bytes() == 456
    second.__exit__(None, None, None)
    assert scratch_bytes() == DEFAULT_SCRATCH_BYTES


def test_on_a_gpu_the_scratch_is_a_share_of_its_memory(monkeypatch):
    from types import SimpleNamespace

    from fastppo.engines.budget import scratch_bytes

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    assert scratch_bytes(torch.device("cuda")) == 5 * 2**30
    assert scratch_bytes(torch.device("xpu")) == 256 * 2**20
    with fastppo.scratch_budget(123):
        assert scratch_bytes(torch.device("cuda")) == 123


def test_the_value_clip_fraction_leaves_out_what_is_within_the_range():
    """old + (v - old) is not v to the last bit: nothing may count as clipped for that."""
    values = torch.randn(40, 50)
    out = fastppo.value_loss(values, torch.randn(40, 50), old_values=values + 0.1 * torch.rand(40, 50))
    assert out.metrics["clip_fraction"] == 0
