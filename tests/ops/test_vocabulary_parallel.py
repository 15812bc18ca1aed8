"""A vocabulary spread over two processes against the float64 oracle that has it whole; sharded (DTensor) weights.

Both processes run every case in one go, since starting them is what takes time; a test then reads how its case ended.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import traceback
from datetime import timedelta

import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import fastppo
from fastppo.engines import extension
from fastppo.ops import vocabulary_parallel

RANKS = 2
SPLIT = (70, 43)  # a ragged cut of the vocabulary
VOCAB = sum(SPLIT)
CAPPED = {"softcap": 3.0, "logit_scale": 2.0, "temperature": 0.5}
TINY_BUDGET = 2**14
ENGINES = ["chunked"]
if extension.load() is not None:
    ENGINES.append("cpu")
if importlib.util.find_spec("triton") is not None:
    ENGINES.append("triton")  # interpreted


def mine(x, dim=0):
    """This rank's rows."""
    return x.split(SPLIT, dim)[dist.get_rank()].clone() if x is not None else None


def head(n, d, generator, bias=True):
    hidden = 2 * torch.randn(n, d, generator=generator)
    weight = torch.randn(VOCAB, d, generator=generator) / math.sqrt(d)
    return hidden, weight, torch.randn(VOCAB, generator=generator) if bias else None


def leaf(x, dtype=None):
    return None if x is None else x.detach().to(dtype or x.dtype).clone().requires_grad_()


def close(got, want, tolerance=5e-5):
    torch.testing.assert_close(got.detach().double(), want.detach().double(), atol=tolerance, rtol=tolerance)


def same_on_every_rank(*tensors):
    for x in tensors:
        others = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(others, x.detach().contiguous())
        assert all(torch.equal(x, other) for other in others)


def close_gradients(leaves, exact):
    (hidden, weight, bias), (h64, w64, b64) = leaves, exact
    close(hidden.grad, h64.grad)
    close(weight.grad, mine(w64.grad))
    close(bias.grad, mine(b64.grad))
    same_on_every_rank(hidden.grad)


def logprob(generator, backend, transform=None, offset=0.0):
    """Values and gradients; `offset` moves the second slice's logits, so that it has almost all or none of the mass."""
    transform = transform or {}
    hidden, weight, bias = head(23, 9, generator)
    bias[SPLIT[0] :] += offset
    targets = torch.randint(0, VOCAB, (23,), generator=generator)
    targets[::6] = -100
    upstream = torch.randn(3, 23, generator=generator)
    leaves = [leaf(hidden), leaf(mine(weight)), leaf(mine(bias))]
    with fastppo.scratch_budget(TINY_BUDGET):
        out = fastppo.linear_logprob(
            *leaves[:2], targets, bias=leaves[2], return_entropy=True, group=dist.group.WORLD, backend=backend,
            **transform,
        )  # fmt: skip
        sum((g * x).sum() for g, x in zip(upstream, out, strict=True)).backward()
    exact = [leaf(x, torch.float64) for x in (hidden, weight, bias)]
    z = oracle.logits(*exact, **transform)
    want, total = torch.zeros(3, 23, dtype=torch.float64), 0
    for n in (targets != -100).nonzero().flatten().tolist():
        for k, value in enumerate(oracle.row(z[n], targets[n])):
            want[k, n] = value.detach()
            total = total + upstream[k, n].double() * value
    total.backward()
    for got, x in zip(out, want, strict=True):
        torch.testing.assert_close(got.detach().double(), x, atol=5e-5, rtol=2e-5)
    same_on_every_rank(*out)
    close_gradients(leaves, exact)


def ruled_out(generator, backend):
    """Targets with a logit of −∞, in either slice: a log-probability of −∞, and finite gradients."""
    hidden, weight, bias = head(6, 9, generator)
    targets = torch.tensor([3, VOCAB - 1, 5, 3, -100, VOCAB - 2])
    bias[[3, 4, VOCAB - 1]] = -torch.inf
    upstream = torch.randn(6, generator=generator)
    leaves = [leaf(hidden), leaf(mine(weight)), leaf(mine(bias))]
    world = {"group": dist.group.WORLD, "backend": backend}
    out = fastppo.linear_logprob(*leaves[:2], targets, bias=leaves[2], return_entropy=True, **world)
    assert (out.logprobs == -torch.inf).tolist() == [True, True, False, True, False, False]
    torch.autograd.backward([out.logprobs, out.entropy], [upstream, upstream])
    exact = [leaf(x, torch.float64) for x in (hidden, weight, bias)]
    real = targets >= 0
    rows = [oracle.row(z, target) for z, target in zip(oracle.logits(*exact)[real], targets[real], strict=True)]
    taken, entropy, _ = map(torch.stack, zip(*rows, strict=True))
    close(out.entropy[real], entropy)
    torch.autograd.backward([taken, entropy], [upstream[real].double()] * 2)
    close_gradients(leaves, exact)


