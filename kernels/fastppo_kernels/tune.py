"""`python -m fastppo_kernels.tune --output tuned.json`: the fastest tile sizes on the chip at hand, by trying them.

For each kernel with a matrix product: the shipped configuration and the candidates that are known to compile clean, at
the shapes given; the fastest is written to the file, under the chip's name, with the ceilings that choose between
tilings (the rate of a large product and the bandwidth of a copy). `FASTPPO_TUNED=tuned.json` then puts them in place of
what `configs` holds. A candidate is a configuration of `PROPOSALS` that `python -m fastppo_kernels.aot` has compiled
for this architecture without spills; budgets.json lists them.

Under TRITON_INTERPRET=1 everything runs at tiny sizes on the CPU, which proves nothing but that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

if importlib.util.find_spec("triton") is None and __name__ == "__main__":
    sys.exit("fastppo_kernels.tune: the compiler, triton, is not installed; pip install triton")

import torch
from torch import Tensor

from fastppo_kernels import budgets, configs
from fastppo_kernels.configs import GEMM, Ceilings, Gemm
from fastppo_kernels.divergence import launch_divergence
from fastppo_kernels.fisher_gradient import fisher_gradient
from fastppo_kernels.fisher_statistics import fisher_statistics
from fastppo_kernels.fisher_tile import Tangent
from fastppo_kernels.launch import INTERPRETED, architecture, device_name, unusable
from fastppo_kernels.logit_gradient import RowScalars, logit_gradient
from fastppo_kernels.operands import Operands, Projection
from fastppo_kernels.products import hidden_product, weight_product
from fastppo_kernels.statistics import launch_statistics
from fastppo_kernels.tile import transform_factors
from fastppo_kernels.tiling import row_stride

# What is tried first, when there is not time for all.
MAIN_KERNELS = ("anchored_store", "anchored_statistics", "product_rows", "product_columns")
# The keys of configs.GEMM beside the architecture: bfloat16 and float16, with a softcap, TensorFloat-32, float32.
PRECISIONS = ("half", "half capped", "tf32", "ieee")
FLUSH_BYTES = 256 * 2**20  # more than any L2 holds


class Sizes(NamedTuple):
    """Of the products that are timed; by default those of Llama-3-8B."""

    tokens: int = 8192
    dim: int = 4096
    vocab: int = 128_256


TINY = Sizes(32, 16, 70)


# What may be worth trying, the likeliest first. Whether it compiles clean is for the ahead-of-time gate to find out.
_ONE_PRODUCT = (
    Gemm(128, 256, 64, warps=8, stages=3),
    Gemm(128, 256, 64, warps=8, stages=4),
    Gemm(128, 128, 64, warps=8, stages=4),
    Gemm(256, 128, 64, warps=8, stages=3),
    Gemm(128, 256, 64, warps=8, stages=3, group_m=8),
    Gemm(128, 128, 64, warps=4, stages=3, per_processor=2),
    Gemm(64, 256, 64, warps=4, stages=2, per_processor=2),
)
_TWO_PRODUCTS = (Gemm(128, 128, 64, warps=8, stages=3), Gemm(128, 64, 64, warps=8, stages=4))
_TF32 = (Gemm(128, 128, 32, warps=8, stages=4), Gemm(128, 64, 32, warps=8, stages=4))
PROPOSALS: dict[str, dict[str, tuple[Gemm, ...]]] = {
    **{kernel: {"half": _ONE_PRODUCT} for kernel in MAIN_KERNELS},
    **{kernel: {"half": _ONE_PRODUCT[:3], "tf32": _TF32} for kernel in ("linear_statistics", "logit_gradient")},
    **{
        kernel: {"half": _TWO_PRODUCTS}
        for kernel in (
            "linear_divergence",
            "logit_gradient_kl",
            "fisher_statistics",
            "fisher_statistics_weight",
            "fisher_gradient",
            "fisher_gradient_weight",
        )
    },
}


def proposals(kernel: str, arch: str, precision: str) -> tuple[Gemm, ...]:
    """The entries of PROPOSALS for this kernel, not yet compiled."""
    return PROPOSALS.get(kernel, {}).get(precision, ())


def candidates(kernel: str, arch: str, precision: str) -> list[Gemm]:
    """The shipped configuration, then those that compile clean."""
    shipped = GEMM[kernel][arch, precision]
    if arch == "interpreter":
        return [shipped, shipped._replace(block_m=16)]
    return [shipped, *(config for config in budgets.candidates(kernel, arch, precision) if config != shipped)]


class Inputs:
    """Random operands of the products, made when they are first asked for; no row is left out."""

    def __init__(self, sizes: Sizes, precision: str, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.dtype = torch.bfloat16 if precision.startswith("half") else torch.float32
        self.transform = transform_factors(1.0, 1.0, 30.0 if precision.endswith("capped") else None)

    @functools.cached_property
    def hidden(self) -> Tensor:  # [N, D]
        return torch.randn(self.sizes.tokens, self.sizes.dim, device=self.device).to(self.dtype)

    @functools.cached_property
    def weight(self) -> Tensor:  # [V, D]
        shape = (self.sizes.vocab, self.sizes.dim)
        return torch.randn(shape, dtype=self.dtype, device=self.device).mul_(self.sizes.dim**-0.5)

    @functools.cached_property
    def exponentials(self) -> Tensor:  # [N, V]
        return self.matrix().uniform_()

    @functools.cached_property
    def stored(self) -> Tensor:  # [N, V], for `anchored_store` to write
        return self.matrix()

    def matrix(self) -> Tensor:  # [N, V]
        tokens, vocab = self.sizes.tokens, self.sizes.vocab
        return torch.empty(tokens, row_stride(vocab), dtype=self.dtype, device=self.device)[:, :vocab]

    @functools.cached_property
    def dz(self) -> Tensor:  # [N, a slice of the vocabulary]
        width = min(self.sizes.vocab, 4096)
        return torch.empty(self.sizes.tokens, row_stride(width), dtype=self.dtype, device=self.device)[:, :width]

    @functools.cached_property
    def statistics(self) -> Tensor:  # logprobs, entropy, row_max, log_sum, twice: [8, N]
        return torch.stack([self.per_row(value) for value in (-8.0, 4.0, 4.0, 8.0)] * 2)

    @functools.cached_property
    def rows(self) -> Tensor:  # [N]
        return torch.arange(self.sizes.tokens, dtype=torch.int32, device=self.device)

    @functools.cached_property
    def count(self) -> Tensor:  # [1]
        return torch.full((1,), self.sizes.tokens, dtype=torch.int32, device=self.device)

    def per_row(self, value: float) -> Tensor:  # [N]
        return torch.full((self.sizes.tokens,), value, device=self.device)

    def head(self) -> Projection:
        return Projection(self.hidden, self.weight, None, []).cut(self.sizes.vocab)


def runs(x: Inputs) -> dict[str, Callable[[], list[Tensor]]]:
    """For each entry of configs.GEMM, a call that launches its kernel and no other kernel with a product.

    It returns what the kernel wrote, partial results summed over the tiles, so that it does not depend on their size.
    """

    def statistics(*, anchored: bool, store: bool = False) -> list[Tensor]:
        shift = x.per_row(0.0) if anchored else None
        stored = x.stored if store else None
        partial = launch_statistics(x.head(), x.count, shift=shift, transform=x.transform, stored=stored)
        if not anchored:
            return [(partial[2] + partial[0].log()).logsumexp(0)]
        return [partial.sum(1), *([stored] if store else [])]

    def gradient(kind: str) -> list[Tensor]:
        ones, width = x.per_row(1.0), x.dz.shape[1]
        upstream = (None, None, None, ones) if kind else (ones, ones, None, None)
        of_reference = x.statistics[5:8] if kind else (None, None, None)
        scalars = RowScalars(x.rows.long(), *x.statistics[1:4], *of_reference, *upstream)
        part = Operands(x.hidden, x.weight[:width], None)
        logit_gradient(
            part, part if kind else None, x.rows, x.count, scalars, x.dz, first_row=0, first_column=0, kind=kind,
            transform=x.transform, scale=None,
        )  # fmt: skip
        return [x.dz]

    def divergence() -> list[Tensor]:
        partial = launch_divergence(x.head(), x.head(), x.count, kind="reverse", transform=x.transform)
        return [(partial[k + 2 - k // 3] + partial[k].log()).logsumexp(0) for k in (0, 3)]

    def tangent(moving_weight: bool) -> Tangent:
        return Tangent(x.head().cut(x.dz.shape[1]), x.hidden, x.weight if moving_weight else None, None)

    def fisher(moving_weight: bool) -> list[Tensor]:
        direction, ones = tangent(moving_weight), x.per_row(1.0)
        part = next(direction.slices())
        fisher_gradient(direction, part, x.count, x.statistics[:4], ones, ones[:1], x.dz, 0, x.transform)
        return [x.dz]

    def whole(moving_weight: bool) -> Tangent:
        direction = tangent(moving_weight)
        return direction._replace(head=direction.head.cut(x.sizes.vocab))

    def product(function: Callable, other: Tensor, rows: int) -> list[Tensor]:
        out = torch.zeros(rows, x.sizes.dim, dtype=torch.float32, device=x.device)
        with products_by("triton"):
            function(x.exponentials, other, out, x.count, 0, accumulate=True)
        return [out]

    return {
        "anchored_store": lambda: statistics(anchored=True, store=True),
        "anchored_statistics": lambda: statistics(anchored=True),
        "linear_statistics": lambda: statistics(anchored=False),
        "product_rows": lambda: product(hidden_product, x.weight, x.sizes.tokens),
        "product_columns": lambda: product(weight_product, x.hidden, x.sizes.vocab),
        "logit_gradient": lambda: gradient(""),
        "logit_gradient_kl": lambda: gradient("reverse"),
        "linear_divergence": divergence,
        "fisher_statistics": lambda: [fisher_statistics(whole(False), x.count, x.transform)],
        "fisher_statistics_weight": lambda: [fisher_statistics(whole(True), x.count, x.transform)],
        "fisher_gradient": lambda: fisher(False),
        "fisher_gradient_weight": lambda: fisher(True),
    }


@contextlib.contextmanager
def products_by(which: str) -> Iterator[None]:
    before, configs.PRODUCTS = configs.PRODUCTS, which
    try:
        yield
    finally:
        configs.PRODUCTS = before


def run_on_meta(kernel: str, precision: str) -> None:
    """The kernel's run at the default sizes without memory: for `launch.recording`."""
    with products_in(precision):
        runs(Inputs(Sizes(), precision, torch.device("meta")))[kernel]()


