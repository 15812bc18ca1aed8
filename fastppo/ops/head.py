"""Input checks of the operators that start from hidden states and an lm_head weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastppo.engines.budget import scratch_bytes
from fastppo.engines.dispatch import select
from fastppo.engines.engine import Head, Needs, Options
from fastppo.engines.transform import LogitTransform
from fastppo.ops.checks import check_linear, check_targets, looks_at_values
from fastppo.ops.vocabulary_parallel import Slices, local_slice

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IGNORED = -100  # what a row that is left out carries as its target inside the library


def open_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    prefix: str = "",
    group: ProcessGroup | None = None,
) -> Head:
    """Check one model's head and flatten its hidden states to rows.

    A sharded (DTensor) weight is gathered, or with `group` stays the slice that this rank has.
    """
    if group is None:
        weight, bias = whole(weight), whole(bias)
    else:
        weight, bias = local_slice(f"{prefix}weight", weight, group), local_slice(f"{prefix}bias", bias, group)
    check_linear(hidden, weight, bias, prefix=prefix)
    return Head(hidden.reshape(-1, hidden.shape[-1]), weight, bias)


def open_reference(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    group: ProcessGroup | None = None,
) -> Head:
    """Check the reference model's head against the policy's."""
    ref = open_head(ref_hidden.detach(), ref_weight.detach(), ref_bias, prefix="ref_", group=group)
    ref = ref._replace(bias=None if ref.bias is None else ref.bias.detach())
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden: expected {tuple(hidden.shape[:-1])} tokens like hidden, got {tuple(ref_hidden.shape[:-1])}"
        )
    if ref.weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight: expected the same vocabulary as weight ({weight.shape[0]}), got {ref.weight.shape[0]}"
        )
    return ref


def needed_gradients(head: Head) -> Needs:
    """Which gradients autograd records of an operator called here and now.

    To be called outside of an autograd.Function: inside its forward grad mode is off, and `ctx.needs_input_grad` only
    says which inputs require gradients, also under torch.no_grad().
    """
    recording = torch.is_grad_enabled()
    return Needs(*(recording and x is not None and x.requires_grad for x in head))


def open_slices(head: Head, group: ProcessGroup | None) -> Slices | None:
    return None if group is None else Slices.open(group, head.hidden, head.weight)


def open_targets(
    targets: Tensor, hidden: Tensor, head: Head, ignore_index: int, slices: Slices | None = None
) -> Tensor:
    """Checked targets as rows [N] int64, with IGNORED where they carry no token; numbered within the rank's slice."""
    vocab = head.weight.shape[0]
    if slices is not None and looks_at_values(targets):
        vocab = int(slices.vocab)
    check_targets(targets, tuple(hidden.shape[:-1]), vocab, ignore_index)
    rows = targets.reshape(-1).long()
    if ignore_index != IGNORED:
        rows = rows.masked_fill(rows == ignore_index, IGNORED)
    return rows if slices is None else slices.localize(rows, head.weight.shape[0], IGNORED)


def open_options(
    op: str,
    backend: str | None,
    hidden: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    slices: Slices | None = None,
) -> Options:
    name = select(op, hidden.device, hidden.dtype, backend)
    if slices is not None and name == "reference":
        if backend is not None:
            raise ValueError("backend: 'reference' has no form for a vocabulary spread over ranks; use 'chunked'")
        name = "chunked"
    transform = LogitTransform(temperature, logit_scale, softcap)
    return Options(transform, compute_dtype_for(hidden), scratch_bytes(hidden.device), name)


def whole(tensor: Tensor | None) -> Tensor | None:
    """FSDP2 leaves a DTensor where the lm_head weight was; gathered, it is a plain tensor."""
    return _Gathered.apply(tensor) if hasattr(tensor, "full_tensor") else tensor


class _Gathered(torch.autograd.Function):
    """All rows of a sharded parameter; a rank's gradient is that of its own tokens, and the ranks' mean is scattered.

    So does FSDP2. Where the ranks have the same tokens, they have the same gradient, which is its own mean.
    """

    @staticmethod
    def forward(ctx, sharded):
        ctx.mesh, ctx.placements = sharded.device_mesh, sharded.placements
        return sharded.full_tensor()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        from torch.distributed.tensor import DTensor, Partial

        each = [Partial()] * ctx.mesh.ndim
        share = DTensor.from_local(gradient / ctx.mesh.size(), ctx.mesh, each, run_check=False)
        return share.redistribute(placements=ctx.placements)


def compute_dtype_for(hidden: Tensor) -> torch.dtype:
    """Precision of the products: autocast's where it is on, else the arguments'; float16 runs in float32 on a CPU."""
    dtype = hidden.dtype
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    if dtype == torch.float16 and hidden.device.type == "cpu":
        dtype = torch.float32
    return dtype
