"""GAE on the Triton kernels against its definition, a token at a time in float64."""

from __future__ import annotations

import contextlib

import host_waits
import pytest
import torch
from fastppo_kernels import gae as kernels
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Small blocks cross rows and chunks as large ones do, in a fraction of the interpreter's time.
TILINGS = {
    "as shipped": {},
    "whole rows": {"block": 16, "MIN_ROWS": 1},
    "whole rows, many a program": {"block": 16, "MIN_ROWS": 1, "PROGRAMS": 2},
    "equal spans": {"block": 16, "MIN_ROWS": 10**9, "MAX_BLOCKS": 0},
    "equal spans of many blocks": {"block": 8, "MIN_ROWS": 10**9, "MAX_BLOCKS": 0, "SPANS": 3},
}


@contextlib.contextmanager
def tiling(block=None, **constants):
    with pytest.MonkeyPatch.context() as patch:
        if block is not None:
            for name in ("gae", "gae_long"):
                patch.setitem(kernels.ELEMENTWISE, name, kernels.ELEMENTWISE[name]._replace(block=block))
        for name, value in constants.items():
            patch.setattr(kernels, name, value)
        yield


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


def inputs(tokens, sequences, masked, done, dtype=torch.float32):
    rewards, values, bootstrap = (torch.randn(n).to(dtype) for n in (tokens, tokens, sequences))
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


def offsets(lengths, device, dtype=torch.int64):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, dtype)


def check(got, want, values, mask, tolerance=1e-4):
    advantages, returns = (x.flatten().cpu() for x in got)
    assert advantages.dtype == returns.dtype == torch.float32
    torch.testing.assert_close(advantages.double(), want, atol=tolerance, rtol=tolerance)
    want_returns = torch.where(mask, want + values.double(), 0.0)
    torch.testing.assert_close(returns.double(), want_returns, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", TILINGS)
@settings(max_examples=5, deadline=None)
@given(
    batch=st.integers(1, 6),
    time=st.integers(1, 80),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
    masked=st.floats(0, 1),
    done=st.floats(0, 0.3),
    dtype=st.sampled_from(DTYPES),
    value_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_padded(device, name, batch, time, gamma, lam, masked, done, dtype, value_dtype, seed):
    torch.manual_seed(seed)
    rewards, values, mask, dones, bootstrap = inputs(batch * time, batch, masked, done, dtype)
    values = values.to(value_dtype)
    want = expected([time] * batch, rewards, values, mask, dones, bootstrap, gamma, lam)
    padded = [x.masked_fill(~mask, float("nan")) for x in (rewards, values)]  # padding may hold anything
    arguments = [x.view(batch, time).to(device) for x in (*padded, mask, dones)]
    with tiling(**TILINGS[name]):
        out = fastppo.gae(
            *arguments[:2], gamma=gamma, lam=lam, mask=arguments[2], dones=arguments[3],
            bootstrap=bootstrap.to(device), backend="triton",
        )  # fmt: skip
    check(out, want, values, mask)


@pytest.mark.parametrize("name", TILINGS)
@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40) | st.just(0), min_size=1, max_size=9),
    masked=st.floats(0, 0.5),
    dtype=st.sampled_from(DTYPES),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 2**31),
)
def test_packed(device, name, lengths, masked, dtype, index_dtype, seed):
    torch.manual_seed(seed)
    rewards, values, mask, dones, bootstrap = inputs(sum(lengths), len(lengths), masked, 0.1, dtype)
    want = expected(lengths, rewards, values, mask, dones, bootstrap, 0.97, 0.9)
    cu_seqlens = offsets(lengths, device, index_dtype)
    tensors = [x.to(device) for x in (rewards, values, mask, dones, bootstrap)]
    with tiling(**TILINGS[name]):
        out = fastppo.gae(
            *tensors[:2], gamma=0.97, lam=0.9, mask=tensors[2], dones=tensors[3], bootstrap=tensors[4],
            cu_seqlens=cu_seqlens, backend="triton",
        )  # fmt: skip
    check(out, want, values, mask)


