"""The two tilings of the loss: which one is chosen, and that both give the loss of the float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch
from fastppo_kernels import linear
from fastppo_kernels.configs import Ceilings
from fastppo_kernels.tiling import Problem, choose, cut, kept_bytes, tile_of_columns
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo
from fastppo.ops import triton_engine

CHIP = Ceilings(flops_per_s=1e15, bytes_per_s=3e12)
LLAMA = Problem(rows=8192, vocab=128_256, dim=4096, itemsize=2, weight_itemsize=2)
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
    problem = LLAMA._replace(rows=32_768, weight_itemsize=4)
    copy = 2 * LLAMA.vocab * LLAMA.dim  # of the weight, in the products' dtype
    assert not choose(problem, copy + kept_bytes(256, LLAMA.vocab, 2), CHIP).whole
    assert choose(problem, copy + kept_bytes(16_384, LLAMA.vocab, 2), CHIP).whole


def test_more_bandwidth_favors_small_chunks_and_less_favors_tiles():
    problem = LLAMA._replace(rows=32_768, weight_itemsize=4)
    wide = choose(problem, 3 * GIB, CHIP._replace(bytes_per_s=1e15))
    narrow = choose(problem, 3 * GIB, CHIP._replace(bytes_per_s=1e11))
    assert wide.whole
    assert not narrow.whole


def test_a_sequence_that_does_not_fit_goes_by_tiles_of_the_vocabulary():
    budget = kept_bytes(1024, LLAMA.vocab, 2) + 4 * LLAMA.vocab * LLAMA.dim
    fast, problem = CHIP._replace(bytes_per_s=1e15), LLAMA._replace(rows=32_768)
    assert choose(problem._replace(unit=512), budget, fast).whole
    assert not choose(problem._replace(unit=2048), budget, fast).whole


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
    problem = Problem(rows, vocab, dim, itemsize, weight_itemsize, unit)
    tiling = choose(problem, budget, CHIP)
    assert 1 <= tiling.rows <= rows
    assert tiling.seconds > 0
    if tiling.whole:
        summed = 4 * vocab * dim if tiling.rows < rows and weight_itemsize != 4 else 0
        assert kept_bytes(tiling.rows, vocab, itemsize) + summed <= budget
        assert tiling.rows >= min(unit, rows)
    else:
        assert (tiling.rows, tiling.columns) == tile_of_columns(rows, vocab, dim, itemsize, budget)


@settings(max_examples=200, deadline=None)
@given(real=st.lists(st.integers(0, 9), max_size=30), most=st.integers(9, 30))
def test_chunks_are_consecutive_and_within_the_limit(real, most):
    spans = cut(real, most)
    assert [first for first, _ in spans[1:]] == [last for _, last in spans[:-1]]
    assert (spans[0][0], spans[-1][1]) == (0, len(real)) if real else spans == []
    assert all(sum(real[first:last]) <= most for first, last in spans)


def test_a_unit_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match="11"):
        cut([3, 11], 10)


def inputs(b, t, d, v, device, *, dtype=torch.float32, masked=0.3):
    hidden = torch.randn(b, t, d, device=device).to(dtype)
    weight = (torch.randn(v, d, device=device) / math.sqrt(d)).to(dtype)
    bias = torch.randn(v, device=device).to(dtype)
    targets = torch.randint(0, v, (b, t), device=device)
    old = fastppo.linear_logprob(hidden, weight, targets, bias=bias, backend="reference").logprobs
    old = old + 0.3 * torch.randn(b, t, device=device)
    return (
        hidden,
        weight,
        bias,
        targets,
        old,
        torch.randn(b, t, device=device),
        torch.rand(b, t, device=device) >= masked,
    )


def loss(x, backend, dtype=None, **options):
    """(loss, logprobs, entropy, ∂hidden, ∂weight, ∂bias) in float64."""
    *head, targets, old, advantages, mask = x
    h, w, b = (y.detach().to(dtype or y.dtype).clone().requires_grad_() for y in head)
    out = fastppo.linear_ppo_loss(
        h, w, targets, old.to(dtype or old.dtype), advantages, mask=mask, bias=b, backend=backend, **options
    )
    (2.0 * out.loss).backward()
    return [y.detach().double() for y in (out.loss, out.logprobs, out.entropy, h.grad, w.grad, b.grad)]


def assert_close(got, want, tolerance):
    """Relative to the greatest entry: a sequence's ratio can be in the hundreds, and scales every error."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1.0, b.abs().max().item()), rtol=tolerance)


