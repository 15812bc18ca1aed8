"""`python -m fastppo_kernels.tune --output tuned.json`: the fastest tile sizes on the chip at hand, by trying them.

For each kernel with a matrix product: the shipped configuration and its neighbors, at the shapes given, in bfloat16 and
float32; the fastest is written to the file, under the chip's name, with the ceilings that choose between tilings (the
rate of a large product and the bandwidth of a copy). `FASTPPO_TUNED=tuned.json` then puts them in place of what
`configs` holds. A configuration that does not compile, spills out of shared memory or fails is passed over.

Under TRITON_INTERPRET=1 everything runs at tiny sizes on the CPU, which proves nothing but that it runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastppo_kernels.compact_rows import compact_rows
from fastppo_kernels.configs import GEMM, Ceilings, Gemm
from fastppo_kernels.fisher_gradient import fisher_gradient
from fastppo_kernels.fisher_statistics import fisher_statistics
from fastppo_kernels.fisher_tile import Tangent
from fastppo_kernels.launch import INTERPRETED, architecture, device_name, precision, unusable
from fastppo_kernels.linear_divergence import linear_divergence
from fastppo_kernels.linear_jsd import linear_jsd
from fastppo_kernels.linear_statistics import Kept, kept_stride, linear_statistics
from fastppo_kernels.logit_gradient import Head, RowScalars, logit_gradient
from fastppo_kernels.tile import transform_factors

PLAIN = transform_factors(1.0, 1.0, None)
# What a block's operands may take of shared memory, in bytes; the exact limit shows when a candidate is compiled.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}


def candidates(shipped: Gemm, arch: str, itemsize: int) -> list[Gemm]:
    """The shipped configuration first, then its neighbors that may fit."""
    if arch == "interpreter":
        return [shipped, shipped._replace(block_m=16)]
    found = [shipped]
    for m, n, k, warps, stages, tma in itertools.product(
        (64, 128), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4), {shipped.tma, False}
    ):
        config = shipped._replace(block_m=m, block_n=n, block_k=k, warps=warps, stages=stages, tma=tma)
        # An accumulator of more than 128 registers a thread would spill.
        fits = (m + n) * k * itemsize * stages <= SHARED[arch] and m * n <= 128 * 32 * warps
        if fits and config not in found:
            found.append(config)
    return found


def runs(
    tokens: int, dim: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """For each entry of configs.GEMM, a call of its kernel on random inputs."""
    hidden = torch.randn(tokens, dim, device=device).to(dtype)
    weight = (torch.randn(vocab, dim, device=device) / dim**0.5).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), device=device)
    rows, count = compact_rows(targets)
    head = Head(hidden, weight, None)
    options = {**PLAIN, "compute_dtype": dtype}
    memory = torch.empty(tokens * kept_stride(vocab), dtype=dtype, device=device)
    dz = torch.empty(tokens, min(vocab, 4096), dtype=dtype, device=device)
    pair = linear_divergence(head, head, targets, rows, count, kind="jsd", **options)
    ones = torch.ones(tokens, device=device)

    def kept() -> None:
        store = Kept.make(memory, tokens, weight, softcap=False)
        linear_statistics(*head, targets, rows, count, kept=store, **options)

    def gradient(kind: str) -> None:
        upstream = (None, None, None, ones) if kind else (ones, ones, None, None)
        scalars = RowScalars(targets, *pair[1:4], *(pair[5:8] if kind else (None, None, None)), *upstream)
        logit_gradient(
            head, head if kind else None, rows, count, scalars, dz, first_row=0, first_column=0, kind=kind, scale=None,
            **PLAIN,
        )  # fmt: skip

    fixed_weight = Tangent(hidden, hidden, weight, None, None, None)
    moving_weight = fixed_weight._replace(d_weight=weight)

    def fisher(tangent: Tangent) -> None:
        scale = torch.ones(1, device=device)
        fisher_gradient(tangent, count, pair[:3], ones, scale, dz, first_row=0, first_column=0, **PLAIN)

    return {
        "fisher_statistics": lambda: fisher_statistics(fixed_weight, count, **PLAIN),
        "fisher_statistics_weight": lambda: fisher_statistics(moving_weight, count, **PLAIN),
        "fisher_gradient": lambda: fisher(fixed_weight),
        "fisher_gradient_weight": lambda: fisher(moving_weight),
        "linear_statistics": lambda: linear_statistics(*head, targets, rows, count, **options),
        "linear_statistics_kept": kept,
        "logit_gradient": lambda: gradient(""),
        "linear_divergence": lambda: linear_divergence(head, head, targets, rows, count, kind="reverse", **options),
        "linear_jsd": lambda: linear_jsd(head, head, pair, rows, count, **options),
        "logit_gradient_kl": lambda: gradient("reverse"),
    }


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median of a few runs after one that compiles."""
    function()
    times = []
    for _ in range(1 if INTERPRETED else 10):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(1e-3 * start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def fastest(
    kernel: str, kind: str, itemsize: int, run: Callable[[], object], device: torch.device
) -> tuple[Gemm, dict]:
    """The best of `candidates`, and how long each took; the table is left as it was."""
    arch = architecture(device)
    table, times = GEMM[kernel], {}
    shipped = table[arch, kind]
    try:
        for config in candidates(shipped, arch, itemsize):
            table[arch, kind] = config
            try:
                times[config] = seconds(run, device)
            except Exception as error:  # out of resources, or a tile that this compiler does not take
                print(f"  {config}: {type(error).__name__}", file=sys.stderr)
    finally:
        table[arch, kind] = shipped
    if not times:
        raise RuntimeError(f"{kernel} {kind}: not even the shipped configuration runs here")
    return min(times, key=times.get), times


def measure_ceilings(device: torch.device) -> Ceilings:
    """Of a large bfloat16 product, and of a copy, whose reads and writes both count."""
    size = 64 if INTERPRETED else 8192
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    source = torch.empty(4 * size * size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    product, copy = seconds(lambda: a @ b, device), seconds(lambda: target.copy_(source), device)
    return Ceilings(2 * size**3 / product, 2 * source.numel() / copy)


def tune(tokens: int, dim: int, vocab: int, device: torch.device, kernels: list[str]) -> dict:
    """{"gemm": {kernel: {precision: configuration}}, "ceilings": {...}}, as `launch` reads it."""
    found: dict[str, dict[str, dict]] = {}
    for dtype in (torch.float32,) if INTERPRETED else (torch.bfloat16, torch.float32):
        kind = precision(dtype, device)
        for kernel, run in runs(tokens, dim, vocab, dtype, device).items():
            if kernel not in kernels:
                continue
            best, times = fastest(kernel, kind, dtype.itemsize, run, device)
            share = times[best] / next(iter(times.values()))
            print(
                f"{kernel} {kind}: {1e3 * times[best]:.3f} ms, {share:.2f} of the shipped; {len(times)} tried: {best}"
            )
            found.setdefault(kernel, {})[kind] = best._asdict()
    return {"gemm": found, "ceilings": measure_ceilings(device)._asdict()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastppo_kernels.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON; entries of other chips in it are kept")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--kernels", nargs="+", choices=list(GEMM), default=list(GEMM))
    options = parser.parse_args(arguments)
    if not (INTERPRETED or torch.cuda.is_available()):
        parser.error("there is no GPU here; TRITON_INTERPRET=1 shows that the tuner runs")
    device = torch.device("cpu" if INTERPRETED else "cuda")
    if reason := unusable(device, torch.float32):
        parser.error(reason)
    os.environ.pop("FASTPPO_TUNED", None)  # an earlier file's entries would be measured in place of every candidate
    sizes = (32, 16, 70) if INTERPRETED else (options.tokens, options.dim, options.vocab)
    everything = json.loads(options.output.read_text()) if options.output.exists() else {}
    everything[device_name(device)] = tune(*sizes, device, options.kernels)
    options.output.write_text(json.dumps(everything, indent=1) + "\n")
    print(f"written; use it with FASTPPO_TUNED={options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
