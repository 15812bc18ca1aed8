"""gae against its definition, summed in float64 over the real tokens: every engine, layout and bad input."""

from __future__ import annotations

import contextlib
import functools
import math
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastppo
from fastppo.engines import extension

INSTRUCTION_SETS = extension.load().instruction_sets() if extension.load() else []
ENGINES = ["reference", *INSTRUCTION_SETS]
needs_extension = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the C++ extension is not built")


@contextlib.contextmanager
def engine(name):
    """The `backend` for which gae runs on `name`: the reference, or the extension with that instruction set."""
    if name == "reference":
        yield "reference"
        return
    real = extension._module
    extension._module = types.SimpleNamespace(**vars(real) | {"gae": functools.partial(real.gae, isa=name)})
    try:
        yield "cpu"
    finally:
        extension._module = real


def definition(rewards, values, dones, bootstrap, gamma, lam, tokens=None):
    """A_t = Σ_l (gamma lam)^l delta_{t+l} over one sequence [n] without padding, up to the first token that is done."""
    r, v = rewards.double(), values.double()
    after = torch.cat([v[1:], v.new_full((1,), float(bootstrap))])
    delta = r + gamma * torch.where(dones, 0.0, after) - v
    powers = (gamma * lam) ** torch.arange(len(r), dtype=torch.float64)
    ends = [*(dones.nonzero().flatten() + 1).tolist(), len(r)]
    advantages = []
    for t in range(len(r)) if tokens is None else tokens:
        end = next(e for e in ends if e > t)
        advantages.append((powers[: end - t] * delta[t:end]).sum())
    return torch.stack(advantages)


def expected(rows, gamma, lam):
    """[(rewards, values, mask, dones, bootstrap)] of ragged rows -> the rows' advantages, 0 where masked."""
    out = []
    for r, v, m, d, b in rows:
        advantages = torch.zeros(len(r), dtype=torch.float64)
        if m.any():
            advantages[m] = definition(r[m], v[m], d[m], b, gamma, lam)
        out.append(advantages)
    return out


