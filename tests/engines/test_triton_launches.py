"""What the Triton kernels' host code asks of the machine: few compilations, no waiting. Nothing is compiled or run.

The public functions of `fastppo_kernels` run on meta tensors, which have no values to wait for, and what they would
launch is recorded.
"""

from __future__ import annotations

import importlib.util
import itertools
import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not specialize"),
]

DIM, BUDGET = 576, 2**26
NUMBERS_OF_ROWS = [1, 2, 16, 17, 63, 64, 100, 127, 128, 129, 250, 256, 999, 1000, 1024, 1500, 2048, 3001, 4096, 5000]


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def statistics(n: int, vocab: int) -> None:
    from fastppo_kernels import linear

    linear.statistics(*head(n, vocab), None, None, None, "", 1.0, 1.0, None, torch.bfloat16, BUDGET)


def head(n: int, vocab: int) -> tuple:
    return meta(n, DIM), meta(vocab, DIM), None, meta(n, dtype=torch.int64)


def vjp(n: int, vocab: int) -> None:
    from fastppo_kernels import linear

    rows = [x.clone() for x in meta(4, n, dtype=torch.float32)]
    linear.vjp(
        *head(n, vocab), None, None, None, "", rows, rows[0], rows[1], None, None, 1.0, 1.0, None, torch.bfloat16,
        BUDGET, True, True, False,
    )  # fmt: skip


