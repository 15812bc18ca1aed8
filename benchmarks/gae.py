"""GAE on a CPU: the C++ scan and the loop over time, against a plain copy of as many bytes.

    OMP_WAIT_POLICY=passive pytest benchmarks/gae.py --benchmark-enable

The scan reads two arrays and writes two, so the floor is a copy of two arrays; `gb_per_s` counts their bytes once each.
With OMP_WAIT_POLICY=passive PyTorch's threads sleep between copies, as the scan's do. Without it they spin, and a copy
within the cache starts some 50 µs sooner.
"""

from __future__ import annotations

import pytest
import torch

import fastppo
from fastppo.engines import extension

CASES = {  # [B, T], dtype, padding, share of tokens that are done
    "short": ((64, 512), torch.float32, None, 0.0),
    "typical": ((512, 4096), torch.float32, None, 0.0),
    "typical-padded": ((512, 4096), torch.float32, "right", 0.0),
    "typical-holes-dones": ((512, 4096), torch.float32, "holes", 0.01),
    "typical-double": ((512, 4096), torch.float64, None, 0.0),
    "beyond-cache": ((2048, 4096), torch.float32, None, 0.0),
    "one-row": ((1, 1_000_000), torch.float32, None, 0.0),
}


@pytest.fixture(params=CASES)
def case(request, benchmark):
    """rewards, values and options of gae. Only what has the same shape is compared."""
    benchmark.group = request.param
    (batch, time), dtype, padding, done = CASES[request.param]
    rewards, values = torch.randn(2, batch, time, dtype=dtype)
    options = {}
    if padding == "right":
        options["mask"] = torch.arange(time) < torch.randint(1, time + 1, (batch, 1))
    elif padding == "holes":
        options["mask"] = torch.rand(batch, time) < 0.9
    if done:
        options["dones"] = torch.rand(batch, time) < done
    return rewards, values, options


def measure(benchmark, function, rewards, rounds=50):
    benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=5)
    if benchmark.enabled:
        moved = 4 * rewards.numel() * rewards.element_size()
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info["gb_per_s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)
        benchmark.extra_info["best_gb_per_s"] = round(moved / benchmark.stats.stats.min / 1e9, 1)


def test_copy(benchmark, case):
    rewards, values, _ = case
    to_rewards, to_values = torch.empty_like(rewards), torch.empty_like(values)

    def copy():
        to_rewards.copy_(rewards)
        to_values.copy_(values)

    measure(benchmark, copy, rewards)


@pytest.mark.skipif(extension.load() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("isa", extension.load().instruction_sets() if extension.load() else [])
def test_scan(benchmark, case, isa):
    """The scan alone, into outputs that exist."""
    rewards, values, options = case
    offsets = torch.arange(rewards.shape[0] + 1) * rewards.shape[1]
    flat = [x.flatten() for x in (rewards, values, torch.empty_like(rewards), torch.empty_like(values))]
    masks = {name: x.flatten() for name, x in options.items()}
    threads = torch.get_num_threads()

    def scan():
        assert extension.load().gae(*flat, offsets, 0.99, 0.95, **masks, threads=threads, isa=isa)

    measure(benchmark, scan, rewards)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gae(benchmark, case, backend):
    """The public operator, with its checks and fresh outputs."""
    rewards, values, options = case
    if backend == "cpu" and extension.load() is None:
        pytest.skip("the C++ extension is not built")
    if backend == "reference" and rewards.shape[1] > 4096:
        pytest.skip("a loop over a million tokens takes a minute")

    def run():
        fastppo.gae(rewards, values, gamma=0.99, lam=0.95, backend=backend, **options)

    measure(benchmark, run, rewards, rounds=50 if backend == "cpu" else 2)