def trials(kernel: str, device: torch.device, seconds: float, sizes: Sizes | None = None) -> Iterator[dict]:
    """Times the shipped configuration and the candidates of `kernel`, as many as end within `seconds`.

    Products in half precision come first, then TensorFloat-32, then float32. The table of configurations is as it was
    whenever a row is yielded. FASTPPO_TUNED is unset: entries of its file would run in place of every candidate.

    Yields:
        {"kernel", "precision", "config": Gemm, "ms": median, or None if it failed, "ratio_to_shipped": of the times, or
        None, "error": "" or why it failed}
    """
    os.environ.pop("FASTPPO_TUNED", None)
    arch, deadline, longest = architecture(device), time.monotonic() + seconds, 0.0
    table = GEMM[kernel]
    for precision in ("ieee",) if INTERPRETED else ("half", "tf32", "ieee"):
        if (arch, precision) not in table:
            continue
        run = runs(Inputs(sizes or (TINY if INTERPRETED else Sizes()), precision, device))[kernel]
        shipped_ms = expected = None
        for config in candidates(kernel, arch, precision):
            start = time.monotonic()
            if start + longest > deadline:
                return
            row = {"kernel": kernel, "precision": precision, "config": config, "ms": None, "ratio_to_shipped": None}
            try:
                with entry_replaced(kernel, arch, precision, config), products_in(precision):
                    results = [result.clone() for result in run()]
                    expected = expected or results
                    check(results, expected)
                    ms = 1e3 * median_seconds(run, device)
                shipped_ms = ms if config == table[arch, precision] else shipped_ms
                row.update(ms=ms, ratio_to_shipped=ms / shipped_ms if shipped_ms else None, error="")
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
            longest = max(longest, time.monotonic() - start)
            yield row


