"""The two products that follow a gradient kernel: ∂hidden = ∂z weight and ∂weight = ∂zᵀ hidden.

    product          cuBLAS, over all rows there are: those behind the count are zeros
    product_kernel   Triton, over the contributing rows alone, whose number it reads on the device

Bytes: at least both operands and the result once; an accumulated result is read too. FLOPs: 2 M D v each, summed in
float32. Which one serves is decided by `by_triton`.
Tiling of the kernel: one work item an output tile, in groups of GROUP_M row blocks; programs are persistent.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels import configs
from fastppo_kernels.launch import architecture, gemm_config, gemm_options, launch, operand, programs
from fastppo_kernels.tile import described, grouped_order

# torch.addmm takes out_dtype= together with out= from this version on.
ADDS_IN_FLOAT32 = tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10)


# Tiles may reach this far beyond the columns: at D 896, by 14%, an H200 takes 3% more time if all rows contribute, and
# 30% less if half do; at 640, by 20%, it takes a fifth more if all do and as long if half do.
MOST_WASTE = 1.15


def by_triton(operand: Tensor) -> bool:
    """Whether Triton's kernels multiply by `operand` [*, D']: on Hopper, in half precision, where their tiles fit."""
    if configs.PRODUCTS is not None:
        return configs.PRODUCTS == "triton"
    if operand.dtype == torch.float32 or architecture(operand.device) != "sm_90":
        return False
    columns, block = operand.shape[1], configs.GEMM["product_rows"]["sm_90", "half"].block_n
    return triton.cdiv(columns, block) * block <= MOST_WASTE * columns


def hidden_product(dz: Tensor, weight: Tensor, out: Tensor, count: Tensor, first_row: int, *, accumulate: bool) -> None:
    """out [M, D'] float32 = or += dz [M, v] @ weight [v, D'], for the rows below the count [1] less `first_row`."""
    if by_triton(weight):
        _triton_product("product_rows", dz, weight, out, count, first_row, accumulate=accumulate)
    else:
        product(out, dz, weight, accumulate=accumulate)


def weight_product(dz: Tensor, hidden: Tensor, out: Tensor, count: Tensor, first_row: int, *, accumulate: bool) -> None:
    """out [v, D'] = or += dz [M, v]ᵀ @ hidden [M, D'], over the rows below the count [1] less `first_row`.

    dz and hidden hold zeros behind the count. out is float32, or of dz's dtype where nothing is accumulated.
    """
    if by_triton(hidden):
        _triton_product("product_columns", dz, hidden, out, count, first_row, accumulate=accumulate)
    else:
        product(out, dz.t(), hidden, accumulate=accumulate)


def product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b, with out and every sum in float32; not accumulating, out may have a's own dtype."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=1.0 if accumulate else 0.0, out=out)
    elif not a.is_cuda:
        torch.addmm(out, a.float(), b.float(), beta=1.0 if accumulate else 0.0, out=out)
    elif not accumulate:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif ADDS_IN_FLOAT32:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out += torch.mm(a, b, out_dtype=torch.float32)


@triton.jit(do_not_specialize=["first_row", "num_rows", "inner_size"])
def product_kernel(
    # operands of `described`: [M, K], or with TRANSPOSED [K, M], rows `a_stride` apart; [K, D]
    a,
    b,
    count,  # [1] int32
    out,  # [M, D]
    first_row,
    num_rows,
    inner_size,
    columns,
    a_stride,
    TRANSPOSED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    if TRANSPOSED:
        a = described(a, inner_size, a_stride, a_stride, TMA, BLOCK_K, BLOCK_M)
    else:
        a = described(a, num_rows, a_stride, a_stride, TMA, BLOCK_M, BLOCK_K)
    b = described(b, inner_size, columns, columns, TMA, BLOCK_K, BLOCK_N)
    # The count bounds the rows of the result, or, transposed, the sum.
    real_rows = tl.maximum(tl.load(count) - first_row, 0)
    if TRANSPOSED:
        inner_size = tl.minimum(real_rows, inner_size)
    else:
        num_rows = tl.minimum(real_rows, num_rows)
    blocks_m, tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for item in range(tl.program_id(0), blocks_m * tiles, tl.num_programs(0)):
        block, tile = grouped_order(item, blocks_m, tiles, GROUP_M)
        row, column = block * BLOCK_M, tile * BLOCK_N
        m, n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        inside = (m < num_rows)[:, None] & (n < columns)[None, :]
        place = out + m.to(tl.int64)[:, None] * columns + n[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, inner_size, BLOCK_K):
            if TRANSPOSED:
                part = a.load([k, row]).T  # [BLOCK_M, BLOCK_K]
            else:
                part = a.load([row, k])
            acc = tl.dot(part, b.load([k, column]), acc, input_precision=PRECISION)
        if ACCUMULATE:
            # One addition an element, so the same bits every time; it takes place in L2, without registers for `out`.
            tl.atomic_add(place, acc, mask=inside, sem="relaxed")
        else:
            tl.store(place, acc.to(out.dtype.element_ty), mask=inside)


def _triton_product(
    kernel: str, dz: Tensor, b: Tensor, out: Tensor, count: Tensor, first_row: int, *, accumulate: bool
) -> None:
    transposed = kernel == "product_columns"
    config = gemm_config(kernel, dz.dtype, dz.device)
    a_block = (config.block_k, config.block_m) if transposed else (config.block_m, config.block_k)
    tiles = triton.cdiv(out.shape[0], config.block_m) * triton.cdiv(out.shape[1], config.block_n)
    launch(
        product_kernel,
        (programs(config, tiles, dz.device),),
        operand(dz, *a_block),
        operand(b, config.block_k, config.block_n),
        count,
        out,
        first_row,
        out.shape[0],
        b.shape[0],
        out.shape[1],
        dz.stride(0),
        TRANSPOSED=transposed,
        ACCUMULATE=accumulate,
        **gemm_options(config, dz.dtype, dz.device),
    )


def power_of_two_scale(upstream: list[Tensor | None], slope: float) -> Tensor:
    """[1] float32 that lifts the greatest upstream scalar to about 1, as float16 has few exponents; exact to undo.

    It is 1 where the greatest is 0 or not finite. slope: of the transform, by which every gradient is multiplied.
    """
    greatest = torch.stack([g.abs().max() for g in upstream if g is not None]).max() * slope
    power = -torch.log2(greatest).floor().clamp(-126, 126)  # of normal numbers, and so is its reciprocal
    return torch.exp2(power).where(torch.isfinite(greatest) & (greatest > 0), 1.0).reshape(1)