OPTIONS = [
    {},
    {"entropy_coef": 0.03, "clip_low": 0.1, "dual_clip": 1.5},
    {"entropy_coef": 0.02, "softcap": 3.0, "logit_scale": 2.0, "temperature": 0.7},
    {"ratio_level": "sequence-geometric", "loss_agg": "seq-mean-token-mean", "clip_low": 0.02, "clip_high": 0.03},
    {"ratio_level": "sequence", "entropy_coef": 0.01, "loss_agg": "seq-mean-token-sum"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunks", [1, 3])
def test_chunks_of_rows_give_the_exact_loss(device, options, chunks, monkeypatch):
    x = inputs(6, 12, 13, 99, device)
    calls = by_rows(monkeypatch, 72 if chunks == 1 else 20)
    got, want = loss(x, "triton", **options), loss(x, "reference", torch.float64, **options)
    assert calls
    assert_close(got, want, 5e-5)


@settings(max_examples=10, deadline=None)
@given(
    b=st.integers(1, 5),
    t=st.integers(1, 40),
    d=st.integers(1, 40),
    v=st.integers(1, 150),
    masked=st.floats(0, 1),
    options=st.sampled_from(OPTIONS),
    seed=st.integers(0, 2**31),
)
def test_chunks_of_rows_at_any_shape(device, b, t, d, v, masked, options, seed):
    torch.manual_seed(seed)
    x = inputs(b, t, d, v, device, masked=masked)
    with pytest.MonkeyPatch.context() as patch:
        by_rows(patch, max(t, 16))
        got = loss(x, "triton", **options)
    assert_close(got, loss(x, "reference", torch.float64, **options), 1e-4)


def by_rows(patch, rows):
    """Have the loss computed by chunks of at most `rows` rows, whatever the cost model thinks; returns its calls."""
    patch.setattr(linear, "ROW_MULTIPLE", 16)
    original, calls = linear.choose_tiling, []

    def forced(*arguments):
        calls.append(arguments)
        return original(*arguments)._replace(whole=True, rows=rows)

    patch.setattr(linear, "choose_tiling", forced)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_stays_within_the_naive_error(device, dtype, monkeypatch):
    x = inputs(3, 20, 48, 207, device, dtype=dtype)
    by_rows(monkeypatch, 20)
    options = {"entropy_coef": 0.05}
    exact = loss(x, "reference", torch.float64, **options)
    slack = {torch.bfloat16: 0.01, torch.float16: 0.002}[dtype]
    for fused, naive, want in zip(loss(x, "triton", **options), loss(x, "reference", **options), exact, strict=True):
        assert (fused - want).abs().max() <= 1.5 * (naive - want).abs().max() + slack * want.abs().max()


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16])
def test_rounded_exponentials_cost_no_more_than_a_rounded_gradient(device, storage):
    """The kernel alone, on exponentials in 16 bits: an error of about one rounding of ∂z, and none in the target's."""
    from fastppo_kernels.compact_rows import compact_rows
    from fastppo_kernels.kept_gradient import kept_gradient
    from fastppo_kernels.linear_statistics import Kept

    n, v, tile = 21, 150, 32
    z = 4 * torch.randn(n, v, dtype=torch.float64)
    targets = torch.randint(0, v, (n,))
    log_p = torch.log_softmax(z, 1)
    p, row_max = log_p.exp(), z.max(1).values
    entropy = -(p * log_p).sum(1)
    g, e = torch.randn(2, n, dtype=torch.float64)
    want = p * (-g.unsqueeze(1) - e.unsqueeze(1) * (log_p + entropy.unsqueeze(1)))
    want[torch.arange(n), targets] += g
    # The running maximum of the columns up to and with each tile, as the statistics have it at that moment.
    so_far = torch.stack([z[:, : (k + 1) * tile].max(1).values for k in range(-(-v // tile))])
    kept = torch.zeros(n, 160)
    kept[:, :v] = (z - so_far.repeat_interleave(tile, 0)[:v].T).exp()
    statistics = torch.stack([log_p[torch.arange(n), targets], entropy, row_max, torch.logsumexp(z, 1) - row_max])
    on_device = [y.float().to(device) for y in (statistics, g, e)]
    rows, count = compact_rows(targets.to(device))
    rounded = Kept(kept.to(device, storage), so_far.T.contiguous().float().to(device), tile)
    dz = kept_gradient(
        rounded, rows, count, targets.to(device), *on_device,
        num_rows=n, vocab=v, inner=1.0, outer=1.0, softcap=False, scale=None,
    )  # fmt: skip
    error = (dz.double().cpu() - want).abs()
    size = p * (g.abs() + e.abs() * (1 + entropy)).unsqueeze(1) + want.abs()
    assert (error <= 2.5 * torch.finfo(storage).eps * size + 1e-6).all()


def test_the_operator_keeps_its_contract(device):
    hidden, weight, bias, targets, old, advantages, mask = inputs(2, 9, 6, 40, device)
    rows = targets.masked_fill(~mask, -100).flatten()
    ppo = (0.2, 0.2, None, "token", 0.0, "k1", 0.01, "token-mean")
    for budget in (1, 2**25):
        torch.library.opcheck(
            triton_engine.loss_with_gradients,
            (
                hidden.flatten(0, 1), weight, bias, rows, None, None, None, "", mask, old, advantages, None, *ppo,
                1.0, 1.0, None, torch.float32, budget, True, True, True,
            ),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


def test_same_bits_every_time(device, monkeypatch):
    x = inputs(3, 15, 12, 70, device)
    by_rows(monkeypatch, 16)
    runs = [loss(x, "triton", entropy_coef=0.01) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_real_token_gives_zeros(device, monkeypatch):
    *rest, mask = inputs(2, 5, 6, 30, device)
    by_rows(monkeypatch, 16)
    assert all(y.abs().max() == 0 for y in loss((*rest, torch.zeros_like(mask)), "triton"))
