"""Tile sizes, pipeline depths and warps: data, apart from the kernels, each proved by `python -m fastppo_kernels.aot`.

GEMM is looked up by kernel, architecture and precision. Architectures: sm_80 also serves sm_86, sm_89 and sm_120, whose
shared memory is 99 KiB, so its entries stay below that; sm_90 and sm_100 have 227 KiB. `odd` serves hidden sizes that
are no multiple of 16 on every chip: rows are then not aligned, and loads are narrow. `interpreter` is Triton's CPU
interpreter. Precisions: `half` is bfloat16 and float16; `mixed` is a float32 weight that is cast to half on its way
to the tensor cores (autocast); `tf32` and `ieee` are float32 by request and by default. Where there is an entry `…
capped`, it serves logits with a softcap, whose tanh needs registers.
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


GEMM: dict[str, dict[tuple[str, str], Gemm]] = {
    "linear_statistics": {
        ("sm_80", "half"): Gemm(128, 128, 32, warps=8, stages=4),
        ("sm_80", "mixed"): Gemm(128, 128, 32, warps=8, stages=3),
        ("sm_80", "tf32"): Gemm(128, 128, 32, warps=8, stages=3),
        ("sm_80", "ieee"): Gemm(64, 64, 16, warps=4, stages=3),
        ("sm_90", "half"): Gemm(128, 256, 64, warps=8, stages=3, tma=True),
        ("sm_90", "mixed"): Gemm(128, 128, 32, warps=8, stages=3),
        ("sm_90", "tf32"): Gemm(128, 128, 32, warps=8, stages=4),
        ("sm_90", "ieee"): Gemm(64, 64, 16, warps=4, stages=3),
        ("sm_100", "half"): Gemm(128, 256, 64, warps=8, stages=4, tma=True, flatten=True),
        ("sm_100", "half capped"): Gemm(128, 128, 64, warps=8, stages=4),
        ("sm_100", "mixed"): Gemm(128, 128, 32, warps=8, stages=3),
        ("sm_100", "tf32"): Gemm(128, 128, 32, warps=8, stages=4),
        ("sm_100", "ieee"): Gemm(64, 64, 16, warps=4, stages=3),
        ("odd", "half"): Gemm(64, 64, 32, warps=4, stages=3),
        ("odd", "mixed"): Gemm(64, 64, 32, warps=4, stages=3),
        ("odd", "tf32"): Gemm(64, 64, 32, warps=4, stages=3),
        ("odd", "ieee"): Gemm(64, 64, 16, warps=4, stages=3),
        ("interpreter", "ieee"): Gemm(32, 32, 16, warps=1, stages=1, group_m=2),
        ("interpreter", "half"): Gemm(32, 32, 16, warps=1, stages=1, group_m=2),
    },
    "logit_gradient": {
        ("sm_80", "half"): Gemm(128, 128, 32, warps=8, stages=4),
        ("sm_80", "mixed"): Gemm(128, 128, 32, warps=8, stages=3),
        ("sm_80", "tf32"): Gemm(128, 128, 32, warps=8, stages=3),
        ("sm_80", "ieee"): Gemm(64, 64, 16, warps=4, stages=3),
        ("sm_90", "half"): Gemm(128, 128, 64, warps=8, stages=4, tma=True),
        ("sm_90", "mixed"): Gemm(128, 128, 32, warps=8, stages=3),
        ("sm_90", "tf32"): Gemm(128, 128, 32, warps=8, stages=4, tma=True),
        ("sm_90", "ieee"): Gemm(64, 64, 16, warps=4, stages=3),
        ("sm_100", "half"): Gemm(128, 128, 64, warps=8, stages=4, tma=True),
        ("sm_100", "mixed"): Gemm(128, 128, 32, warps=8, stages=3),
        ("sm_100", "tf32"): Gemm(128, 128, 32, warps=8, stages=4, tma=True),
        ("sm_100", "ieee"): Gemm(64, 64, 16, warps=4, stages=3),
        ("odd", "half"): Gemm(64, 64, 32, warps=4, stages=3),
        ("odd", "mixed"): Gemm(64, 64, 32, warps=4, stages=3),
        ("odd", "tf32"): Gemm(64, 64, 32, warps=4, stages=3),
        ("odd", "ieee"): Gemm(64, 64, 16, warps=4, stages=3),
        ("interpreter", "ieee"): Gemm(32, 32, 16, warps=1, stages=1, group_m=2),
        ("interpreter", "half"): Gemm(32, 32, 16, warps=1, stages=1, group_m=2),
    },
    # Two accumulators are alive at once from here on.
    "linear_divergence": {
        ("sm_80", "half"): Gemm(128, 64, 32, warps=8, stages=3),
        ("sm_80", "mixed"): Gemm(64, 64, 32, warps=8, stages=3),
        ("sm_80", "tf32"): Gemm(64, 64, 32, warps=8, stages=3),
        ("sm_80", "ieee"): Gemm(32, 32, 16, warps=4, stages=3),
        ("sm_90", "half"): Gemm(128, 64, 64, warps=8, stages=3),
        ("sm_90", "mixed"): Gemm(64, 64, 32, warps=4, stages=3),
        ("sm_90", "tf32"): Gemm(128, 64, 32, warps=8, stages=3),
        ("sm_90", "ieee"): Gemm(32, 32, 16, warps=4, stages=3),
        ("sm_100", "half"): Gemm(128, 64, 64, warps=8, stages=4),
        ("sm_100", "mixed"): Gemm(64, 64, 32, warps=4, stages=3),
        ("sm_100", "tf32"): Gemm(64, 64, 32, warps=4, stages=3),
        ("sm_100", "ieee"): Gemm(32, 32, 16, warps=4, stages=3),
        ("odd", "half"): Gemm(64, 32, 32, warps=4, stages=3),
        ("odd", "mixed"): Gemm(64, 32, 32, warps=4, stages=3),
        ("odd", "tf32"): Gemm(64, 32, 32, warps=4, stages=3),
        ("odd", "ieee"): Gemm(32, 32, 16, warps=4, stages=3),
        ("interpreter", "ieee"): Gemm(32, 32, 16, warps=1, stages=1, group_m=2),
    },
    "logit_gradient_kl": {
        ("sm_80", "half"): Gemm(128, 64, 32, warps=8, stages=3),
        ("sm_80", "mixed"): Gemm(64, 64, 32, warps=8, stages=3),
        ("sm_80", "tf32"): Gemm(64, 64, 32, warps=8, stages=3),
        ("sm_80", "ieee"): Gemm(64, 32, 16, warps=4, stages=3),
        ("sm_90", "half"): Gemm(128, 128, 64, warps=8, stages=3, tma=True),
        ("sm_90", "mixed"): Gemm(64, 64, 32, warps=4, stages=3),
        ("sm_90", "tf32"): Gemm(128, 64, 32, warps=8, stages=3),
        ("sm_90", "ieee"): Gemm(64, 32, 16, warps=4, stages=3),
        ("sm_100", "half"): Gemm(128, 128, 64, warps=8, stages=3, tma=True),
        ("sm_100", "mixed"): Gemm(64, 64, 32, warps=4, stages=3),
        ("sm_100", "tf32"): Gemm(128, 64, 32, warps=8, stages=3),
        ("sm_100", "ieee"): Gemm(64, 32, 16, warps=4, stages=3),
        ("odd", "half"): Gemm(64, 32, 32, warps=4, stages=3),
        ("odd", "mixed"): Gemm(64, 32, 32, warps=4, stages=3),
        ("odd", "tf32"): Gemm(64, 32, 32, warps=4, stages=3),
        ("odd", "ieee"): Gemm(64, 32, 16, warps=4, stages=3),
        ("interpreter", "ieee"): Gemm(32, 32, 16, warps=1, stages=1, group_m=2),
    },
}

# Two accumulators, and four operands in flight with a direction for the weight, three without.
GEMM["fisher_statistics"] = {
    ("sm_80", "half"): Gemm(128, 64, 32, warps=8, stages=4),
    ("sm_80", "mixed"): Gemm(64, 64, 32, warps=8, stages=3),
    ("sm_80", "tf32"): Gemm(64, 64, 32, warps=8, stages=3),
    ("sm_80", "ieee"): Gemm(32, 64, 16, warps=4, stages=3),
    ("sm_90", "half"): Gemm(128, 128, 64, warps=8, stages=3, tma=True),
    ("sm_90", "mixed"): Gemm(64, 64, 32, warps=4, stages=3),
    ("sm_90", "tf32"): Gemm(128, 64, 32, warps=8, stages=3),
    ("sm_90", "ieee"): Gemm(32, 64, 16, warps=4, stages=3),
    ("sm_100", "half"): Gemm(128, 128, 64, warps=8, stages=3, tma=True),
    # Triton 3.6 cannot pipeline two products that share a weight tile which is cast on its way.
    ("sm_100", "mixed"): Gemm(64, 64, 32, warps=4, stages=1),
    ("sm_100", "tf32"): Gemm(128, 64, 32, warps=8, stages=3),
    ("sm_100", "ieee"): Gemm(32, 64, 16, warps=4, stages=3),
    ("odd", "half"): Gemm(64, 32, 32, warps=4, stages=3),
    ("odd", "mixed"): Gemm(64, 32, 32, warps=4, stages=3),
    ("odd", "tf32"): Gemm(64, 32, 32, warps=4, stages=3),
    ("odd", "ieee"): Gemm(32, 64, 16, warps=4, stages=3),
    ("interpreter", "ieee"): Gemm(32, 32, 16, warps=1, stages=1, group_m=2),
}
GEMM["fisher_gradient"] = GEMM["fisher_statistics"]
GEMM["fisher_statistics_weight"] = GEMM["fisher_gradient_weight"] = {
    **GEMM["fisher_statistics"],
    ("sm_100", "half capped"): Gemm(128, 64, 64, warps=8, stages=4, tma=True),
    ("sm_100", "mixed"): Gemm(64, 64, 32, warps=4, stages=3),
    ("sm_100", "tf32"): Gemm(64, 64, 32, warps=4, stages=4),
}

GEMM["linear_jsd"] = {**GEMM["linear_divergence"], ("sm_100", "tf32"): Gemm(128, 64, 32, warps=8, stages=3)}

ELEMENTWISE: dict[str, Elementwise] = {
    "compact_rows": Elementwise(rows=1, block=2048, warps=8),
    "gather_rows": Elementwise(rows=4, block=512, warps=4),
    "scatter_rows": Elementwise(rows=4, block=512, warps=4),
    "combine_statistics": Elementwise(rows=64, block=1, warps=2),
    "combine_divergence": Elementwise(rows=64, block=1, warps=2),
    "combine_jsd": Elementwise(rows=64, block=1, warps=2),
    "combine_fisher": Elementwise(rows=64, block=1, warps=2),
    "gae": Elementwise(rows=1, block=1024, warps=4),
    "selective_statistics": Elementwise(rows=1, block=4096, warps=8),
    "selective_gradient": Elementwise(rows=1, block=4096, warps=8),
}
