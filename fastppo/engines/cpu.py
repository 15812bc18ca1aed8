"""The CPU engine: the passes of `fastppo.engines.chunked` in C++ (csrc/linear.h), near the matrix-multiply floor.

A bfloat16 `torch.mm` on a CPU comes rounded to bfloat16, and ∂h is a sum over vocabulary tiles that must not be rounded
tile by tile. oneDNN's microkernels, which PyTorch exports for the code that torch.compile generates, accumulate into
float32 instead, and use AMX or AVX512-BF16 as the machine has them. All three products run on these, a block of 64
tokens at a time, with the softmax done between them while the block is in the L2 cache. ∂h = ∂z W for N = 1,024,
D = 576, V = 49,152 in bfloat16, on one Zen 4 core (processor time), and its error against float64 over ∂h, both rms:

    torch.mm, one product                                    0.32 s   1.7e-3
    torch.mm in tiles of 1,024 columns, added in float32     0.35 s   1.7e-3
    torch.mm in tiles of 8,192 columns, added in float32     0.30 s   1.7e-3
    torch.mm of tiles converted to float32                   0.62 s   3.6e-7
    oneDNN's microkernel in tiles of 1,024 columns           0.28 s   5.2e-7    <- this

The microkernels are reached by name in PyTorch's library and tried out when this module is imported. Where that fails,
for float64, and for weights not stored row by row, `chunked` does the work.

Logits are computed once where there is memory to keep them: pass 1 leaves them, in 16 bits less an anchor of the row
(float32 for float32), in ∂weight's own memory, which nothing else uses before pass 2 has read them, and in what the
budget leaves over; pass 2 recomputes the rest. A terminal loss so costs between 6NDV and 8NDV.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.engines import chunked, engine, extension
from fastppo.engines.transform import LogitTransform

PANEL = 64  # csrc/rows.h: columns of a packed panel, tokens of a block
WIDTH = 1024  # vocabulary rows of a tile: a block of logits [64, 1024] leaves room in an L2 cache of 1 MiB

isa: str | None = None  # an instruction set that the tests force; None: the best there is


def _load_products() -> tuple[str, ...]:
    """Hand PyTorch's microkernels to the extension; the types of product that work here."""
    module = extension.load()
    library = (
        Path(torch.__file__).parent / "lib" / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")
    )
    if module is None or not library.exists():
        return ()
    long = "x" if sys.platform == "darwin" else "l"  # how the C++ ABI spells int64_t
    names = [
        f"_ZN2at6native7cpublas6brgemmE{6 * long}bPKfS3_Pfb",
        f"_ZN2at6native7cpublas6brgemmE{6 * long}bPKN3c108BFloat16ES5_Pfb",
        "_ZN2at6native7cpublas14brgemm_releaseEb",
    ]
    try:
        exported = ctypes.CDLL(str(library))
        symbols = [_address(getattr(exported, name)) for name in names]
    except (OSError, AttributeError):
        return ()
    # By way of PyTorch's library the search finds the OpenMP runtime that it is linked with, and no other.
    module.use_team(_address(getattr(exported, "GOMP_parallel", None)))
    return tuple(module.use_products(*symbols))


def _address(function) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


PRODUCTS = _load_products()


def why_slow() -> str | None:
    """Why this engine hands its work to `chunked`, in a line; None where it does not."""
    return (
        None if PRODUCTS else "this PyTorch does not export the matrix products that fastppo's C++ extension builds on"
    )


@torch.library.custom_op("fastppo::cpu_statistics", mutates_args=())
def statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_kind: str,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    budget: int,
) -> list[Tensor]:
    """See `fastppo.engines.chunked.statistics`."""
    options = (temperature, logit_scale, softcap, compute_dtype, budget)
    if not _serves(hidden, weight, ref_weight):
        return chunked.statistics(hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, kl_kind, *options)
    heads = _Heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl_kind)
    return heads.statistics(targets, *options)


statistics.register_fake(engine.fake_statistics)


