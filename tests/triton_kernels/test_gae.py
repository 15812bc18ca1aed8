"""GAE on the Triton kernels against its definition, a token at a time in float64."""

from __future__ import annotations

import pytest
import torch
from fastppo_kernels import gae as kernels
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo


def exact(rewards, values, gamma, lam, mask, dones, bootstrap):
    """One sequence: lists of floats -> advantages."""
    real = [t for t in range(len(rewards)) if mask[t]]
    out, next_value, next_advantage = [0.0] * len(rewards), bootstrap, 0.0
    for t in reversed(real):
        goes_on = not dones[t]
        delta = rewards[t] + (gamma * next_value if goes_on else 0.0) - values[t]
        out[t] = delta + (gamma * lam * next_advantage if goes_on else 0.0)
        next_value, next_advantage = values[t], out[t]
    return out


def inputs(tokens, sequences, masked, done):
    rewards, values, bootstrap = torch.randn(tokens), torch.randn(tokens), torch.randn(sequences)
    mask, dones = torch.rand(tokens) >= masked, torch.rand(tokens) < done
    return rewards, values, mask, dones, bootstrap


def expected(lengths, rewards, values, mask, dones, bootstrap, gamma, lam):
    out, start = [], 0
    for s, length in enumerate(lengths):
        span = slice(start, start + length)
        columns = (x[span].double().tolist() for x in (rewards, values))
        out += exact(*columns, gamma, lam, mask[span].tolist(), dones[span].tolist(), bootstrap[s].double().item())
        start += length
    return torch.tensor(out, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 6),
    time=st.integers(1, 80),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    masked=st.floats(0, 1),
    done=st.floats(0, 0.3),
    seed=st.integers(0, 2**31),
)
def test_padded(device, batch, time, gamma, lam, masked, done, seed):
    torch.manual_seed(seed)
    rewards, values, mask, dones, bootstrap = inputs(batch * time, batch, masked, done)
    want = expected([time] * batch, rewards, values, mask, dones, bootstrap, gamma, lam)
    nan = float("nan")
    padded = [x.masked_fill(~mask, nan) for x in (rewards, values)]  # padding may hold anything
    arguments = [x.view(batch, time).to(device) for x in (*padded, mask, dones)]
    advantages, returns = fastppo.gae(
        *arguments[:2], gamma=gamma, lam=lam, mask=arguments[2], dones=arguments[3], bootstrap=bootstrap.to(device),
        backend="triton",
    )  # fmt: skip
    torch.testing.assert_close(advantages.flatten().cpu().double(), want, atol=1e-4, rtol=1e-4)
    want_returns = torch.where(mask, want + values.double(), 0.0)
    torch.testing.assert_close(returns.flatten().cpu().double(), want_returns, atol=1e-4, rtol=1e-4)


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    masked=st.floats(0, 0.5),
    seed=st.integers(0, 2**31),
)
def test_packed(device, lengths, masked, seed):
    torch.manual_seed(seed)
    tokens = sum(lengths)
    rewards, values, mask, dones, bootstrap = inputs(tokens, len(lengths), masked, 0.1)
    want = expected(lengths, rewards, values, mask, dones, bootstrap, 0.97, 0.9)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
    advantages, _ = fastppo.gae(
        rewards.to(device), values.to(device), gamma=0.97, lam=0.9, mask=mask.to(device), dones=dones.to(device),
        bootstrap=bootstrap.to(device), cu_seqlens=cu_seqlens, backend="triton",
    )  # fmt: skip
    torch.testing.assert_close(advantages.cpu().double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_few_long_sequences_are_cut_along_time(device, packed, monkeypatch):
    monkeypatch.setitem(kernels.ELEMENTWISE, "gae", kernels.ELEMENTWISE["gae"]._replace(block=8))
    time = 300
    rewards, values, mask, dones, bootstrap = inputs(2 * time, 2, 0.2, 0.003)
    assert kernels._tiling(2, time, 4)[2] > 1
    want = expected([time] * 2, rewards, values, mask, dones, bootstrap, 1.0, 0.99)
    arguments = [x.to(device) for x in (rewards, values, mask, dones)]
    cu_seqlens = torch.tensor([0, time, 2 * time], device=device) if packed else None
    if not packed:
        arguments = [x.view(2, time) for x in arguments]
    out = kernels.gae(*arguments, bootstrap.to(device), cu_seqlens, 1.0, 0.99, time, with_moments=True)
    torch.testing.assert_close(out.advantages.flatten().cpu().double(), want, atol=2e-4, rtol=2e-4)
    real = want[mask]
    torch.testing.assert_close(out.mean.cpu().double(), real.mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.variance.cpu().double(), real.var(), atol=1e-3, rtol=1e-4)


def test_moments_survive_a_large_common_value(device):
    rewards = 1e4 + torch.randn(3, 50, device=device)
    out = kernels.gae(rewards, torch.zeros_like(rewards), None, None, None, None, 0.0, 0.0, with_moments=True)
    torch.testing.assert_close(out.variance.double(), rewards.double().var(), atol=0, rtol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_whitened_in_one_go(device, packed):
    tokens = 3 * 61
    rewards, values, mask, dones, bootstrap = inputs(tokens, 3, 0.2, 0.05)
    rewards = 50 + rewards
    want = expected([61] * 3, rewards, values, mask, dones, bootstrap, 0.97, 0.9)
    want = torch.where(mask, (want - want[mask].mean()) / (want[mask].var() + 1e-8).sqrt(), 0.0)
    arguments = [x.to(device) if packed else x.view(3, 61).to(device) for x in (rewards, values, mask, dones)]
    options = {"cu_seqlens": torch.tensor([0, 61, 122, 183], device=device)} if packed else {}
    out = fastppo.gae(
        *arguments[:2], gamma=0.97, lam=0.9, mask=arguments[2], dones=arguments[3], bootstrap=bootstrap.to(device),
        whiten=True, backend="triton", **options,
    )  # fmt: skip
    torch.testing.assert_close(out.advantages.flatten().cpu().double(), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("real", [0, 1])
def test_whitening_one_or_no_token_gives_zero(device, real):
    mask = torch.zeros(1, 3, dtype=torch.bool, device=device)
    mask[0, :real] = True
    ones = torch.ones(1, 3, device=device)
    out = fastppo.gae(ones, ones, gamma=1.0, lam=1.0, mask=mask, whiten=True, backend="triton")
    assert torch.equal(out.advantages, torch.zeros_like(ones))


def test_what_a_done_cuts_off_may_be_nan(device):
    dones = torch.zeros(2, 5, dtype=torch.bool, device=device)
    dones[:, -1] = True
    nan = torch.full((2,), float("nan"), device=device)
    out = fastppo.gae(
        torch.ones(2, 5, device=device), torch.ones(2, 5, device=device), gamma=1.0, lam=1.0, dones=dones,
        bootstrap=nan, backend="triton",
    )  # fmt: skip
    assert torch.isfinite(out.advantages).all()


def test_float64_is_refused_by_name(device):
    x = torch.zeros(1, 3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="float64"):
        fastppo.gae(x, x, gamma=1.0, lam=1.0, backend="triton")
