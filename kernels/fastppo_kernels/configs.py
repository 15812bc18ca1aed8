"""Tile sizes, pipeline depths and warps: data, apart from the kernels, each proved by `python -m fastppo_kernels.aot`.

GEMM is looked up by kernel, architecture and precision. Architectures: sm_80 also serves sm_86, sm_89 and sm_120, whose
shared memory is 99 KiB, so its entries stay below that; sm_90 and sm_100 have 227 KiB; gfx942 (MI300) has 64 KiB and
gfx950 (MI350) 160 KiB. `odd` serves hidden sizes that are no multiple of 16 on every chip: rows are then not aligned,
and loads are narrow. `interpreter` is Triton's CPU interpreter. Precisions: `half` is bfloat16 and float16; `mixed` is
a float32 weight that is cast to half on its way to the tensor cores (autocast); `tf32` and `ieee` are float32 by
request and by default. Where there is an entry `… capped`, it serves logits with a softcap, whose tanh needs registers.

`python -m fastppo_kernels.tune` measures alternatives on the chip at hand; what it writes is read back from the file
that FASTPPO_TUNED names, in place of the entries here.
"""

from typing import NamedTuple


class Gemm(NamedTuple):
    """block_m rows × block_n vocabulary columns, block_k of the hidden size at a time; group_m row blocks share L2.

    tma: operands that allow it come through TMA descriptors. compact: the statistics first bring their rows together
    (N · D of memory), so that both operands do. specialize: producer and consumer warps are split, which needs that.
    flatten: the loops over columns and hidden size become one, so that the pipeline never drains between tiles.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 16
    tma: bool = False
    compact: bool = False
    specialize: bool = False
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


_NVIDIA, _AMD = ("sm_80", "sm_90", "sm_100"), ("gfx942", "gfx950")
_INTERPRETER = Gemm(32, 32, 16, warps=1, stages=1, group_m=2)

# One accumulator alive at a time.
_ONE = {
    **_for_each(
        {
            "half": Gemm(128, 128, 32, warps=8, stages=4),
            "mixed": Gemm(128, 128, 32, warps=8, stages=3),
            "tf32": Gemm(128, 128, 32, warps=8, stages=4),
            "ieee": Gemm(64, 64, 16, warps=4, stages=3),
        },
        *_NVIDIA,
    ),
    ("sm_80", "tf32"): Gemm(128, 128, 32, warps=8, stages=3),
    **_for_each(
        {
            "half": Gemm(128, 128, 64, warps=8, stages=2),
            "mixed": Gemm(128, 64, 32, warps=8, stages=2),
            "ieee": Gemm(128, 64, 32, warps=8, stages=2),
        },
        *_AMD,
    ),
    **_for_each(
        {
            "half": Gemm(64, 64, 32, warps=4, stages=3),
            "mixed": Gemm(64, 64, 32, warps=4, stages=3),
            "tf32": Gemm(64, 64, 32, warps=4, stages=3),
            "ieee": Gemm(64, 64, 16, warps=4, stages=3),
        },
        "odd",
    ),
    **_for_each(
        {
            "half": Gemm(64, 64, 32, warps=4, stages=2),
            "mixed": Gemm(64, 64, 32, warps=4, stages=2),
            "ieee": Gemm(64, 64, 16, warps=4, stages=2),
        },
        "gfx odd",
    ),
    **_for_each({"half": _INTERPRETER, "ieee": _INTERPRETER}, "interpreter"),
}

# Two accumulators at once: the policy's and the reference's.
_TWO = {
    **_for_each(
        {
            "half": Gemm(128, 64, 64, warps=8, stages=3),
            "mixed": Gemm(64, 64, 32, warps=4, stages=3),
            "tf32": Gemm(128, 64, 32, warps=8, stages=3),
            "ieee": Gemm(32, 32, 16, warps=4, stages=3),
        },
        *_NVIDIA,
    ),
    ("sm_80", "half"): Gemm(128, 64, 32, warps=8, stages=3),
    ("sm_80", "mixed"): Gemm(64, 64, 32, warps=8, stages=3),
    ("sm_80", "tf32"): Gemm(64, 64, 32, warps=8, stages=3),
    **_for_each(
        {
            "half": Gemm(128, 64, 64, warps=8, stages=2),
            "mixed": Gemm(64, 64, 32, warps=8, stages=2),
            "ieee": Gemm(64, 64, 32, warps=8, stages=2),
        },
        *_AMD,
    ),
    **_for_each(
        {
            "half": Gemm(64, 32, 32, warps=4, stages=3),
            "mixed": Gemm(64, 32, 32, warps=4, stages=3),
            "tf32": Gemm(64, 32, 32, warps=4, stages=3),
            "ieee": Gemm(32, 32, 16, warps=4, stages=3),
        },
        "odd",
    ),
    **_for_each(
        {
            "half": Gemm(64, 32, 32, warps=8, stages=2),
            "mixed": Gemm(64, 32, 32, warps=8, stages=2),
            "ieee": Gemm(32, 32, 16, warps=4, stages=2),
        },
        "gfx odd",
    ),
    **_for_each({"half": _INTERPRETER, "ieee": _INTERPRETER}, "interpreter"),
}

# Two accumulators, and four operands in flight with a direction for the weight, three without.
_FISHER = {
    **_for_each(
        {
            "half": Gemm(128, 128, 64, warps=8, stages=3, tma=True),
            "mixed": Gemm(64, 64, 32, warps=4, stages=3),
            "tf32": Gemm(128, 64, 32, warps=8, stages=3),
            "ieee": Gemm(32, 64, 16, warps=4, stages=3),
        },
        *_NVIDIA,
    ),
    ("sm_80", "half"): Gemm(128, 64, 32, warps=8, stages=4),
    ("sm_80", "mixed"): Gemm(64, 64, 32, warps=8, stages=3),
    ("sm_80", "tf32"): Gemm(64, 64, 32, warps=8, stages=3),
    # Triton 3.6 cannot pipeline two products that share a weight tile which is cast on its way.
    ("sm_100", "mixed"): Gemm(64, 64, 32, warps=4, stages=1),
    **_for_each(
        {
            "half": Gemm(64, 64, 64, warps=8, stages=2),
            "mixed": Gemm(64, 64, 32, warps=8, stages=2),
            "ieee": Gemm(64, 64, 16, warps=8, stages=2),
        },
        *_AMD,
    ),
    **_for_each(
        {
            "half": Gemm(64, 32, 32, warps=4, stages=3),
            "mixed": Gemm(64, 32, 32, warps=4, stages=3),
            "tf32": Gemm(64, 32, 32, warps=4, stages=3),
            "ieee": Gemm(32, 64, 16, warps=4, stages=3),
        },
        "odd",
    ),
    **_for_each(
        {
            "half": Gemm(64, 32, 32, warps=8, stages=2),
            "mixed": Gemm(64, 32, 32, warps=8, stages=2),
            "ieee": Gemm(32, 32, 16, warps=4, stages=2),
        },
        "gfx odd",
    ),
    **_for_each({"half": _INTERPRETER, "ieee": _INTERPRETER}, "interpreter"),
}
_FISHER_WEIGHT = {
    **_FISHER,
    ("sm_100", "half capped"): Gemm(128, 64, 64, warps=8, stages=4, tma=True),
    ("sm_100", "mixed"): Gemm(64, 64, 32, warps=4, stages=3),
    ("sm_100", "tf32"): Gemm(64, 64, 32, warps=4, stages=4),
}

GEMM: dict[str, dict[tuple[str, str], Gemm]] = {
    "linear_statistics": {
        **_ONE,
        ("sm_90", "half"): Gemm(128, 256, 64, warps=8, stages=3, tma=True),
        ("sm_100", "half"): Gemm(128, 256, 64, warps=8, stages=4, tma=True, flatten=True),
        ("sm_100", "half capped"): Gemm(128, 128, 64, warps=8, stages=4),
    },
    # The statistics that also write exponentials down: an output tile leaves through shared memory.
    "linear_statistics_kept": {
        **_ONE,
        ("sm_90", "half"): Gemm(128, 128, 64, warps=8, stages=4, tma=True),
        ("sm_90", "tf32"): Gemm(128, 64, 32, warps=8, stages=4),
        ("sm_100", "half"): Gemm(128, 64, 64, warps=8, stages=4, tma=True),
    },
    "logit_gradient": {
        **_ONE,
        ("sm_90", "half"): Gemm(128, 128, 64, warps=8, stages=4, tma=True),
        ("sm_90", "tf32"): Gemm(128, 128, 32, warps=8, stages=4, tma=True),
        ("sm_100", "half"): Gemm(128, 128, 64, warps=8, stages=4, tma=True),
        ("sm_100", "tf32"): Gemm(128, 128, 32, warps=8, stages=4, tma=True),
    },
    "linear_divergence": {
        **_TWO,
        ("sm_100", "half"): Gemm(128, 64, 64, warps=8, stages=4),
        ("sm_100", "tf32"): Gemm(64, 64, 32, warps=4, stages=3),
    },
    "linear_jsd": {**_TWO, ("sm_100", "half"): Gemm(128, 64, 64, warps=8, stages=4)},
    "fisher_statistics": dict(_FISHER),
    "fisher_statistics_weight": dict(_FISHER_WEIGHT),
    "fisher_gradient": dict(_FISHER),
    "fisher_gradient_weight": dict(_FISHER_WEIGHT),
    "logit_gradient_kl": {
        **_TWO,
        **_for_each({"ieee": Gemm(64, 32, 16, warps=4, stages=3)}, *_NVIDIA, "odd"),
        ("sm_90", "half"): Gemm(128, 128, 64, warps=8, stages=3, tma=True),
        ("sm_100", "half"): Gemm(128, 128, 64, warps=8, stages=3, tma=True),
    },
}

ELEMENTWISE: dict[str, Elementwise] = {
    "compact_rows": Elementwise(rows=1, block=2048, warps=8),
    "gather_rows": Elementwise(rows=4, block=512, warps=4),
    "scatter_rows": Elementwise(rows=4, block=512, warps=4),
    "combine_statistics": Elementwise(rows=64, block=1, warps=2),
    "combine_divergence": Elementwise(rows=64, block=1, warps=2),
    "combine_jsd": Elementwise(rows=64, block=1, warps=2),
    "combine_fisher": Elementwise(rows=64, block=1, warps=2),
    "gae": Elementwise(rows=1, block=1024, warps=4),
    "gae_whiten": Elementwise(rows=1, block=2048, warps=4),
    "kept_gradient": Elementwise(rows=1, block=4096, warps=8),
    "selective_statistics": Elementwise(rows=1, block=4096, warps=8),
    "selective_statistics_kl": Elementwise(rows=1, block=2048, warps=8),
    "selective_gradient": Elementwise(rows=1, block=4096, warps=8),
}

# Nominal, from the makers' data sheets (A100, H100, B200, MI300X, MI355X: dense bfloat16, memory): only their quotient
# decides between tilings. `tune` puts what it measures in their place.
CEILINGS: dict[str, Ceilings] = {
    "sm_80": Ceilings(312e12, 2.0e12),
    "sm_90": Ceilings(989e12, 3.35e12),
    "sm_100": Ceilings(2250e12, 8.0e12),
    "gfx942": Ceilings(1307e12, 5.3e12),
    "gfx950": Ceilings(2516e12, 8.0e12),
    "interpreter": Ceilings(989e12, 3.35e12),  # so that the tests take the ways a GPU would
}
