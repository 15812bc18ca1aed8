"""What the kernels that read two models side by side share: the pair of logits tiles, and the launch.

hidden [N, D], weight [V, D]         ref_hidden [N, D'], ref_weight [V, D']
           |                                     |
     z [BLOCK_M, BLOCK_N]                  z' [BLOCK_M, BLOCK_N]            two tiles of logits in registers
"""

import torch
import triton
import triton.language as tl

from fastppo_kernels.launch import balanced_splits, gemm_config, gemm_options, launch, processors
from fastppo_kernels.linear_statistics import MAX_SPLITS
from fastppo_kernels.tile import finish_logits, raw_logits


@triton.jit
def logits_pair(
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, index, column, columns, vocab, dim, ref_dim, hidden_stride,
    weight_stride, weight_stride_k, ref_hidden_stride, ref_weight_stride, ref_weight_stride_k, inner, outer,
    SOFTCAP: tl.constexpr, EVEN_K: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits of both models for rows `index` and `columns`, −inf beyond the vocabulary."""
    acc = raw_logits(
        hidden, weight, index, 0, column, vocab, dim, hidden_stride, weight_stride, weight_stride_k,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION, False, False,
    )  # fmt: skip
    ref_acc = raw_logits(
        ref_hidden, ref_weight, index, 0, column, vocab, ref_dim, ref_hidden_stride, ref_weight_stride,
        ref_weight_stride_k, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, COMPUTE, PRECISION, False, False,
    )  # fmt: skip
    z = finish_logits(acc, bias, columns, vocab, inner, outer, SOFTCAP)
    return z, finish_logits(ref_acc, ref_bias, columns, vocab, inner, outer, SOFTCAP)


def launch_pair(
    kernel,
    name: str,
    policy: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    row_data: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    quantities: int,
    *,
    inner: float,
    outer: float,
    softcap: bool,
    compute_dtype: torch.dtype,
    **constants: str,
) -> torch.Tensor:
    """partial [quantities, splits, N] float32 that `kernel`, entry `name` of configs.GEMM, makes of two models.

    Args:
        policy, reference: (hidden [N, D], weight [V, D], bias [V] or None); the hidden sizes may differ.
        row_data: what the kernel needs of each row: targets or statistics.
    """
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = policy, reference
    (num_rows, dim), vocab, ref_dim = hidden.shape, weight.shape[0], ref_weight.shape[1]
    config = gemm_config(name, compute_dtype, weight, dim, ref_dim, softcap=softcap)
    programs = processors(hidden.device)
    tiles = triton.cdiv(vocab, config.block_n)
    splits = balanced_splits(triton.cdiv(num_rows, config.block_m), tiles, programs, MAX_SPLITS)
    partial = torch.empty(quantities, splits, num_rows, dtype=torch.float32, device=hidden.device)
    launch(
        kernel,
        (programs,),
        hidden,
        weight,
        bias,
        ref_hidden,
        ref_weight,
        ref_bias,
        row_data,
        rows,
        count,
        partial,
        num_rows,
        vocab,
        dim,
        ref_dim,
        splits,
        hidden.stride(0),
        *weight.stride(),
        ref_hidden.stride(0),
        *ref_weight.stride(),
        inner,
        outer,
        SOFTCAP=softcap,
        **gemm_options(config, compute_dtype, weight.device, dim, ref_dim),
        **constants,
    )
    return partial
