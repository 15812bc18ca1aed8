"""Tile sizes, pipeline depths and warps: data, apart from the kernels, each proved by `python -m fastppo_kernels.aot`.

GEMM is looked up by kernel, architecture and precision. Architectures: sm_80 also serves sm_86, sm_89 and sm_120, whose
shared memory is 99 KiB, so its entries stay below that; sm_90 and sm_100 have 227 KiB. `interpreter` is Triton's CPU
interpreter. Precisions: `half` is bfloat16 and float16; `tf32` and `ieee` are float32 by request and by default. Where
there is an entry `… capped`, it serves logits with a softcap, whose tanh needs registers.

`python -m fastppo_kernels.tune` measures alternatives on the chip at hand; what it writes is read back from the file
that FASTPPO_TUNED names, in place of the entries here.
"""

from typing import NamedTuple


class Gemm(NamedTuple):
    """block_m × block_n of the output a tile, block_k of the inner size at a time; group_m row blocks share L2.

    per_processor: programs a processor, each of which takes tile after tile; 0 gives every tile a program of its own.
    flatten: the loads of such a program's next tile begin while the epilogue of the last one runs (in `statistics`,
    without bias and softcap).
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 16
    per_processor: int = 1
    flatten: bool = False


class Elementwise(NamedTuple):
    """rows × block elements a program."""

    rows: int
    block: int
    warps: int


class Ceilings(NamedTuple):
    """What a chip can do at most: the rates of half-precision products and of memory, in FLOP/s and bytes/s."""

    flops_per_s: float
    bytes_per_s: float


def _for_each(precisions: dict[str, Gemm], *architectures: str) -> dict[tuple[str, str], Gemm]:
    return {(arch, precision): config for arch in architectures for precision, config in precisions.items()}


_ALL = ("sm_80", "sm_90", "sm_100")
_INTERPRETER = _for_each(
    {kind: Gemm(32, 32, 16, warps=1, stages=1, group_m=2) for kind in ("half", "ieee")}, "interpreter"
)

# One accumulator.
_ONE = {
    **_for_each(
        {
            "half": Gemm(128, 128, 32, warps=8, stages=4),
            "tf32": Gemm(128, 128, 32, warps=8, stages=3),
            "ieee": Gemm(64, 64, 16, warps=8, stages=3),
        },
        *_ALL,
    ),
    **_INTERPRETER,
}

# Two accumulators at once: the policy's and the reference's, or the logits and their derivative.
_TWO = {
    **_for_each(
        {
            "half": Gemm(128, 64, 64, warps=8, stages=3),
            "tf32": Gemm(64, 64, 32, warps=8, stages=3),
            "ieee": Gemm(32, 32, 16, warps=4, stages=3),
        },
        *_ALL,
    ),
    ("sm_80", "half"): Gemm(64, 128, 32, warps=8, stages=3),
    ("sm_80", "ieee"): Gemm(64, 32, 16, warps=4, stages=3),
    ("sm_90", "half"): Gemm(128, 128, 64, warps=8, stages=3),
    ("sm_100", "half"): Gemm(128, 128, 64, warps=8, stages=3),
    ("sm_100", "half capped"): Gemm(128, 64, 64, warps=8, stages=3),
    **_INTERPRETER,
}
_FISHER = {
    **_TWO,
    ("sm_100", "half capped"): Gemm(128, 64, 32, warps=8, stages=3),
    ("sm_100", "tf32"): Gemm(64, 32, 32, warps=4, stages=3),
}
_FISHER_GRADIENT = {**_FISHER, ("sm_80", "tf32"): Gemm(64, 64, 16, warps=8, stages=3)}

_WIDE = Gemm(128, 256, 64, warps=8, stages=3)
_STATISTICS = {
    **_ONE,
    ("sm_90", "half"): _WIDE._replace(flatten=True),
    ("sm_100", "half"): _WIDE,
    ("sm_100", "half capped"): Gemm(128, 128, 64, warps=8, stages=4),
}
_PRODUCT = {
    **_ONE,
    **_for_each({kind: Gemm(128, 64, 32, warps=8, stages=3) for kind in ("half", "tf32")}, "sm_80"),
    ("sm_90", "half"): _WIDE,
    ("sm_100", "half"): Gemm(128, 128, 64, warps=8, stages=4),
}

GEMM: dict[str, dict[tuple[str, str], Gemm]] = {
    "linear_statistics": dict(_STATISTICS),
    "anchored_statistics": dict(_STATISTICS),
    "anchored_store": dict(_STATISTICS),
    "logit_gradient": {
        **_ONE,
        ("sm_90", "half"): Gemm(128, 256, 64, warps=8, stages=4),
        ("sm_90", "half capped"): Gemm(128, 128, 64, warps=8, stages=4),
        ("sm_100", "half"): Gemm(128, 128, 64, warps=8, stages=4),
    },
    "linear_divergence": {**_TWO, ("sm_90", "half capped"): Gemm(128, 64, 64, warps=8, stages=3)},
    "logit_gradient_kl": {**_TWO, ("sm_90", "half capped"): Gemm(128, 64, 64, warps=8, stages=3)},
    "fisher_statistics": {**_FISHER, ("sm_100", "half capped"): Gemm(128, 32, 64, warps=8, stages=3)},
    "fisher_statistics_weight": dict(_FISHER),
    "fisher_gradient": dict(_FISHER_GRADIENT),
    "fisher_gradient_weight": {**_FISHER_GRADIENT, ("sm_100", "half"): Gemm(128, 128, 64, warps=8, stages=2)},
    "product_rows": dict(_PRODUCT),
    "product_columns": {**_PRODUCT, ("sm_80", "ieee"): Gemm(64, 32, 16, warps=4, stages=3)},
}

# Who multiplies ∂logits with the weight and with the hidden states: "cublas" over all rows there are, those that do not
# contribute as zeros, "triton" over the contributing rows alone, or None: as `products.by_triton` decides.
PRODUCTS = None

ELEMENTWISE: dict[str, Elementwise] = {
    "compact_rows": Elementwise(rows=1, block=2048, warps=8),
    "gather_rows": Elementwise(rows=4, block=512, warps=4),
    "scatter_rows": Elementwise(rows=4, block=512, warps=4),
    "target_logits": Elementwise(rows=1, block=1024, warps=4),
    "combine": Elementwise(rows=32, block=16, warps=4),
    "write_targets": Elementwise(rows=1, block=4096, warps=4),
    "stored_gradient": Elementwise(rows=1, block=2048, warps=8),
    "gae": Elementwise(rows=1, block=512, warps=2),
    "gae_long": Elementwise(rows=1, block=1024, warps=4),
    "gae_whiten": Elementwise(rows=1, block=2048, warps=4),
    "selective_statistics": Elementwise(rows=1, block=4096, warps=8),
    "selective_statistics_kl": Elementwise(rows=1, block=2048, warps=8),
    "selective_gradient": Elementwise(rows=1, block=1024, warps=2),
}

# Nominal, from the maker's data sheets (A100, H100, B200: dense bfloat16, memory): only their quotient decides between
# tilings. `tune` puts what it measures in their place.
CEILINGS: dict[str, Ceilings] = {
    "sm_80": Ceilings(312e12, 2.0e12),
    "sm_90": Ceilings(989e12, 3.35e12),
    "sm_100": Ceilings(2250e12, 8.0e12),
    "interpreter": Ceilings(989e12, 3.35e12),  # so that the tests take the ways a GPU would
}
