"""pytest-benchmark cases of the CPU backend, its floor and its rivals: those of cpu.py, with statistics.

pytest benchmarks/bench_cpu.py --benchmark-enable --benchmark-autosave          # then: pytest-benchmark compare
"""

from __future__ import annotations

import functools

import pytest
import torch
from cpu import contenders


@functools.cache
def calls():
    """At SmolLM2's head: 1,024 tokens, D 576, V 49,152."""
    return contenders(1024, 576, 49152, torch.bfloat16)


PRODUCTS = ("three products", "one product")
LOSSES = ("naive, loss", "torch.compile of naive, loss", "chunked, loss", "cpu, loss", "cpu 64 MiB, loss")
FORWARDS = ("naive, forward", "chunked, forward", "cpu, forward")


@pytest.mark.parametrize("name", PRODUCTS + LOSSES + FORWARDS)
def test_head(benchmark, name):
    if name not in calls():
        pytest.skip(f"{name}: the cpu backend does not work on this machine; see `fastppo doctor`")
    benchmark.group = "forward" if name in FORWARDS or name == "one product" else "loss"
    benchmark.pedantic(calls()[name], rounds=5, warmup_rounds=2)