@pytest.mark.parametrize("flags", [{}, {"mask"}, {"dones"}, {"bootstrap"}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["whole rows", "equal spans"])
def test_whatever_is_left_out(device, name, packed, flags):
    rewards, values, mask, dones, bootstrap = inputs(5 * 37, 5, 0.3, 0.1)
    given = {"mask": mask, "dones": dones, "bootstrap": bootstrap}
    mask = mask if "mask" in flags else torch.ones_like(mask)
    dones = dones if "dones" in flags else torch.zeros_like(dones)
    want = expected(
        [37] * 5, rewards, values, mask, dones, bootstrap if "bootstrap" in flags else 0 * bootstrap, 0.9, 0.8
    )
    options = {k: x if packed or k == "bootstrap" else x.view(5, 37) for k, x in given.items() if k in flags}
    shape = (185,) if packed else (5, 37)
    if packed:
        options["cu_seqlens"] = offsets([37] * 5, "cpu")
    with tiling(**TILINGS[name]):
        out = fastppo.gae(
            rewards.view(shape).to(device), values.view(shape).to(device), gamma=0.9, lam=0.8, backend="triton",
            **{k: x.to(device) for k, x in options.items()},
        )  # fmt: skip
    check(out, want, values, mask)


@pytest.mark.parametrize("cut", [False, True])
def test_a_long_sequence_whose_state_comes_from_afar(device, cut):
    """More spans than a program looks at together, and no end of a sequence between."""
    rewards, values, mask, dones, bootstrap = inputs(300, 2, 0.0, 0.0)
    lengths = [150, 150] if cut else [300, 0]
    want = expected(lengths, rewards, values, mask, dones, bootstrap, 1.0, 1.0)
    with tiling(block=16, PIECE=4):
        out = kernels.gae(
            rewards.to(device), values.to(device), None, None, bootstrap.to(device), offsets(lengths, device), 1.0, 1.0
        )
    check(out, want, values, mask, tolerance=2e-4)


@pytest.mark.parametrize("name", TILINGS)
@pytest.mark.parametrize("packed", [False, True])
def test_whitened_in_one_go(device, name, packed):
    rewards, values, mask, dones, bootstrap = inputs(3 * 61, 3, 0.2, 0.05)
    rewards = 50 + rewards
    want = expected([61] * 3, rewards, values, mask, dones, bootstrap, 0.97, 0.9)
    want = torch.where(mask, (want - want[mask].mean()) / (want[mask].var() + 1e-8).sqrt(), 0.0)
    arguments = [x.to(device) if packed else x.view(3, 61).to(device) for x in (rewards, values, mask, dones)]
    options = {"cu_seqlens": offsets([61] * 3, device)} if packed else {}
    with tiling(**TILINGS[name]):
        out = fastppo.gae(
            *arguments[:2], gamma=0.97, lam=0.9, mask=arguments[2], dones=arguments[3], bootstrap=bootstrap.to(device),
            whiten=True, backend="triton", **options,
        )  # fmt: skip
    torch.testing.assert_close(out.advantages.flatten().cpu().double(), want, atol=1e-4, rtol=1e-4)


def test_whitening_survives_a_large_common_value(device):
    rewards = 1e4 + torch.randn(3, 50)
    with tiling(block=16):
        out = fastppo.gae(
            rewards.to(device), torch.zeros(3, 50, device=device), gamma=0, lam=0, whiten=True, backend="triton"
        )
    want = (rewards.double() - rewards.double().mean()) / rewards.double().std()
    torch.testing.assert_close(out.advantages.cpu().double(), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("real", [0, 1])
def test_whitening_one_or_no_token_gives_zero(device, real):
    mask = torch.zeros(1, 3, dtype=torch.bool, device=device)
    mask[0, :real] = True
    ones = torch.ones(1, 3, device=device)
    out = fastppo.gae(ones, ones, gamma=1.0, lam=1.0, mask=mask, whiten=True, backend="triton")
    assert torch.equal(out.advantages, torch.zeros_like(ones))


@pytest.mark.parametrize("padding", [0, 2])
def test_what_a_done_cuts_off_may_be_nan(device, padding):
    dones = torch.zeros(2, 5 + padding, dtype=torch.bool, device=device)
    dones[:, 4] = True
    ones = torch.ones(2, 5 + padding, device=device)
    mask = torch.arange(5 + padding, device=device) < 5
    nan = torch.full((2,), float("nan"), device=device)
    out = fastppo.gae(
        ones, ones, gamma=1.0, lam=1.0, mask=mask.expand(2, -1), dones=dones, bootstrap=nan, backend="triton"
    )
    assert torch.isfinite(out.advantages).all()


@pytest.mark.parametrize("name", ["whole rows", "equal spans of many blocks"])
def test_nan_stays_in_its_own_sequence(device, name):
    """A GPU does not look for it at the door, so one bad row must not spoil the others in its block."""
    rewards, values, mask, dones, bootstrap = inputs(5 * 11, 5, 0.0, 0.0)
    want = expected([11] * 5, rewards, values, mask, dones, bootstrap, 0.9, 0.8).view(5, 11)
    rewards = rewards.view(5, 11).clone()
    rewards[2, 6] = float("nan")
    with tiling(**TILINGS[name]):
        advantages, _ = kernels.gae(
            rewards.to(device), values.view(5, 11).to(device), None, None, bootstrap.to(device), None, 0.9, 0.8
        )
    bad = torch.zeros(5, 11, dtype=torch.bool)
    bad[2, :7] = True
    assert torch.equal(advantages.isnan().cpu(), bad)
    torch.testing.assert_close(advantages.cpu().double()[~bad], want[~bad], atol=1e-4, rtol=1e-4)


def test_float64_is_refused_by_name(device):
    x = torch.zeros(1, 3, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="float64"):
        fastppo.gae(x, x, gamma=1.0, lam=1.0, backend="triton")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
def test_the_host_never_waits(device, packed, whiten):
    tensors = [x.to(device) for x in inputs(6 * 700, 6, 0.2, 0.1, torch.bfloat16)]
    rewards, values, mask, dones = tensors[:4] if packed else [x.view(6, 700) for x in tensors[:4]]
    options = {"cu_seqlens": offsets([700] * 6, device)} if packed else {}

    def run():
        fastppo.gae(
            rewards, values, gamma=0.9, lam=0.8, mask=mask, dones=dones, bootstrap=tensors[4], whiten=whiten,
            backend="triton", **options,
        )  # fmt: skip

    if device.type == "cuda":
        run()  # compiles
    with host_waits.no_host_waits(device):
        run()