def random_rows(lengths, *, masked, done, bootstrapped, dtype=torch.float32, seed=0):
    """Ragged rows; padding holds NaN."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        r, v = torch.randn(2, n, generator=g, dtype=torch.float64).mul(3).to(dtype)
        keep = torch.rand((), generator=g)  # rows from empty to full
        m = torch.rand(n, generator=g) < keep if masked else torch.ones(n, dtype=torch.bool)
        d = torch.rand(n, generator=g) < 0.15 if done else torch.zeros(n, dtype=torch.bool)
        b = torch.randn((), generator=g).to(dtype) if bootstrapped else torch.zeros((), dtype=dtype)
        rows.append((r.masked_fill(~m, torch.nan), v.masked_fill(~m, torch.nan), m, d, b))
    return rows


def assert_close(got, exact, rows, dtype):
    """Within a few roundings of the greatest number in the sum; with gamma and lam near 1 they add up along a row."""
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for (_, v, m, _, _), a, ret, e in zip(rows, got.advantages, got.returns, exact, strict=True):
        assert a.dtype == ret.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (a[~m] == 0).all()
        assert (ret[~m] == 0).all()
        if m.any():
            real = v[m].double()
            slack = eps * (8 + m.sum() ** 0.5) * (real.abs().max() + e.abs().max() + 10)
            assert (a[m].double() - e[m]).abs().max() <= slack
            assert (ret[m].double() - e[m] - real).abs().max() <= slack


def padded_call(rows, gamma, lam, backend, *, left=False):
    """The rows as [B, T] with NaN around them, and the results cut back to the rows."""
    width = max((len(row[0]) for row in rows), default=0)
    dtype = rows[0][0].dtype
    r, v = torch.full((2, len(rows), width), torch.nan, dtype=dtype)
    m, d = torch.zeros(2, len(rows), width, dtype=torch.bool)
    cuts = []
    for i, row in enumerate(rows):
        n = len(row[0])
        cut = slice(width - n, width) if left else slice(0, n)
        r[i, cut], v[i, cut], m[i, cut], d[i, cut] = row[:4]
        cuts.append((i, cut))
    bootstrap = torch.stack([row[4] for row in rows])
    out = fastppo.gae(r, v, gamma=gamma, lam=lam, mask=m, dones=d, bootstrap=bootstrap, backend=backend)
    return fastppo.GAEOutput([out.advantages[c] for c in cuts], [out.returns[c] for c in cuts])


def packed_call(rows, gamma, lam, backend, *, masked, done, bootstrapped, index_dtype=torch.int32):
    lengths = [len(row[0]) for row in rows]
    out = fastppo.gae(
        torch.cat([row[0] for row in rows]),
        torch.cat([row[1] for row in rows]),
        gamma=gamma,
        lam=lam,
        mask=torch.cat([row[2] for row in rows]) if masked else None,
        dones=torch.cat([row[3] for row in rows]) if done else None,
        bootstrap=torch.stack([row[4] for row in rows]) if bootstrapped else None,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(index_dtype),
        backend=backend,
    )
    return fastppo.GAEOutput(out.advantages.split(lengths), out.returns.split(lengths))


FACTORS = st.one_of(st.sampled_from([0.0, 1.0, 0.99, 0.95]), st.floats(0, 1))


@pytest.mark.parametrize("name", ENGINES)
@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=6),
    masked=st.booleans(),
    done=st.booleans(),
    bootstrapped=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    gamma=FACTORS,
    lam=FACTORS,
    left=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_matches_the_definition(name, lengths, masked, done, bootstrapped, dtype, index_dtype, gamma, lam, left, seed):
    flags = {"masked": masked, "done": done, "bootstrapped": bootstrapped}
    rows = random_rows(lengths, **flags, dtype=dtype, seed=seed)
    exact = expected(rows, gamma, lam)
    with engine(name) as backend:
        assert_close(padded_call(rows, gamma, lam, backend, left=left), exact, rows, dtype)
        packed = packed_call(rows, gamma, lam, backend, **flags, index_dtype=index_dtype)
        assert_close(packed, exact, rows, dtype)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_is_as_accurate_as_the_naive_loop(name):
    rows = random_rows([200] * 20, masked=True, done=True, bootstrapped=True, seed=int(torch.randint(2**31, ())))
    exact = expected(rows, 0.99, 0.95)

    def error(backend):
        got = padded_call(rows, 0.99, 0.95, backend).advantages
        return max((a.double() - e).abs().max() for a, e in zip(got, exact, strict=True))

    with engine(name) as backend:
        assert error(backend) <= 1.5 * error("reference") + 1e-7


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("shape", [(0, 7), (5, 0), (0, 0), (3, 1), (1, 1)])
def test_small_and_empty(name, shape):
    r, v = torch.randn(2, *shape)
    with engine(name) as backend:
        out = fastppo.gae(r, v, gamma=0.9, lam=0.8, backend=backend)
        none = fastppo.gae(r, v, gamma=0.9, lam=0.8, mask=torch.zeros(shape), backend=backend)
        packed = fastppo.gae(r[:, :0].flatten(), v[:, :0].flatten(), gamma=1, lam=1, cu_seqlens=torch.tensor([0]))
    assert out.advantages.shape == out.returns.shape == shape
    torch.testing.assert_close(out.advantages, r - v)
    torch.testing.assert_close(out.returns, r)
    assert not none.advantages.any()
    assert not none.returns.any()
    assert packed.advantages.shape == (0,)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize(("batch", "time"), [(1, 1_000_000), (5, 1_000_003)])  # the second is written past the cache
def test_long_sequences(name, batch, time):
    r, v = torch.randn(2, batch, time)
    with engine(name) as backend:
        got = fastppo.gae(r, v, gamma=0.99, lam=0.95, bootstrap=v[:, 0], backend=backend)
        total = fastppo.gae(r, v, gamma=1, lam=1, backend=backend)
    going_on = torch.zeros(1500, dtype=torch.bool)
    for t in [0, 1, 17, time // 2, time - 1500, time - 20, time - 1]:
        row, start = t % batch, min(t, time - 1500)  # 0.9405^1500 is 1e-40
        window = slice(start, start + 1500)
        after = v[row, start + 1500] if start + 1500 < time else v[row, 0]
        exact = definition(r[row, window], v[row, window], going_on, after, 0.99, 0.95, [t - start])[0]
        assert abs(got.advantages[row, t] - exact) < 2e-5

    # Undiscounted: the plain sum of rewards less the value. The roundings of a float32 loop's partial sums add up to a
    # random walk, whose standard deviation at its end is at most this.
    exact = r.double().flip(1).cumsum(1).flip(1) - v
    deviation = torch.finfo(torch.float32).eps / math.sqrt(12) * exact.norm(dim=1, keepdim=True)
    assert ((total.advantages - exact).abs() <= 6 * deviation).all()
    torch.testing.assert_close(total.returns, total.advantages + v)


@needs_extension
def test_same_bits_whatever_the_threads():
    lengths = torch.randint(0, 3000, (250,)).tolist()  # several parts' worth of tokens
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    r, v = torch.randn(2, int(cu_seqlens[-1]))
    options = {"mask": torch.rand(r.shape) < 0.8, "dones": torch.rand(r.shape) < 0.05}

    def run(sign):  # negative inputs give the negative results, and no memory handed out twice holds the right ones
        out = fastppo.gae(sign * r, sign * v, **options, gamma=0.99, lam=0.95, cu_seqlens=cu_seqlens, backend="cpu")
        return sign * torch.stack(out)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(1)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for _ in range(5):
                assert torch.equal(run(-1), one)
                assert torch.equal(run(1), one)
        with ThreadPoolExecutor(4) as callers:  # one pool of helpers, several callers
            assert all(torch.equal(one, other) for other in callers.map(run, [1, -1] * 20))
    finally:
        torch.set_num_threads(before)


FORK = """
import os, torch, fastppo
def threads():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(4)
r, v = torch.randn(2, 64, 8192)
minus_r, minus_v = -r, -v
before = fastppo.gae(r, v, gamma=0.99, lam=0.95, backend="cpu")
child = os.fork()
if child == 0:
    alone = threads()
    after = fastppo.gae(minus_r, minus_v, gamma=0.99, lam=0.95, backend="cpu")
    assert threads() == alone + 3  # helpers of its own
    torch.set_num_threads(1)  # PyTorch's own threads do not survive a fork
    os._exit(not torch.equal(before.advantages, -after.advantages))