def check(results: list[Tensor], expected: list[Tensor]) -> None:
    """AssertionError if a configuration computes something else than the shipped one: what it costs then is no matter.

    One rounding of half precision apart, they are the same numbers in another order of summation.
    """
    for result, want in zip(results, expected, strict=True):
        error = (result - want).float().norm() / want.float().norm().clamp(min=1e-30)
        assert error <= 5e-3, f"differs from the shipped configuration's result by {error:.1e}"


@contextlib.contextmanager
def entry_replaced(kernel: str, arch: str, precision: str, config: Gemm) -> Iterator[None]:
    table = GEMM[kernel]
    shipped = table[arch, precision]
    table[arch, precision] = config
    try:
        yield
    finally:
        table[arch, precision] = shipped


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Lets float32 products be TensorFloat-32 where that is the precision."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def median_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median of a few runs, after one that compiles; on a GPU, each finds an L2 that holds nothing of its operands."""
    function()
    if device.type != "cuda":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(10)]
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(1e-3 * start.elapsed_time(end) for start, end in events)


def as_code(kernel: str, arch: str, precision: str, config: Gemm) -> str:
    """The entry as a line of configs.py."""
    numbers = ", ".join(map(str, config[:3]))
    named = {field: value for field, value in config._asdict().items() if field not in config._fields[:3]}
    given = "".join(f", {k}={v}" for k, v in named.items() if v != Gemm._field_defaults.get(k))
    return f'("{arch}", "{precision}"): Gemm({numbers}{given}),  # {kernel}'


