"""fastppo beside other projects' kernels (benchmarks/peers.py) at two shapes for which figures have been published."""

from __future__ import annotations

import functools

import peers
import torch

from gpu_stages import inputs, loss
from gpu_stages.bench import Bench, Call, WarmUp

SHAPES = {  # tokens, D, V
    "8192 tokens, V 151936, D 4096": (8192, 4096, 151_936),
    "16384 tokens, V 248320, D 2048": (16_384, 2048, 248_320),
}


def run(bench: Bench) -> None:
    floors = {}
    for name, size in SHAPES.items():
        floors[name] = shape(bench, name, *bench.shape(*size))
        if bench.tiny:
            return  # the other shape is the same one there, and the compiler below takes half a minute
    if not isinstance(bench, WarmUp):
        for name, size in SHAPES.items():
            x = functools.partial(inputs.head, *size, bench.dtype, bench.device)
            call = naive(x, torch.compile(naive_loss, dynamic=False))
            bench.time(name, "torch.compile of naive, loss, entropy", call, floor_ms=floors[name])


def shape(bench: Bench, name: str, tokens: int, dim: int, vocab: int) -> float | None:
    """Returns the milliseconds of the three products."""
    x = functools.cache(lambda: inputs.head(tokens, dim, vocab, bench.dtype, bench.device))
    _, three = bench.products(name, tokens, dim, vocab)
    given = {"floor_ms": three, "flops": 6.0 * tokens * dim * vocab}
    own = given | {"operator": "linear_ppo_loss"}
    bench.time(name, "loss, entropy", loss.loss(bench, x, entropy_coef=loss.ENTROPY), **own)
    bench.time(name, "loss", loss.loss(bench, x), **own)
    bench.time(name, "loss, entropy, 256 MiB", loss.loss(bench, x, 256, entropy_coef=loss.ENTROPY), **own)
    bench.time(name, "logits in bfloat16, loss, entropy", loss.from_logits(bench, x), **own | {"operator": "ppo_loss"})
    for label, peer in peers.LOG_PROBS.items():
        if isinstance(bench, WarmUp) and peer is peers.liger_grpo:
            continue  # torch.compile compiles it anew for the full size
        bench.time(name, f"peer: {label}", lambda peer=peer: peer(x()), **given)
    if not isinstance(bench, WarmUp):  # nothing of it is compiled
        bench.time(name, "naive, loss, entropy", naive(x, naive_loss), **given)
    return three


def naive(x, function):
    def make() -> Call:
        t = x()
        arguments = [t[name] for name in ("hidden", "weight", "targets", "old", "advantages")]
        return loss.step(t, lambda: function(*arguments))

    return make


def naive_loss(hidden, weight, targets, old, advantages) -> torch.Tensor:
    """The loss with entropy as one writes it down."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    ratio = (log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - old).exp()
    surrogate = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
    return (surrogate + loss.ENTROPY * (log_p.exp() * log_p).sum(-1)).mean()
