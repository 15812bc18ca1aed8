"""The calls that the ahead-of-time gate makes, on meta tensors: one for each way the dispatcher can choose.

Shapes are those of Llama-3-8B (D 4,096, V 128,256), and a ragged D where the kernel then takes another path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fastppo_kernels.compact_rows import compact_rows
from fastppo_kernels.linear_statistics import linear_statistics

N, D, V = 8192, 4096, 128256
PLAIN = {"inner": 1.0, "outer": 1.0, "softcap": False}
CAPPED = {"inner": 0.1, "outer": 10.0, "softcap": True}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(label, call) pairs."""
    found = []
    for label, dtype, dim, bias, options in (
        ("bf16", torch.bfloat16, D, False, PLAIN),
        ("fp16 bias softcap", torch.float16, D, True, CAPPED),
        ("bf16 ragged D", torch.bfloat16, 4112, False, PLAIN),
        ("bf16 odd D", torch.bfloat16, 4097, True, PLAIN),
        ("fp32 ieee", torch.float32, D, False, PLAIN),
        ("fp32 tf32", torch.float32, D, False, PLAIN),
    ):
        run = functools.partial(statistics_case, dtype, dim, bias, options)
        found.append((label, functools.partial(with_tf32, label.endswith("tf32"), run)))
    return found


def with_tf32(allowed: bool, run: Callable[[], None]) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        run()
    finally:
        torch.set_float32_matmul_precision(before)


def statistics_case(dtype: torch.dtype, dim: int, has_bias: bool, options: dict) -> None:
    targets = meta(N, dtype=torch.int64)
    rows, count = compact_rows(targets)
    hidden, weight = meta(N, dim, dtype=dtype), meta(V, dim, dtype=dtype)
    bias = meta(V, dtype=dtype) if has_bias else None
    linear_statistics(hidden, weight, bias, targets, rows, count, compute_dtype=dtype, **options)