def measure_ceilings(device: torch.device) -> Ceilings:
    """Of a large bfloat16 product, and of a copy, whose reads and writes both count."""
    size = 64 if INTERPRETED else 8192
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    source = torch.empty(4 * size * size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    product, copy = (median_seconds(f, device) for f in (lambda: a @ b, lambda: target.copy_(source)))
    return Ceilings(2 * size**3 / product, 2 * source.numel() / copy)


def tune(kernels: list[str], device: torch.device, time_limit: float, sizes: Sizes) -> dict:
    """{"gemm": {kernel: {precision: configuration}}, "ceilings": {...}}, as `launch` reads it."""
    found: dict[str, dict[str, dict]] = {}
    deadline = time.monotonic() + time_limit
    for position, kernel in enumerate(kernels):
        rows = []
        for row in trials(kernel, device, (deadline - time.monotonic()) / (len(kernels) - position), sizes):
            print(json.dumps(row), flush=True)
            rows += [] if row["error"] else [row]
        for precision in {row["precision"] for row in rows}:
            best = min((row for row in rows if row["precision"] == precision), key=lambda row: row["ms"])
            print(as_code(kernel, architecture(device), precision, best["config"]))
            found.setdefault(kernel, {})[precision] = best["config"]._asdict()
    return {"gemm": found, "ceilings": measure_ceilings(device)._asdict()}


def main(arguments: list[str] | None = None) -> int:
    main_first = sorted(GEMM, key=lambda kernel: kernel not in MAIN_KERNELS)
    parser = argparse.ArgumentParser(prog="python -m fastppo_kernels.tune", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON; entries of other chips in it are kept")
    parser.add_argument("--tokens", type=int, default=Sizes().tokens)
    parser.add_argument("--dim", type=int, default=Sizes().dim)
    parser.add_argument("--vocab", type=int, default=Sizes().vocab)
    parser.add_argument("--kernels", nargs="+", choices=main_first, default=main_first)
    parser.add_argument("--seconds", type=float, default=600.0, help="stop before this has passed (default: 600)")
    options = parser.parse_args(arguments)
    if min(options.tokens, options.dim, options.vocab, options.seconds) <= 0:
        parser.error("--tokens, --dim, --vocab and --seconds must be above 0")
    if options.output.is_dir() or not options.output.parent.is_dir():
        parser.error(f"--output: {options.output} is no file in a folder that exists")
    if not (INTERPRETED or torch.cuda.is_available()):
        parser.error("there is no GPU here; TRITON_INTERPRET=1 shows that the tuner runs")
    device = torch.device("cpu" if INTERPRETED else "cuda")
    if reason := unusable(device, torch.float32):
        parser.error(reason)
    sizes = TINY if INTERPRETED else Sizes(options.tokens, options.dim, options.vocab)
    everything = json.loads(options.output.read_text()) if options.output.exists() else {}
    everything[device_name(device)] = tune(options.kernels, device, options.seconds, sizes)
    options.output.write_text(json.dumps(everything, indent=1) + "\n")
    print(f"written; use it with FASTPPO_TUNED={options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
