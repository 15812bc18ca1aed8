"""The calls that the ahead-of-time gate makes, on meta tensors: one for each way the dispatcher can choose.

Shapes are those of Llama-3-8B (D 4,096, V 128,256), and a hidden size that is no multiple of 16 bytes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastppo_kernels import clipped_loss, fisher, gae, linear, loss, scale, selective
from fastppo_kernels.tune import products_by, products_in

N, D, V = 8192, 4096, 128256
BUDGET = 256 * 2**20
HALF = (torch.bfloat16, torch.float16)
CAPPED = {"temperature": 0.7, "logit_scale": 0.5, "softcap": 30.0}
PLAIN = {"temperature": 1.0, "logit_scale": 1.0, "softcap": None}


class LinearCase(NamedTuple):
    """A call of `linear.statistics` and `linear.vjp`, and of `loss.loss_by_rows` with entropy and without."""

    label: str
    dtype: torch.dtype
    dim: int = D
    bias: bool = False
    transform: dict = PLAIN
    kind: str = ""
    weight_dtype: torch.dtype | None = None
    tf32: bool = False
    products: str = "cublas"

    def run(self) -> None:
        def head(dim: int) -> tuple:
            weight = meta(V, dim, dtype=self.weight_dtype or self.dtype)
            return meta(N, dim, dtype=weight.dtype), weight, meta(V, dtype=weight.dtype) if self.bias else None

        def scalars(saved: torch.Tensor, span: slice, entropy: bool) -> tuple:
            return saved[0, span], saved[1, span] if entropy else None

        targets = meta(N, dtype=torch.int64)
        reference = head(D // 2) if self.kind else (None, None, None)
        arguments = (*head(self.dim), targets, *reference, self.kind)
        options = (*self.transform.values(), self.dtype)
        saved = [meta(N) for _ in range(8 if self.kind else 4)]
        upstream = (None, None, None, meta(N)) if self.kind else (meta(N), meta(N), None, None)
        with products_in("tf32" if self.tf32 else "ieee"), products_by(self.products):
            linear.statistics(*arguments, *options, BUDGET)
            linear.vjp(*arguments, saved, *upstream, *options, BUDGET, True, True, self.bias)
            for entropy in (True, False) if not self.kind and self.dtype != torch.float16 else ():
                row_scalars = functools.partial(scalars, entropy=entropy)
                loss.loss_by_rows(
                    *arguments[:4], row_scalars, *options, N // 2, BUDGET, True, True, self.bias
                )  # fmt: skip


LINEAR_CASES = (
    LinearCase("bf16", torch.bfloat16),
    LinearCase("bf16 Triton products", torch.bfloat16, products="triton"),
    LinearCase("bf16 bias softcap", torch.bfloat16, bias=True, transform=CAPPED),
    LinearCase("fp16 bias softcap", torch.float16, bias=True, transform=CAPPED),
    LinearCase("bf16 odd D", torch.bfloat16, dim=4097),
    LinearCase("fp32 ieee", torch.float32),
    LinearCase("fp32 tf32", torch.float32, tf32=True),
    LinearCase("bf16 autocast", torch.bfloat16, weight_dtype=torch.float32),
    LinearCase("bf16 reverse", torch.bfloat16, kind="reverse"),
    LinearCase("bf16 forward bias softcap", torch.bfloat16, bias=True, transform=CAPPED, kind="forward"),
)


class FisherCase(NamedTuple):
    """A call of `fisher.fisher_vector_product`, with the weight constant and with a direction for it."""

    label: str
    dtype: torch.dtype
    dim: int = D
    bias: bool = False
    transform: dict = PLAIN

    def run(self) -> None:
        weights = [meta(V, self.dim, dtype=self.dtype) for _ in range(2)]
        rows = [meta(N, self.dim, dtype=self.dtype) for _ in range(2)]
        bias = meta(V, dtype=self.dtype) if self.bias else None
        options = (meta(N), *self.transform.values(), self.dtype, BUDGET)
        fisher.fisher_vector_product(rows[0], weights[0], bias, rows[1], None, None, *options)
        fisher.fisher_vector_product(rows[0], weights[0], bias, rows[1], weights[1], bias, *options)


FISHER_CASES = (
    FisherCase("bf16 fisher", torch.bfloat16),
    FisherCase("fp16 fisher bias softcap", torch.float16, bias=True, transform=CAPPED),
    FisherCase("bf16 fisher odd D", torch.bfloat16, dim=4097),
)


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(label, call) pairs."""
    return [
        *((case.label, case.run) for case in (*LINEAR_CASES, *FISHER_CASES)),
        ("bfloat16 logits", functools.partial(selective_case, torch.bfloat16, PLAIN)),
        *(
            (f"{str(d).removeprefix('torch.')} logits softcap", functools.partial(selective_case, d, CAPPED))
            for d in (torch.bfloat16, torch.float32)
        ),
        *((f"loss gradient {str(d).removeprefix('torch.')}", functools.partial(scale_case, d)) for d in HALF),
        *((f"loss {level} {estimator}", functools.partial(loss_case, level, estimator)) for level, estimator in LOSSES),
        ("padded", gae_padded),
        ("packed, long", gae_packed),
    ]


def selective_case(dtype: torch.dtype, transform: dict) -> None:
    logits, targets = meta(N, V, dtype=dtype), meta(N, dtype=torch.int64)
    options = transform.values()
    saved = selective.statistics(logits, None, targets, *options)
    selective.vjp_into(logits, logits, None, targets, saved, meta(N), meta(N), None, None, *options)
    saved = selective.statistics(logits, logits, targets, *options)
    selective.vjp_into(logits, logits, logits, targets, saved, meta(N), meta(N), None, meta(N), *options)


def scale_case(dtype: torch.dtype) -> None:
    scale.scale_(meta(V, D, dtype=dtype), meta())


LOSSES = (("sequence-geometric", "k3"), ("token", "k1"), ("token", "exact"))


def loss_case(level: str, estimator: str) -> None:
    rows, tokens = [meta(N) for _ in range(3)], [meta(8, N // 8) for _ in range(3)]
    importance_weights = meta(8, N // 8) if level == "token" else None
    loss_agg = "token-mean" if level == "token" else "seq-mean-token-mean"
    clipped_loss.clipped_loss(
        *rows, meta(8, N // 8, dtype=torch.bool), *tokens, importance_weights,
        0.2, 0.2, None, level, 0.1, estimator, 0.01, loss_agg,
    )  # fmt: skip


def gae_padded() -> None:
    tokens, flags = (meta(4096, 1024) for _ in range(2)), (meta(4096, 1024, dtype=torch.bool) for _ in range(2))
    gae.gae(*tokens, *flags, meta(4096), None, 0.99, 0.95)


def gae_packed() -> None:
    tokens, flags = (meta(2**21) for _ in range(2)), (meta(2**21, dtype=torch.bool) for _ in range(2))
    gae.gae(*tokens, *flags, meta(2), meta(3, dtype=torch.int64), 0.99, 0.95, whiten=True)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