def divergence(n: int, vocab: int) -> None:
    from fastppo_kernels import linear

    arguments = (*head(n, vocab), meta(n, DIM // 2), meta(vocab, DIM // 2), None, "reverse")
    options = (1.0, 1.0, None, torch.bfloat16, BUDGET)
    linear.statistics(*arguments, *options)
    rows = [x.clone() for x in meta(8, n, dtype=torch.float32)]
    linear.vjp(*arguments, rows, None, None, None, rows[0], *options, True, True, False)


def loss_without_entropy(n: int, vocab: int) -> None:
    loss(n, vocab, with_entropy=False)


def loss_with_entropy(n: int, vocab: int) -> None:
    loss(n, vocab, with_entropy=True)


def loss(n: int, vocab: int, *, with_entropy: bool) -> None:
    from fastppo_kernels.loss import loss_by_rows

    loss_by_rows(
        *head(n, vocab), lambda saved, span: (saved[0, span], saved[1, span] if with_entropy else None), 1.0, 1.0, None,
        torch.bfloat16, n, BUDGET, True, True, False,
    )  # fmt: skip


def fisher(n: int, vocab: int) -> None:
    from fastppo_kernels.fisher import fisher_vector_product

    hidden, weight, *_ = head(n, vocab)
    fisher_vector_product(
        hidden, weight, None, hidden, weight, None, meta(n, dtype=torch.float32), 1.0, 1.0, None, torch.bfloat16, BUDGET
    )


def scale(n: int, vocab: int) -> None:
    from fastppo_kernels.scale import scale_

    scale_(meta(vocab, DIM), meta(dtype=torch.float32))


def advantages(n: int, vocab: int) -> None:
    from fastppo_kernels.gae import gae

    tokens, flags = (meta(n, 64, dtype=d) for d in (torch.float32, torch.bool))
    gae(tokens, tokens, flags, flags, meta(n, dtype=torch.float32), None, 0.99, 0.95)


def packed_advantages(n: int, vocab: int) -> None:
    """One sequence of unknown length for each 64 tokens, whitened."""
    from fastppo_kernels.gae import gae

    tokens, flags = (meta(n * 64, dtype=d) for d in (torch.bfloat16, torch.bool))
    cu_seqlens = meta(n + 1, dtype=torch.int32)
    gae(tokens, tokens, flags, None, None, cu_seqlens, 0.99, 0.95, whiten=True)


def from_logits(n: int, vocab: int) -> None:
    from fastppo_kernels import selective

    logits, targets = meta(n, vocab), meta(n, dtype=torch.int64)
    saved = selective.statistics(logits, None, targets, 1.0, 1.0, None)
    rows = meta(n, dtype=torch.float32)
    selective.vjp_into(logits, logits, None, targets, saved, rows, rows, None, None, 1.0, 1.0, None)


def clipped_loss(n: int, vocab: int) -> None:
    clipped(n, 1, "token")


def clipped_loss_of_sequences(n: int, vocab: int) -> None:
    clipped(1 + n // 64, min(n, 64), "sequence")


def clipped(sequences: int, tokens: int, level: str) -> None:
    from fastppo_kernels.clipped_loss import clipped_loss

    x, mask = meta(sequences, tokens, dtype=torch.float32), meta(sequences, tokens, dtype=torch.bool)
    clipped_loss(x, x, None, mask, x, x, x, x, 0.2, 0.2, None, level, 0.1, "k3", 0.01, "token-mean")


CALLS = [
    statistics, vjp, divergence, loss_without_entropy, loss_with_entropy, fisher, scale, advantages, packed_advantages,
    from_logits, clipped_loss, clipped_loss_of_sequences,
]  # fmt: skip


@pytest.fixture
def launches():
    """Calls a function and returns what it would launch on an H100: (kernel, arguments, options) each."""
    from fastppo_kernels.launch import recording

    def record(call, *arguments):
        found = []
        with recording("sm_90", lambda *launch: found.append(launch)):
            call(*arguments)
        return found

    return record


def compile_key(kernel, arguments, options) -> tuple:
    """What Triton's just-in-time compiler would look up, and compile where it has not met it yet."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, compile_options = binder(*arguments, debug=False, **options)
    return kernel.fn.__name__, str(specialization), str(sorted(compile_options.items()))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("vocab", [50_257, 49_152])
@pytest.mark.parametrize("products", ["cublas", "triton"])
def test_a_new_number_of_tokens_compiles_hardly_anything(call, vocab, products, launches, monkeypatch):
    """The keys of a kernel that one call launches in several forms, over 20 numbers of rows: at most one form more."""
    from fastppo_kernels import configs

    monkeypatch.setattr(configs, "PRODUCTS", products)

    def keys(n: int) -> set[tuple]:
        return {compile_key(*launch) for launch in launches(call, n, vocab)}

    one_call, all_calls = keys(1000), set().union(*map(keys, NUMBERS_OF_ROWS))
    for kernel, group in itertools.groupby(sorted(all_calls), key=lambda key: key[0]):
        forms = sum(key[0] == kernel for key in one_call)
        assert len(list(group)) <= forms + 1, kernel


@pytest.mark.parametrize("call", [statistics, vjp, divergence, loss_without_entropy, loss_with_entropy, fisher])
@pytest.mark.parametrize("products", ["cublas", "triton"])
def test_rows_of_every_matrix_are_aligned_whatever_the_vocabulary(call, products, launches, monkeypatch):
    """50,257 columns of bfloat16 would begin at any even address: narrow stores, and cuBLAS's slow kernels."""
    from fastppo_kernels import configs
    from triton.tools.tensor_descriptor import TensorDescriptor

    monkeypatch.setattr(configs, "PRODUCTS", products)
    described = [x for _, arguments, _ in launches(call, 1000, 50_257) for x in arguments]
    described = [x for x in described if isinstance(x, TensorDescriptor)]
    assert described
    for x in described:
        assert x.base.storage_offset() * x.base.element_size() % 16 == 0
        assert x.strides[0] * x.base.element_size() % 32 == 0


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait: values asked for, and copies between host and device."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name, options = str(function), options or {}
        for waits in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "aten.equal"):
            assert waits not in name, name
        indices = arguments[1] if "aten.index" in name and isinstance(arguments[1], list | tuple) else ()
        assert all(i is None or i.dtype != torch.bool for i in indices), f"{name} counts the True ones"
        tensors = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]
        out = function(*arguments, **options)
        if isinstance(out, torch.Tensor):
            tensors.append(out)
        assert len({x.device for x in tensors if x.dim()}) <= 1, f"{name} copies between devices"
        return out


@pytest.mark.parametrize("call", CALLS)
def test_the_host_never_waits(call, launches):
    with NoWaiting():
        launches(call, 1000, 50_257)


def test_the_mode_sees_what_waits():
    x = torch.arange(4)
    for wait in (lambda: x.sum().item(), lambda: x[x > 1], lambda: x.to("meta")):
        with pytest.raises(AssertionError), NoWaiting():
            wait()
