"""Which tiles suit the kernels that only move bytes: log-probabilities from logits, their gradient, GAE.

A winner is printed as the line to put into kernels/fastppo_kernels/configs.py. All are right with any tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import torch
from fastppo_kernels import configs, selective
from fastppo_kernels.configs import Elementwise
from fastppo_kernels.gae import LONG

from gpu_stages.bench import Bench, Call
from gpu_stages.logits import GAE_SHAPES, TOKENS, VOCAB, gae_call

# (columns or tokens of a tile, warps)
TILES = {
    "selective_statistics": [(4096, 8), (1024, 1), (1024, 2), (2048, 2), (2048, 4), (4096, 4), (8192, 8)],
    "selective_gradient": [(1024, 2), (1024, 1), (2048, 2), (2048, 4), (4096, 4), (4096, 8), (8192, 8)],
    "gae": [(512, 2), (256, 1), (512, 1), (512, 4), (1024, 2), (1024, 4)],
    "gae_long": [(1024, 4), (512, 2), (512, 4), (1024, 2), (1024, 8), (2048, 8)],
}


def run(bench: Bench) -> None:
    from_logits(bench)
    for batch, time, dtype in GAE_SHAPES:
        make = functools.partial(gae_call, bench, batch, time, dtype)
        choose(bench, "gae" if time <= LONG else "gae_long", f" [{batch}, {time}]", "gae", make, dtype)


def from_logits(bench: Bench) -> None:
    tokens, _, vocab = bench.shape(TOKENS, 1, VOCAB)
    transform = (1.0, 1.0, None)

    @functools.cache
    def x() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
        logits = 2 * torch.randn(tokens, vocab, device=bench.device).to(bench.dtype)
        targets = torch.randint(0, vocab, (tokens,), device=bench.device)
        return logits, targets, selective.statistics(logits, None, targets, *transform), torch.empty_like(logits)

    def statistics() -> Call:
        logits, targets, _, _ = x()
        return lambda: selective.statistics(logits, None, targets, *transform)

    def gradient() -> Call:
        logits, targets, saved, out = x()
        upstream = torch.randn(2, tokens, device=bench.device)
        return lambda: selective.vjp_into(out, logits, None, targets, saved, *upstream, None, None, *transform)

    choose(bench, "selective_statistics", "", "selective_logprob", statistics, bench.dtype)
    choose(bench, "selective_gradient", "", "selective_logprob", gradient, bench.dtype)


def choose(bench: Bench, kernel: str, size: str, operator: str, make: Callable[[], Call], dtype: torch.dtype) -> None:
    """A row for each tile, the shipped one first, and one for the fastest."""
    case, shipped = f"tiles: {kernel}{size}", configs.ELEMENTWISE[kernel]
    times = {}
    for block, warps in TILES[kernel][: 1 if bench.tiny else None]:
        config = shipped._replace(block=block, warps=warps)
        call, name = functools.partial(with_tile, kernel, config, make), f"block {block}, {warps} warps"
        if ms := bench.time(case, name, call, operator=operator, dtype=dtype, trial=True):
            times[config] = ms
    if shipped in times:
        best = min(times, key=times.get)
        found = {"ms": times[best], "floor_ms": times[shipped], "code": f'"{kernel}": {best},'}
        bench.attempt(case, "winner", lambda: found)


def with_tile(kernel: str, config: Elementwise, make: Callable[[], Call]) -> Call:
    call = make()

    def tiled() -> None:
        with mock.patch.dict(configs.ELEMENTWISE, {kernel: config}):
            call()

    return tiled
