"""The loss and the log-probabilities from hidden states at the heads of real models, against their matrix products.

The floor of a forward is the product h Wᵀ, that of a loss h Wᵀ, dz W and dzᵀ h, each measured here in the same process.
`logits in bfloat16` is the simple alternative to beat: cuBLAS logits, and the loss from them in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from roofline import MODELS

import fastppo
from gpu_stages import inputs
from gpu_stages.bench import Bench, Call

SHAPES = {  # tokens, D, V; the most important first
    f"{model}, {tokens} tokens": (tokens, *MODELS[model])
    for model, tokens in (
        ("Llama-3-8B", 8192),
        ("Qwen2.5-7B", 8192),
        ("SmolLM2-135M", 8192),
        ("Llama-3-8B", 2048),
        ("Llama-3-8B", 16_384),
    )
}
ENTROPY = 0.01


def run(bench: Bench) -> None:
    for number, (name, size) in enumerate(SHAPES.items()):
        if bench.tiny and number:
            break  # all shapes are the same one there
        tokens, dim, vocab = bench.shape(*size)
        shape(bench, name, tokens, dim, vocab, masked=number == 0)


def shape(bench: Bench, name: str, tokens: int, dim: int, vocab: int, *, masked: bool) -> None:
    x = functools.cache(lambda: inputs.head(tokens, dim, vocab, bench.dtype, bench.device))
    one, three = bench.products(name, tokens, dim, vocab)
    flops = 2.0 * tokens * dim * vocab
    forward = {"floor_ms": one, "flops": flops}
    backward = {"floor_ms": three, "flops": 3 * flops, "operator": "linear_ppo_loss"}

    def logprobs() -> Call:
        def call() -> object:
            with torch.no_grad():
                return fastppo.linear_logprob(
                    x()["hidden"], x()["weight"], x()["targets"], return_entropy=True, backend=bench.backend
                )

        return call

    bench.time(name, "loss, entropy", loss(bench, x, entropy_coef=ENTROPY), goal=1.15, **backward)
    bench.time(name, "loss", loss(bench, x), goal=1.10, **backward)
    bench.time(name, "loss, entropy, 256 MiB", loss(bench, x, 256, entropy_coef=ENTROPY), goal=1.45, **backward)
    bench.time(name, "forward, log-prob and entropy", logprobs, operator="linear_logprob", goal=1.15, **forward)
    bench.time(name, "logits in bfloat16, loss, entropy", from_logits(bench, x), **backward | {"operator": "ppo_loss"})
    bench.time(name, "loss, 256 MiB", loss(bench, x, 256), **backward)
    if masked:
        _, half = bench.products(f"{name}, half masked", tokens // 2, dim, vocab)
        for budget, where in ((None, ""), (256, ", 256 MiB")):
            call = loss(bench, x, budget, half=True, entropy_coef=ENTROPY)
            halved = backward | {"floor_ms": half, "flops": 1.5 * flops}
            bench.time(f"{name}, half masked", f"loss, entropy{where}", call, **halved)


def loss(
    bench: Bench, x: Callable[[], inputs.Tensors], budget: float | None = None, *, half: bool = False, **options
) -> Callable[[], Call]:
    """linear_ppo_loss and its backward; every other token masked if `half`."""

    def make() -> Call:
        t = x()
        mask = torch.arange(len(t["targets"]), device=bench.device) % 2 == 0 if half else None

        def compute() -> torch.Tensor:
            out = fastppo.linear_ppo_loss(
                t["hidden"], t["weight"], t["targets"], t["old"], t["advantages"], mask=mask, backend=bench.backend,
                **options,
            )  # fmt: skip
            return out.loss

        def within_budget() -> torch.Tensor:
            with fastppo.scratch_budget(bench.budget(budget)):
                return compute()

        return step(t, compute if budget is None else within_budget)

    return make


def from_logits(bench: Bench, x: Callable[[], inputs.Tensors], entropy_coef: float = ENTROPY) -> Callable[[], Call]:
    """The logits as plain PyTorch computes them, and the loss from them, whose gradient takes their place."""

    def make() -> Call:
        t = x()

        def compute() -> torch.Tensor:
            logits = t["hidden"] @ t["weight"].t()
            return fastppo.ppo_loss(
                t["old"], t["advantages"], logits=logits, targets=t["targets"], entropy_coef=entropy_coef,
                inplace_backward=True, backend=bench.backend,
            ).loss  # fmt: skip

        return step(t, compute)

    return make


def step(x: inputs.Tensors, compute: Callable[[], torch.Tensor]) -> Call:
    """A forward and a backward to hidden and weight."""

    def call() -> None:
        x["hidden"].grad = x["weight"].grad = None
        compute().backward()

    return call
