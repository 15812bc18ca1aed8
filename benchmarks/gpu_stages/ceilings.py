"""What the chip reaches at most: the bandwidth of a copy, the rate of a large product and of the heads' own."""

from __future__ import annotations

import torch

from gpu_stages.bench import Bench
from gpu_stages.loss import SHAPES


def run(bench: Bench) -> None:
    def copy():
        source = torch.randint(-128, 127, (2**10 if bench.tiny else 2**32,), dtype=torch.int8, device=bench.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    bench.time("ceilings", "copy of 4 GiB, bytes read and written", copy, moved=2.0 * 2**32)
    for name, size in {"8192 × 8192 × 8192": (8192, 8192, 8192), **SHAPES}.items():
        n, d, v = bench.shape(*size)

        def product(n=n, d=d, v=v):
            a, b = (torch.randn(m, d, device=bench.device).to(bench.dtype) for m in (n, v))
            out = torch.empty(n, v, dtype=bench.dtype, device=bench.device)
            return lambda: torch.mm(a, b.t(), out=out)

        bench.time("ceilings", f"product {name}", product, flops=2.0 * n * d * v)


def copy_bandwidth(bench: Bench) -> float | None:
    """Bytes a second of the large copy, from this run's rows."""
    for row in bench.rows.read():
        if row["stage"] == "ceilings" and "gb_per_s" in row:
            return row["gb_per_s"] * 1e9
    return None
