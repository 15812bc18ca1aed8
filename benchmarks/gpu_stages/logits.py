"""What moves bytes and multiplies nothing: log-probabilities and the loss from logits, and GAE, against a plain copy.

The floor of the former is the bytes they must move at the bandwidth of a large copy; that of GAE a copy of as many
bytes, measured beside it, for these arrays are small.
"""

from __future__ import annotations

import functools

import torch
from roofline import floors

import fastppo
from gpu_stages import ceilings
from gpu_stages.bench import Bench, Call, short

TOKENS, VOCAB = 8192, 128_256
GAE_SHAPES = [  # B, T, dtype
    (8192, 64, torch.bfloat16),
    (512, 4096, torch.float32),
    (4096, 1024, torch.float32),
    (1, 1_000_000, torch.float32),
]
GOAL = 1 / 0.9  # at least 90% of the copy's bandwidth


def run(bench: Bench) -> None:
    from_logits(bench)
    for shape in GAE_SHAPES:
        gae(bench, *shape)


def from_logits(bench: Bench) -> None:
    tokens, _, vocab = bench.shape(TOKENS, 1, VOCAB)
    case, backend = f"logits [{TOKENS}, {VOCAB}] in bfloat16", bench.backend

    @functools.cache
    def x() -> dict[str, torch.Tensor]:
        logits = 2 * torch.randn(tokens, vocab, device=bench.device).to(bench.dtype)
        targets = torch.randint(0, vocab, (tokens,), device=bench.device)
        old = logits.gather(-1, targets[:, None])[:, 0].float() - 13.8  # ln V + the spread's ½ σ²
        advantages = torch.randn(tokens, device=bench.device)
        return {"logits": logits.requires_grad_(), "targets": targets, "old": old, "advantages": advantages}

    def forward() -> Call:
        def call() -> object:
            with torch.no_grad():
                return fastppo.selective_logprob(x()["logits"], x()["targets"], return_entropy=True, backend=backend)

        return call

    def plain() -> Call:
        def call() -> object:
            with torch.no_grad():
                log_p = torch.log_softmax(x()["logits"].float(), -1)
                return log_p.gather(-1, x()["targets"][:, None]), (log_p.exp() * log_p).sum(-1)

        return call

    def backward(loss) -> Call:
        def call() -> None:
            x()["logits"].grad = None
            loss().backward()

        return call

    def sums() -> torch.Tensor:
        out = fastppo.selective_logprob(x()["logits"], x()["targets"], return_entropy=True, backend=backend)
        return out.logprobs.sum() + out.entropy.sum()

    def ppo() -> torch.Tensor:
        return fastppo.ppo_loss(
            x()["old"], x()["advantages"], logits=x()["logits"], targets=x()["targets"], entropy_coef=0.01,
            backend=backend,
        ).loss  # fmt: skip

    rate, floor = ceilings.copy_bandwidth(bench), floors(TOKENS, 1, VOCAB)
    once, thrice = floor["from logits, forward"].bytes, floor["from logits, forward and backward"].bytes
    for name, operator, moved, make in (
        ("log-prob and entropy, forward", "selective_logprob", once, forward),
        ("log-prob and entropy, forward and backward", "selective_logprob", thrice, lambda: backward(sums)),
        ("loss, entropy, forward and backward", "ppo_loss", thrice, lambda: backward(ppo)),
        ("plain PyTorch, log-prob and entropy, forward", None, once, plain),
    ):
        given = {"floor_ms": 1e3 * moved / rate, "goal": GOAL if operator else None} if rate else {}
        bench.time(case, name, make, operator=operator, moved=moved, **given)


def gae(bench: Bench, batch: int, time: int, dtype: torch.dtype) -> None:
    case, (rows, columns) = f"GAE [{batch}, {time}] in {short(dtype)}", gae_shape(bench, batch, time)
    moved = int(floors(rows * columns, 1, 1, dtype.itemsize)["gae"].bytes)

    def copy() -> Call:
        source = torch.randint(-128, 127, (moved // 2,), dtype=torch.int8, device=bench.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    floor = bench.time(case, "copy of as many bytes", copy, moved=float(moved))
    given = {"operator": "gae", "dtype": dtype, "moved": float(moved), "floor_ms": floor}
    bench.time(case, "gae", lambda: gae_call(bench, batch, time, dtype), goal=GOAL, **given)
    bench.time(case, "gae, whitened", lambda: gae_call(bench, batch, time, dtype, whiten=True), **given)


def gae_shape(bench: Bench, batch: int, time: int) -> tuple[int, int]:
    return (3, 40) if bench.tiny else (batch, time)


def gae_call(bench: Bench, batch: int, time: int, dtype: torch.dtype, *, whiten: bool = False) -> Call:
    rewards, values = torch.randn(2, *gae_shape(bench, batch, time), device=bench.device).to(dtype)
    return lambda: fastppo.gae(rewards, values, gamma=0.99, lam=0.95, whiten=whiten, backend=bench.backend)