@torch.library.custom_op("fastppo::cpu_vjp", mutates_args=())
def vjp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_kind: str,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    d_kl: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    budget: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastppo.engines.chunked.vjp`."""
    upstream = (d_logprobs, d_entropy, d_logsumexp, d_kl)
    options = (temperature, logit_scale, softcap, compute_dtype, budget)
    needs = (need_hidden, need_weight, need_bias)
    if not _serves(hidden, weight, ref_weight):
        return chunked.vjp(
            hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, kl_kind, saved, *upstream, *options, *needs
        )
    heads = _Heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl_kind)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0)
    d_hidden, d_bias = heads.vjp(targets, saved, upstream, *options, need_hidden, d_weight, need_bias)
    return d_hidden, d_weight, d_bias


vjp.register_fake(engine.fake_vjp)


class Store(NamedTuple):
    """Where logits wait between `keeping_statistics` and `keeping_vjp`."""

    d_weight: Tensor  # like weight, contiguous; in the end ∂weight
    ticket: Tensor  # [1] int64: names the contents of this thread's spare memory
    anchors: Tensor  # [N] float32: what was subtracted from a row's logits before they were rounded to 16 bits
    whole: Tensor  # [tiles] uint8: 1 where 16 bits could hold every logit of the tile


def keeps(hidden: Tensor, weight: Tensor, ref_weight: Tensor | None) -> bool:
    """Whether the two `keeping` operators serve these tensors; else `statistics` and `vjp` must do."""
    return _serves(hidden, weight, ref_weight)


@torch.library.custom_op("fastppo::cpu_keeping_statistics", mutates_args=())
def keeping_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_kind: str,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    budget: int,
) -> list[Tensor]:
    """What `statistics` returns, then a `Store` for `keeping_vjp` with the same arguments."""
    store = _open_store(hidden, weight, ref_weight, kl_kind, compute_dtype, budget)
    heads = _Heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl_kind)
    return [*heads.statistics(targets, temperature, logit_scale, softcap, compute_dtype, budget, store), *store]


@keeping_statistics.register_fake
def _(hidden, weight, bias, targets, ref_hidden, ref_weight, ref_bias, kl_kind, *options):
    store = _open_store(hidden, weight, ref_weight, kl_kind, *options[-2:])
    return [*(hidden.new_empty(targets.shape, dtype=torch.float32) for _ in range(8 if kl_kind else 4)), *store]


def _open_store(
    hidden: Tensor, weight: Tensor, ref_weight: Tensor | None, kl_kind: str, compute_dtype: torch.dtype, budget: int
) -> Store:
    tiling = _Tiling.choose(hidden.shape[0], weight, ref_weight if kl_kind else None, compute_dtype, budget)
    return Store(
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        weight.new_empty(1, dtype=torch.int64),
        weight.new_empty(hidden.shape[0], dtype=torch.float32),
        weight.new_empty(-(-weight.shape[0] // tiling.width), dtype=torch.uint8),
    )


class _Spare(threading.local):
    """A thread's memory for logits that ∂weight has no room for, reused since the first touch is what costs."""

    memory: Tensor | None = None
    ticket = 0

    def fill(self, num_bytes: int, store: Store) -> Tensor:
        """Memory for new contents, which `store` can claim until the next ones."""
        if self.memory is None or not num_bytes <= self.memory.numel() <= 2 * num_bytes:
            self.memory = None  # freed before its successor is there
            self.memory = torch.empty(num_bytes, dtype=torch.uint8)
        self.ticket += 1
        store.ticket.fill_(self.ticket)
        return self.memory

    def claim(self, store: Store) -> Tensor:
        if self.memory is None or store.ticket.item() != self.ticket:
            return store.whole.new_empty(0)  # overwritten since: those logits are computed again
        return self.memory


_spare = _Spare()


@torch.library.custom_op("fastppo::cpu_keeping_vjp", mutates_args=("d_weight",))
def keeping_vjp(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    kl_kind: str,
    saved: list[Tensor],
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    d_logsumexp: Tensor | None,
    d_kl: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    compute_dtype: torch.dtype,
    budget: int,
    need_hidden: bool,
    need_bias: bool,
    d_weight: Tensor,
    ticket: Tensor,
    anchors: Tensor,
    whole: Tensor,
) -> tuple[Tensor, Tensor]:
    """`vjp` from the store that `keeping_statistics` filled: ∂hidden and ∂bias; ∂weight is left in `d_weight`."""
    heads = _Heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl_kind)
    upstream = (d_logprobs, d_entropy, d_logsumexp, d_kl)
    options = (temperature, logit_scale, softcap, compute_dtype, budget)
    store = Store(d_weight, ticket, anchors, whole)
    return heads.vjp(targets, saved, upstream, *options, need_hidden, d_weight, need_bias, store)


@keeping_vjp.register_fake
def _(hidden, weight, bias, *args):
    need_hidden, need_bias = args[-6:-4]
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        bias.new_empty(bias.shape) if need_bias else weight.new_empty(0),
    )


class _Heads:
    """A model's head, and beside it the reference's where a divergence is asked for, as the extension takes them."""

    def __init__(self, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, kl_kind: str) -> None:
        self.hidden, self.weight, self.bias, self.kl_kind = hidden, weight, bias, kl_kind
        self.policy = _head(hidden, weight, bias)
        self.reference = _head(ref_hidden, ref_weight, ref_bias) if kl_kind else None
        self.ref_weight = ref_weight if kl_kind else None

    def statistics(
        self, targets, temperature, logit_scale, softcap, compute_dtype, budget, store: Store | None = None
    ) -> list[Tensor]:
        rows = (targets >= 0).nonzero().squeeze(-1)
        out = torch.zeros(8 if self.kl_kind else 4, targets.numel())
        tiling = self._tiling(rows.numel(), compute_dtype, budget, store)
        if rows.numel():
            extension.load().linear_statistics(
                self.policy,
                self.reference,
                transform_numbers(LogitTransform(temperature, logit_scale, softcap)),
                rows,
                targets,
                self._options(self.kl_kind, compute_dtype, tiling),
                self._kept(store, tiling, rows.numel(), compute_dtype, budget, fill=True),
                out,
            )
        return [x.clone() for x in out]

    def vjp(
        self, targets, saved, upstream, temperature, logit_scale, softcap, compute_dtype, budget,
        need_hidden: bool, d_weight: Tensor, need_bias: bool, store: Store | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(∂hidden, ∂bias), empty where not needed; ∂weight goes into `d_weight` unless that is empty."""
        valid = targets >= 0
        rows = engine.contributing(targets, upstream).nonzero().squeeze(-1)
        d_hidden = torch.zeros_like(self.hidden) if need_hidden else self.hidden.new_empty(0)
        if rows.numel() == 0:
            d_weight.zero_()
            return d_hidden, torch.zeros_like(self.bias) if need_bias else self.weight.new_empty(0)

        dim = self.weight.shape[1]
        need_weight = d_weight.numel() > 0
        sums = torch.zeros(_pad(rows.numel()), _pad(dim)) if need_hidden else None
        d_bias = torch.zeros(self.weight.shape[0]) if need_bias else None
        tiling = self._tiling(rows.numel(), compute_dtype, budget, store)
        with_kl = self.kl_kind if upstream[3] is not None else ""
        extension.load().linear_gradients(
            self.policy,
            self.reference if with_kl else None,
            transform_numbers(LogitTransform(temperature, logit_scale, softcap)),
            rows,
            targets,
            self._options(with_kl, compute_dtype, tiling),
            self._kept(store, tiling, int(valid.sum()), compute_dtype, budget, fill=False),
            None if store is None else (valid.cumsum(0) - 1)[rows],
            row_scalars(rows, saved, upstream),
            None if sums is None else sums.view(-1),
            d_weight if need_weight else None,
            d_bias,
        )
        if need_hidden:
            d_hidden[rows] = sums[: rows.numel(), :dim].to(d_hidden.dtype)
        return d_hidden, d_bias.to(self.bias.dtype) if need_bias else self.weight.new_empty(0)

    def _tiling(self, rows: int, compute_dtype: torch.dtype, budget: int, store: Store | None) -> _Tiling:
        # With a store both passes must cut the vocabulary alike, however many rows each of them has.
        rows = rows if store is None else self.hidden.shape[0]
        return _Tiling.choose(rows, self.weight, self.ref_weight, compute_dtype, budget)

    def _options(self, kl_kind: str, compute_dtype: torch.dtype, tiling: _Tiling) -> tuple:
        operand = (
            "bfloat16"
            if compute_dtype == torch.bfloat16
            else "float16"
            if _halves(self.hidden, compute_dtype)
            else "float32"
        )
        compute = "bfloat16" if _product_size(compute_dtype) == 2 else "float32"
        return kl_kind, operand, compute, tiling.width, tiling.block, torch.get_num_threads(), isa

    def _kept(
        self, store: Store | None, tiling: _Tiling, rows: int, compute_dtype: torch.dtype, budget: int, *, fill: bool
    ) -> tuple | None:
        """Where each tile's logits [rows, width] go: into ∂weight's memory, into spare memory, or nowhere."""
        if store is None or rows == 0:
            return None
        slot = rows * tiling.width * (2 if _halves(self.hidden, compute_dtype) else 4)
        memory = store.d_weight.view(-1).view(torch.uint8)
        tiles = store.whole.numel()
        # A tile's rows of ∂weight must end before the next tile's slot starts.
        stride = max(slot, tiling.width * self.weight.shape[1] * self.weight.element_size())
        front = min(tiles, (memory.numel() - slot) // stride + 1) if memory.numel() >= slot else 0
        back = min(tiles - front, max(budget - tiling.bytes, 0) // slot)
        spare = _spare.fill(back * slot, store) if fill else _spare.claim(store)
        back = min(back, spare.numel() // slot)
        return memory, stride, front, spare, back, rows, store.anchors, store.whole


def row_scalars(rows: Tensor, saved: list[Tensor], upstream: tuple[Tensor | None, ...]) -> Tensor:
    """[9, n] float32: row_max, log_sum, a, b, c, d_kl, kl_center, ref_row_max, ref_log_sum of csrc/linear.h.

    ∂z = p (a + b log p) + c [v = target] + d_kl · (the divergence's own term). Without a divergence only five rows.
    """
    d_logprobs, d_entropy, d_logsumexp, d_kl = (None if g is None else g[rows].float() for g in upstream)
    entropy, row_max, log_sum = (x[rows] for x in saved[1:4])
    zero = torch.zeros_like(entropy)
    c = zero if d_logprobs is None else d_logprobs
    a = -c if d_logsumexp is None else d_logsumexp - c
    b = zero if d_entropy is None else -d_entropy
    if d_entropy is not None:
        a = a - d_entropy * entropy
    divergence = [] if d_kl is None else [d_kl, *(x[rows] for x in saved[5:8])]
    return torch.stack([row_max, log_sum, a, b, c, *divergence])


class _Tiling(NamedTuple):
    """How the vocabulary and the tokens are cut.

    Wide tiles share the packing of ∂W's other factor and the passes over ∂h among more products; a token's part of them
    must stay in the L2 cache. Every stretch of tokens costs a float32 ∂W tile and packing the hidden states anew.
    """

    width: int  # vocabulary rows of a tile
    block: int  # tokens whose ∂zᵀ is collected for one ∂W product
    bytes: int  # scratch that takes

    @classmethod
    def choose(
        cls, rows: int, weight: Tensor, ref_weight: Tensor | None, compute_dtype: torch.dtype, budget: int
    ) -> _Tiling:
        size = _product_size(compute_dtype)
        width, block = min(WIDTH, _pad(weight.shape[0])), _pad(max(rows, 1))
        while True:
            tiling = cls(width, block, _scratch_bytes(width, block, rows, weight, ref_weight, size))
            if tiling.bytes <= budget or (width == PANEL and block == PANEL):
                return tiling
            if block > 2 * width or width == PANEL:
                block = _pad(block // 2)
            else:
                width = _pad(width // 2)


def _scratch_bytes(width: int, block: int, rows: int, weight: Tensor, ref_weight: Tensor | None, size: int) -> int:
    """What csrc/linear.cpp takes, at most, for either pass."""
    dim, ref_dim = _pad(weight.shape[1]), 0 if ref_weight is None else _pad(ref_weight.shape[1])
    packed = width * 2 * (dim + ref_dim) * size
    shared = (block + 32) * width * size + block * dim * size + (width * dim * 4 if rows > block else 0)
    block_of_logits = PANEL * width * (4 if ref_weight is None else 8)
    converted = PANEL * width * size if size == 2 else 0
    each = PANEL * max(dim, ref_dim) * size + block_of_logits + converted + PANEL * dim * 4
    return packed + shared + torch.get_num_threads() * each


def _pad(n: int) -> int:
    return -(-n // PANEL) * PANEL


def _product_size(compute_dtype: torch.dtype) -> int:
    """Bytes of an operand of the products: bfloat16 where this machine multiplies it, else float32."""
    return 2 if compute_dtype == torch.bfloat16 and "bfloat16" in PRODUCTS else 4


def _halves(hidden: Tensor, compute_dtype: torch.dtype) -> bool:
    """Whether logits are kept in 16 bits: where the inputs have no more."""
    return compute_dtype == torch.bfloat16 or hidden.dtype == torch.float16


def _serves(hidden: Tensor, weight: Tensor, ref_weight: Tensor | None) -> bool:
    """float64, weights that are not stored row by row, and a PyTorch without the products, or with oneDNN switched off,
    are left to `chunked`."""
    weights = [weight] if ref_weight is None else [weight, ref_weight]
    return (
        bool(PRODUCTS)
        and torch.backends.mkldnn.enabled
        and all(x.dtype != torch.float64 and _has_rows(x) for x in weights)
    )


def _has_rows(x: Tensor) -> bool:
    return x.shape[1] == 1 or x.stride(1) == 1


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    hidden = hidden.detach()
    bias = None if bias is None else bias.detach().float().contiguous()
    return hidden if _has_rows(hidden) else hidden.contiguous(), weight.detach(), bias


def transform_numbers(transform: LogitTransform) -> tuple[float, float, float]:
    """(scale, inner, cap) of csrc/rows.h."""
    temperature, logit_scale, softcap = transform
    scale = logit_scale / temperature
    return (scale, 0.0, 0.0) if softcap is None else (scale, logit_scale / softcap, softcap / temperature)