def divergence(generator, backend, kind):
    hidden, weight, bias = head(17, 9, generator)
    ref_hidden, ref_weight, ref_bias = head(17, 5, generator)
    mask = torch.rand(17, generator=generator) < 0.8
    upstream = torch.randn(17, generator=generator)
    leaves = [leaf(hidden), leaf(mine(weight)), leaf(mine(bias))]
    kl = fastppo.linear_kl(
        *leaves[:2], ref_hidden, mine(ref_weight), kind=kind, mask=mask, bias=leaves[2], ref_bias=mine(ref_bias),
        group=dist.group.WORLD, backend=backend, **CAPPED,
    )  # fmt: skip
    (upstream * kl).sum().backward()
    exact = [leaf(x, torch.float64) for x in (hidden, weight, bias)]
    z = oracle.logits(*exact, **CAPPED)
    ref_z = oracle.logits(ref_hidden.double(), ref_weight.double(), ref_bias.double(), **CAPPED)
    want, total = torch.zeros(17, dtype=torch.float64), (z * 0).sum()
    for n in mask.nonzero().flatten().tolist():
        value = oracle.divergence(z[n], ref_z[n], kind)
        want[n] = value.detach()
        total = total + upstream[n].double() * value
    total.backward()
    close(kl, want)
    same_on_every_rank(kl)
    close_gradients(leaves, exact)


def loss(generator, backend):
    """The PPO loss with everything in it: entropy bonus, exact KL, dual clip, masked tokens, an empty sequence."""
    b, t = 4, 6
    hidden, weight, bias = head(b * t, 9, generator)
    ref_hidden, ref_weight, _ = head(b * t, 5, generator)
    targets = torch.randint(0, VOCAB, (b, t), generator=generator)
    now = oracle.logits(hidden.double(), weight.double(), bias.double()).log_softmax(-1)
    now = now.gather(1, targets.view(-1, 1)).view(b, t)
    old = (now + 0.3 * torch.randn(b, t, generator=generator)).float()
    advantages = torch.randn(b, t, generator=generator)
    mask = torch.rand(b, t, generator=generator) < 0.7
    mask[1], mask[0, 0] = False, True
    options = {"dual_clip": 1.5, "kl_coef": 0.3, "kl_estimator": "exact", "entropy_coef": 0.02}
    leaves = [leaf(hidden), leaf(mine(weight)), leaf(mine(bias))]
    out = fastppo.linear_ppo_loss(
        leaves[0].view(b, t, -1), leaves[1], targets, old, advantages, mask=mask, bias=leaves[2],
        ref_hidden=ref_hidden.view(b, t, -1), ref_weight=mine(ref_weight), group=dist.group.WORLD, backend=backend,
        **options,
    )  # fmt: skip
    out.loss.backward()
    exact = [leaf(x, torch.float64) for x in (hidden, weight, bias)]
    z = oracle.logits(*exact)
    ref_z = oracle.logits(ref_hidden.double(), ref_weight.double())
    rows = [[oracle.row(z[i * t + j], targets[i, j]) for j in range(t)] for i in range(b)]
    kl = [[oracle.divergence(z[i * t + j], ref_z[i * t + j], "reverse") for j in range(t)] for i in range(b)]
    want = oracle.ppo(
        [[x[0] for x in r] for r in rows], [[x[1] for x in r] for r in rows], old.double(), advantages.double(),
        mask.tolist(), exact_kl=kl, **options,
    )  # fmt: skip
    want.backward()
    close(out.loss, want)
    same_on_every_rank(out.loss, out.logprobs, out.entropy, *out.metrics.values())
    close_gradients(leaves, exact)


