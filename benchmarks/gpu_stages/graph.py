"""CUDA graphs, no wait of the host, no compilation as token counts change.

Where there is no GPU, what would be captured is called twice and has to give the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

import fastppo
from gpu_stages import inputs, loss
from gpu_stages.bench import Bench, WarmUp

TOKENS, DIM, VOCAB = 2048, 896, 50_257
GAE = (512, 1024)
Tensors = list[torch.Tensor]


def run(bench: Bench) -> None:
    tokens, dim, vocab = bench.shape(TOKENS, DIM, VOCAB)
    for name, options in {
        "loss and backward, entropy": {"entropy_coef": loss.ENTROPY},
        "loss and backward": {},
        "loss and backward, entropy, half masked": {"entropy_coef": loss.ENTROPY, "half": True},
    }.items():
        if bench.allowed("CUDA graph", name, "linear_ppo_loss"):
            bench.attempt("CUDA graph", name, lambda o=options: replay(bench, *policy(bench, tokens, dim, vocab, **o)))
    if bench.allowed("CUDA graph", "gae", "gae"):
        bench.attempt("CUDA graph", "gae", lambda: replay(bench, *advantages(bench)))
    if not bench.on_gpu:
        return
    if bench.allowed("no host wait", "loss and backward, entropy", "linear_ppo_loss"):
        bench.attempt("no host wait", "loss and backward, entropy", lambda: without_waiting(bench))
        if not isinstance(bench, WarmUp):
            bench.attempt("no recompilation", "loss over 50 token counts", lambda: fifty_token_counts(bench))


def policy(bench: Bench, tokens: int, dim: int, vocab: int, half: bool = False, **options):
    """(inputs, function from nothing to outputs and gradients)."""
    x = inputs.head(tokens, dim, vocab, bench.dtype, bench.device)
    mask = torch.arange(tokens, device=bench.device) % 2 == 0 if half else None

    def call() -> Tensors:
        out = fastppo.linear_ppo_loss(
            x["hidden"], x["weight"], x["targets"], x["old"], x["advantages"], mask=mask, backend=bench.backend,
            **options,
        )  # fmt: skip
        return [out.loss, out.logprobs, *torch.autograd.grad(out.loss, [x["hidden"], x["weight"]])]

    return x, call


def advantages(bench: Bench):
    batch, time = (3, 40) if bench.tiny else GAE
    x = {name: torch.randn(batch, time, device=bench.device) for name in ("rewards", "values")}
    return x, lambda: list(fastppo.gae(x["rewards"], x["values"], gamma=0.99, lam=0.95, backend=bench.backend))


def replay(bench: Bench, x: inputs.Tensors, call: Callable[[], Tensors]) -> dict:
    """Capture the call, give its inputs other values, and compare a replay with a plain call, bit by bit."""
    if isinstance(bench, WarmUp):
        call()
        return {}
    if not bench.on_gpu:
        return same([t.clone() for t in call()], call())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    with torch.no_grad():
        for tensor in x.values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    return same([t.detach().clone() for t in captured], call())


def same(got: Tensors, want: Tensors) -> dict:
    difference = max((a.double() - b.double()).abs().max().item() for a, b in zip(got, want, strict=True))
    equal = all(torch.equal(a, b) and bool(torch.isfinite(a).all()) for a, b in zip(got, want, strict=True))
    return {"status": "PASS" if equal else "FAIL", "difference": difference, "checks": len(want)}


def without_waiting(bench: Bench) -> dict:
    """PyTorch raises where the host waits for the device."""
    _, call = policy(bench, TOKENS, DIM, VOCAB, entropy_coef=loss.ENTROPY)
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"status": "PASS"}


def fifty_token_counts(bench: Bench) -> dict:
    """Kernels compiled while the token count changes 50 times, after a multiple of 16 and one that is none."""
    from triton import knobs

    compiled: list[str] = []
    knobs.runtime.jit_post_compile_hook = lambda **event: compiled.append(str(event.get("repr", "")))
    seed = random.Random(0)
    try:
        for number, tokens in enumerate([1024, 1301, *(seed.randrange(600, 2000) for _ in range(50))]):
            _, call = policy(bench, tokens, DIM, VOCAB, entropy_coef=loss.ENTROPY)
            call()
            if number == 1:
                compiled.clear()
    finally:
        knobs.runtime.jit_post_compile_hook = None
    return {"status": "FAIL" if compiled else "PASS", "compiled": len(compiled), "error": "; ".join(compiled)[:200]}