raise SystemExit(os.waitpid(child, 0)[1])
"""


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_works_in_a_forked_child():
    env_path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FORK], env=env_path, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ENGINES)
def test_strides_mixed_dtypes_and_gradients(name):
    r = torch.randn(40, 9, dtype=torch.bfloat16).T[:, ::2].requires_grad_()
    v = torch.randn(9, 40, dtype=torch.float64)[:, :20].requires_grad_()
    mask = (torch.rand(20, 9) < 0.7).T
    bootstrap = torch.randn(18)[::2]
    kept = [x.clone() for x in (r, v, mask, bootstrap)]
    with engine(name) as backend:
        out = fastppo.gae(r, v, gamma=0.9, lam=0.9, mask=mask.int(), bootstrap=bootstrap, backend=backend)
    no_done = torch.zeros(20, dtype=torch.bool)
    rows = [(r[i].double(), v[i], mask[i], no_done, bootstrap[i]) for i in range(9)]
    exact = torch.stack(expected(rows, 0.9, 0.9))
    assert out.advantages.dtype == torch.float64
    torch.testing.assert_close(out.advantages, exact.detach())
    assert not out.advantages.requires_grad
    assert not out.returns.requires_grad
    assert all(map(torch.equal, kept, (r, v, mask, bootstrap)))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("packed", [False, True])
def test_whitened_in_one_go(name, packed):
    rewards, values, mask = torch.randn(3, 4, 29)
    rewards, mask = 100 + 5 * rewards, mask > -0.5
    options = {"gamma": 0.97, "lam": 0.9, "mask": mask}
    if packed:
        rewards, values = rewards.flatten(), values.flatten()
        options |= {"mask": mask.flatten(), "cu_seqlens": torch.tensor([0, 29, 29, 80, 116])}
    with engine(name) as backend:
        plain = fastppo.gae(rewards, values, backend=backend, **options)
        whitened = fastppo.gae(rewards, values, backend=backend, whiten=True, **options)
    real = plain.advantages.double()[options["mask"]]
    want = (real - real.mean()) / (real.var() + 1e-8).sqrt()
    torch.testing.assert_close(whitened.advantages.double()[options["mask"]], want, atol=1e-5, rtol=1e-5)
    assert whitened.advantages[~options["mask"]].abs().sum() == 0
    assert torch.equal(whitened.returns, plain.returns)
    again = fastppo.whiten(plain.advantages, mask=options["mask"])
    torch.testing.assert_close(whitened.advantages, again, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_whitening_one_or_no_token_gives_zero(name):
    one = torch.tensor([[False, True, False]])
    for mask in (one, torch.zeros_like(one)):
        with engine(name) as backend:
            out = fastppo.gae(
                torch.ones(1, 3), torch.zeros(1, 3), gamma=1.0, lam=1.0, mask=mask, whiten=True, backend=backend
            )
        assert torch.equal(out.advantages, torch.zeros(1, 3))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_whitening_the_largest_numbers(backend):
    """Their squares and their sum overflow float32."""
    signs = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 0.0]])
    mask = signs != 0
    out = fastppo.gae(3e38 * signs, torch.zeros(2, 3), gamma=0.0, lam=1.0, mask=mask, whiten=True, backend=backend)
    torch.testing.assert_close(out.advantages, fastppo.whiten(signs, mask=mask))


@pytest.mark.parametrize("name", ENGINES)
def test_value_beyond_a_done_token_is_ignored(name):
    r, v = torch.randn(2, 2, 21)
    dones = torch.zeros(2, 21, dtype=torch.bool)
    dones[:, [6, 20]] = True
    bootstrap = torch.tensor([torch.nan, torch.inf])  # never used: the last token is done
    with engine(name) as backend:
        whole = fastppo.gae(r, v, gamma=0.9, lam=0.9, dones=dones, bootstrap=bootstrap, backend=backend)
        first = fastppo.gae(r[:, :7], v[:, :7], gamma=0.9, lam=0.9, backend=backend)
        second = fastppo.gae(r[:, 7:], v[:, 7:], gamma=0.9, lam=0.9, backend=backend)
    torch.testing.assert_close(whole.advantages, torch.cat([first.advantages, second.advantages], 1))
    torch.testing.assert_close(whole.returns, torch.cat([first.returns, second.returns], 1))


@pytest.mark.parametrize("name", ENGINES)
def test_compiles_whole(name):
    r, v = torch.randn(2, 3, 33)
    mask, dones = torch.rand(2, 3, 33) < 0.5
    with engine(name) as backend:

        def step(r, v):
            out = fastppo.gae(r * 2, v, gamma=0.9, lam=0.9, mask=mask, dones=dones, backend=backend)
            return out.advantages + out.returns

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(r, v), step(r, v))
        torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_operator_is_declared_as_it_behaves(dtype):
    r, v = torch.randn(2, 3, 33).to(dtype)
    torch.library.opcheck(torch.ops.fastppo.gae, (r, v, r > 0, None, r[:, 0], None, 0.9, 0.9, True, None))
    torch.library.opcheck(torch.ops.fastppo.gae, (r[:, :0], v[:, :0], None, None, None, None, 0.9, 0.9, False, None))


R = torch.zeros(2, 5)
PACKED = torch.zeros(5)


def poisoned(value, where, like=R):
    x = like.clone()
    x[where] = value
    return x


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((R.tolist(), R), {}, TypeError, "rewards"),
        ((R, None), {}, TypeError, "values"),
        ((R.int(), R), {}, TypeError, "rewards"),
        ((R, R.bool()), {}, TypeError, "values"),
        ((R, R[:, :4]), {}, ValueError, "values"),
        ((R, R.to("meta")), {}, ValueError, "values"),
        ((R[0], R[0]), {}, ValueError, "rewards"),
        ((R[None], R[None]), {}, ValueError, "rewards"),
        ((R, R), {"gamma": 1.01}, ValueError, "gamma"),
        ((R, R), {"gamma": float("nan")}, ValueError, "gamma"),
        ((R, R), {"lam": -0.1}, ValueError, "lam"),
        ((R, R), {"mask": R[:1].bool()}, ValueError, "mask"),
        ((R, R), {"mask": [True]}, TypeError, "mask"),
        ((R, R), {"dones": R.T.bool()}, ValueError, "dones"),
        ((R, R), {"bootstrap": R[0]}, ValueError, "bootstrap"),
        ((R, R), {"bootstrap": torch.zeros(2, dtype=torch.long)}, TypeError, "bootstrap"),
        ((R, R), {"bootstrap": 0.0}, TypeError, "bootstrap"),
        ((R, R), {"backend": "triton"}, ValueError, "backend"),
        ((R, R), {"backend": "fastest"}, ValueError, "backend"),
        ((R, R), {"cu_seqlens": torch.tensor([0, 10])}, ValueError, "rewards"),
        ((PACKED, PACKED), {"cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens"),
        ((PACKED, PACKED), {"cu_seqlens": torch.tensor([1, 5])}, ValueError, "cu_seqlens"),
        ((PACKED, PACKED), {"cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens"),
        ((PACKED, PACKED), {"cu_seqlens": torch.tensor([0, 4, 2, 5])}, ValueError, "cu_seqlens"),
        ((PACKED, PACKED), {"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, "cu_seqlens"),
        ((PACKED, PACKED), {"cu_seqlens": torch.tensor([], dtype=torch.long)}, ValueError, "cu_seqlens"),
        ((PACKED, PACKED), {"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens"),
        ((PACKED, PACKED), {"cu_seqlens": [0, 5]}, TypeError, "cu_seqlens"),
        ((PACKED, PACKED), {"cu_seqlens": torch.tensor([0, 2, 5]), "bootstrap": torch.zeros(1)}, ValueError, "boot"),
    ],
)
def test_bad_input_is_refused_by_name(args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        fastppo.gae(*args, **{"gamma": 0.9, "lam": 0.9, **options})


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 1, 15, 16, 31, 36])
def test_what_is_not_finite_is_refused_where_it_counts(name, value, at):
    r, v = torch.randn(2, 3, 37)
    mask = torch.rand(3, 37) < 0.7
    dones = torch.rand(3, 37) < 0.2
    mask[1, at] = True
    bad = {"rewards": poisoned(value, (1, at), r), "values": poisoned(value, (1, at), v)}
    with engine(name) as backend:
        for argument, tensor in bad.items():
            inputs = {"rewards": r, "values": v, argument: tensor}
            for options in ({}, {"mask": mask}, {"dones": dones}, {"mask": mask, "dones": dones}):
                with pytest.raises(ValueError, match=rf"^{argument}: .* at \(1, {at}\)"):
                    fastppo.gae(**inputs, **options, gamma=0.9, lam=0.9, backend=backend)
            without = mask.clone()
            without[1, at] = False
            fastppo.gae(**inputs, mask=without, gamma=0.9, lam=0.9, backend=backend)
        with pytest.raises(ValueError, match=r"^bootstrap: .* at \(1,\)"):
            fastppo.gae(r, v, gamma=0.9, lam=0.9, bootstrap=poisoned(value, 1, r[:, 0]), backend=backend)
        with pytest.raises(ValueError, match="overflow"):
            fastppo.gae(torch.full((1, 40), 3e38), torch.zeros(1, 40), gamma=1, lam=1, backend=backend)


def test_agrees_with_torchrl():
    """Another library's, on what it has: no padding, episodes that end within a row and ones that go on after it."""
    pytest.importorskip("torchrl", reason="torchrl, the peer to compare with, is not installed")
    from torchrl.objectives.value.functional import generalized_advantage_estimate

    rewards, values = (torch.randn(5, 13, dtype=torch.float64) for _ in range(2))
    dones, bootstrap = torch.rand(5, 13) < 0.2, torch.randn(5, dtype=torch.float64)
    following = torch.cat([values[:, 1:], bootstrap[:, None]], dim=1)
    columns = (x[..., None] for x in (values, following, rewards, dones))
    # It rounds γ and λ to float32, so they are numbers that this leaves as they are.
    theirs = generalized_advantage_estimate(0.875, 0.75, *columns)
    ours = fastppo.gae(rewards, values, gamma=0.875, lam=0.75, dones=dones, bootstrap=bootstrap)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other[..., 0], atol=1e-12, rtol=1e-12)