def low_precision(generator, backend):
    """∂hidden is summed over the ranks before it is rounded: its error stays the naive path's."""
    hidden, weight, _ = head(31, 24, generator, bias=False)
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    targets = torch.randint(0, VOCAB, (31,), generator=generator)
    upstream = torch.randn(31, generator=generator)
    results = []
    for h, w, options in (
        (hidden, mine(weight), {"group": dist.group.WORLD, "backend": backend}),
        (hidden, weight, {"backend": "reference"}),
        (hidden.double(), weight.double(), {"backend": "reference"}),
    ):
        h, w = leaf(h), leaf(w)
        (upstream * fastppo.linear_logprob(h, w, targets, **options).logprobs).sum().backward()
        results.append(h.grad.double())
    fused, naive, exact = results
    assert (fused - exact).abs().max() <= 1.5 * (naive - exact).abs().max() + 0.01 * exact.abs().max()


def compiled(generator, backend):
    hidden, weight, _ = head(6, 4, generator, bias=False)
    weight, targets = mine(weight), torch.randint(0, VOCAB, (2, 3), generator=generator)
    old = torch.full((2, 3), -math.log(VOCAB))

    def step(h, w):
        tokens = h.view(2, 3, -1)
        options = {"group": dist.group.WORLD, "backend": backend}
        out = fastppo.linear_ppo_loss(tokens, w, targets, old, old, entropy_coef=0.1, **options)
        return out.loss + fastppo.linear_logprob(tokens, w, targets, **options).logprobs.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        h, w = leaf(hidden), leaf(weight)
        total = function(h, w)
        total.backward()
        results.append((total, h.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def nothing_to_do(generator, backend):
    for n in (0, 5):
        h, w = torch.randn(n, 4, requires_grad=True), torch.randn(SPLIT[dist.get_rank()], 4, requires_grad=True)
        targets = torch.full((n,), -100)
        out = fastppo.linear_logprob(h, w, targets, return_entropy=True, group=dist.group.WORLD, backend=backend)
        sum(x.sum() for x in out).backward()
        assert all((x == 0).all() for x in (*out, h.grad, w.grad))


def sharded_with_group(generator, backend):
    """A DTensor cut along its rows is this rank's slice, and gets its gradient as one."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,))
    hidden, weight, _ = head(11, 6, generator)
    targets = torch.randint(0, VOCAB, (11,), generator=generator)
    sharded = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    out = fastppo.linear_logprob(hidden, sharded, targets, group=mesh.get_group(), backend=backend)
    out.logprobs.sum().backward()
    exact = weight.double().requires_grad_()
    want = (hidden.double() @ exact.T).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    want.sum().backward()
    close(out.logprobs, want)
    close(sharded.grad.full_tensor(), exact.grad)
    by_columns = distribute_tensor(weight, mesh, [Shard(1)])
    with pytest.raises(ValueError, match="weight: expected a DTensor with placements"):
        fastppo.linear_logprob(hidden, by_columns, targets, group=mesh.get_group(), backend=backend)


def sharded_without_group(generator, backend):
    """FSDP2's parameter outside a forward: gathered; every rank has its own tokens, and the gradient is the mean."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (RANKS,))
    hidden, weight, _ = head(RANKS * 7, 6, generator)
    targets = torch.randint(0, VOCAB, (RANKS * 7,), generator=generator)
    sharded = torch.nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    own = slice(dist.get_rank() * 7, dist.get_rank() * 7 + 7)
    out = fastppo.linear_logprob(hidden[own], sharded, targets[own], backend=backend)
    out.logprobs.sum().backward()
    exact = weight.double().requires_grad_()
    want = (hidden.double() @ exact.T).log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    (want.sum() / RANKS).backward()
    close(out.logprobs, want[own])
    assert sharded.grad.placements == sharded.placements
    close(sharded.grad.full_tensor(), exact.grad)


def bad_input(generator, backend):
    hidden, weight, _ = head(5, 4, generator)
    weight, targets = mine(weight), torch.randint(0, VOCAB, (5,), generator=generator)
    world = {"group": dist.group.WORLD, "backend": backend}
    targets[2] = VOCAB
    with pytest.raises(ValueError, match=rf"targets: expected ids in \[0, {VOCAB}\)"):
        fastppo.linear_logprob(hidden, weight, targets, **world)
    targets[2] = 0
    own = 5 - dist.get_rank()
    with pytest.raises(ValueError, match="hidden: expected the same tokens on every rank"):
        fastppo.linear_logprob(hidden[:own], weight, targets[:own], **world)
    with pytest.raises(ValueError, match="backend: 'reference' has no form"):
        fastppo.linear_logprob(hidden, weight, targets, **(world | {"backend": "reference"}))
    alone = dist.new_group([0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="group: this process is not one of its ranks"):
            fastppo.linear_logprob(hidden, weight, targets, group=alone, backend=backend)


CASES = {
    **{f"logprob capped {e}": (logprob, e, {"transform": CAPPED}) for e in ENGINES},
    **{f"loss {e}": (loss, e, {}) for e in ENGINES},
    **{f"{kind} divergence {e}": (divergence, e, {"kind": kind}) for e in ENGINES for kind in ("reverse", "forward")},
    **{f"low precision {e}": (low_precision, e, {}) for e in ENGINES},
    **{f"ruled out {e}": (ruled_out, e, {}) for e in ENGINES},
    **{f"nothing to do {e}": (nothing_to_do, e, {}) for e in ENGINES},
    "all mass in one slice": (logprob, "chunked", {"offset": 200.0}),
    "no mass in one slice": (logprob, "chunked", {"offset": -3e4}),
    "compiled": (compiled, "chunked", {}),
    "sharded with group": (sharded_with_group, "chunked", {}),
    "sharded without group": (sharded_without_group, "chunked", {}),
    "bad input": (bad_input, "chunked", {}),
}


def work(rank, folder, seed):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(minutes=10), rank=rank, world_size=RANKS)
    for name, (case, backend, options) in CASES.items():
        ended = "passed"
        try:
            case(torch.Generator().manual_seed(seed), backend, **options)
        except Exception:
            ended = traceback.format_exc()
        ends = [None] * RANKS
        dist.all_gather_object(ends, ended)
        if rank == 0:
            with open(f"{folder}/ends", "a") as file:
                file.write(json.dumps([name, [end for end in ends if end != "passed"]]) + "\n")
    dist.destroy_process_group()


@contextlib.contextmanager
def environment(name, value):
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """{case: what went wrong on which rank}; a case that is missing was never reached."""
    folder, seed = tmp_path_factory.mktemp("ranks"), int(torch.randint(2**31, ()))
    failure = None
    with environment("TRITON_INTERPRET", "1"):
        try:
            torch.multiprocessing.spawn(work, (str(folder), seed), nprocs=RANKS)
        except Exception as error:
            failure = str(error)
    lines = (folder / "ends").read_text().splitlines() if (folder / "ends").exists() else []
    return {"seed": seed, "failure": failure, **dict(map(json.loads, lines))}


@pytest.mark.parametrize("case", CASES)
def test_two_processes(ends, case):
    assert case in ends, f"the processes ended before: {ends['failure']}"
    assert not ends[case], f"seed {ends['seed']}\n" + "\n".join(ends[case])


@pytest.mark.parametrize("kl_kind", ["", "reverse", "forward"])
@pytest.mark.parametrize(("own", "other"), [(-torch.inf, -torch.inf), (0.0, -3e4), (-3e4, 0.0)])
def test_a_slice_of_excluded_tokens_gives_no_nan(kl_kind, own, other):
    rows, dim, vocab, cut = 5, 7, 60, 41
    hidden, weight, ref_hidden = torch.randn(rows, dim), torch.randn(vocab, dim), torch.randn(rows, dim)
    bias, ref_bias = torch.zeros(vocab), torch.zeros(vocab)
    bias[cut:], ref_bias[cut:] = own, other
    targets = torch.randint(0, cut, (rows,))

    def statistics(columns: slice, targets: torch.Tensor) -> torch.Tensor:
        head = (weight[columns], bias[columns])
        ref = (ref_hidden, weight[columns], ref_bias[columns]) if kl_kind else (None, None, None)
        options = (1.0, 1.0, None, torch.float32, 2**20, "chunked")
        return torch.stack(torch.ops.fastppo.linear_statistics(hidden, *head, targets, *ref, kl_kind, *options))

    elsewhere = torch.full_like(targets, vocabulary_parallel.ELSEWHERE)
    slices = torch.stack([statistics(slice(0, cut), targets), statistics(slice(cut, vocab), elsewhere)], 1)
    owned = torch.tensor([1.0, 0.0]).unsqueeze(1).expand(2, rows)
    whole = vocabulary_parallel.combine(tuple(slices), owned, kl_kind, torch.tensor(vocab), targets < 0)
    torch.testing.assert_close(torch.stack(whole), statistics(slice(0, vocab), targets), atol=1e-5, rtol=1e-5)
