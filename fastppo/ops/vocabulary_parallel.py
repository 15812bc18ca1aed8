"""A head whose vocabulary is spread over ranks: each holds a slice of the rows of weight, all have the same tokens.

    forward    each rank's engine: statistics of its own slice [N]  ->  one all-gather, [ranks, 5 or 9, N] float32
               ->  every rank combines them alike, to the same bits
    backward   each rank's engine, given the statistics of the whole: ∂weight of the slice, and its share of ∂hidden
               ->  one all-reduce, [N, D] float32

The slices' softmaxes combine by the chain rule: with the mass π_r of slice r, H = Σ π_r (H_r − log π_r), and for a
reference with masses κ_r, KL = Σ π_r (KL_r + log π_r − log κ_r). Vocabulary parallelism is Megatron-LM's (Shoeybi et
al., 2019, arXiv:1909.08053).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastppo.engines.engine import VERY_NEGATIVE
from fastppo.ops.checks import looks_at_values

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# What a row carries as its target where another rank has it: beyond every vocabulary, so that it matches no column.
ELSEWHERE = 2**31 - 1


class Slices(NamedTuple):
    """How the vocabulary is spread, as seen by one rank."""

    group: ProcessGroup
    start: Tensor  # 0-dim int64: the first row of this rank's slice
    vocab: Tensor  # 0-dim int64: rows of all slices together

    @classmethod
    def open(cls, group: ProcessGroup, hidden: Tensor, weight: Tensor) -> Slices:
        """Learn every rank's share; no rank knows another's, and slices need not be of one size."""
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError("group: this process is not one of its ranks")
        sizes = (weight.shape[0], *hidden.shape)
        # Filled on the device: a tensor of Python numbers would be a copy that waits for the work before it.
        mine = torch.stack([torch.full((), n, dtype=torch.int64, device=hidden.device) for n in sizes])
        shares = gather(mine, group)  # [ranks, 1 + dims]
        if looks_at_values(shares) and (shares[:, 1:] != shares[:1, 1:]).any():
            raise ValueError(f"hidden: expected the same tokens on every rank of group, got {shares[:, 1:].tolist()}")
        return cls(group, shares[:rank, 0].sum(), shares[:, 0].sum())

    def localize(self, rows: Tensor, slice_size: int, ignored: int) -> Tensor:
        """Targets [N] as row numbers of this rank's slice, ELSEWHERE where it has not got them."""
        local = rows - self.start
        local = torch.where((local >= 0) & (local < slice_size), local, ELSEWHERE)
        return torch.where(rows == ignored, rows, local)


def all_statistics(local: list[Tensor], targets: Tensor, kl_kind: str, slices: Slices) -> list[Tensor]:
    """The statistics of the whole vocabulary, the same on every rank, from those of each rank's slice."""
    owned = (targets != ELSEWHERE).to(local[0].dtype)
    gathered = gather(torch.stack([*local, owned]), slices.group)  # [ranks, 5 or 9, N]
    return combine(gathered[:, :-1].unbind(1), gathered[:, -1], kl_kind, slices.vocab, targets < 0)


def summed_over_ranks(share: Tensor, slices: Slices) -> Tensor:
    """The sum of every rank's share, in the share's own memory."""
    if share.numel():
        dist.all_reduce(share, group=slices.group)
    return share


def combine(
    statistics: tuple[Tensor, ...], owned: Tensor, kl_kind: str, vocab: Tensor, ignored: Tensor
) -> list[Tensor]:
    """Statistics of the slices, each [ranks, N], to those of the whole, each [N]; see `fastppo.engines.engine`.

    Args:
        owned: [ranks, N], 1 where a rank has the target; a target that none has gives NaN.
        vocab: 0-dim, rows of all slices.
        ignored: [N] bool, rows that were left out and stay 0.
    """
    logprobs, entropy, row_max, log_sum = statistics[:4]
    top, total, log_mass = _masses(row_max, log_sum)
    mass = log_mass.exp()
    # Without the bound on the mass: a token of a slice that has none keeps its log-probability.
    taken = torch.where(owned != 0, logprobs + (row_max - top) + (log_sum - total), 0.0).sum(0)
    taken = torch.where(owned.any(0), taken, torch.nan)
    whole_entropy = _expectation(mass, entropy - log_mass).clamp(min=0.0)
    out = [taken.clamp(max=0.0), torch.minimum(whole_entropy, vocab.to(mass.dtype).log()), top, total]
    if kl_kind:
        ref_top, ref_total, ref_log_mass = _masses(*statistics[6:8])
        if kl_kind == "forward":
            kl = _expectation(ref_log_mass.exp(), statistics[4] + ref_log_mass - log_mass).clamp(min=0.0)
            center = torch.zeros_like(kl)
        else:
            kl = _expectation(mass, statistics[4] + log_mass - ref_log_mass)
            kl, center = kl.clamp(min=0.0), kl
        out += [kl, center, ref_top, ref_total]
    return [x.masked_fill(ignored, 0.0) for x in out]


def _masses(row_max: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[ranks, N] each -> row_max [N], log_sum [N] of the whole, and the logarithm of each slice's mass [ranks, N]."""
    top = row_max.amax(0)
    log_share = (row_max - top).clamp(min=VERY_NEGATIVE) + log_sum
    total = log_share.logsumexp(0)
    return top, total, log_share - total


def _expectation(mass: Tensor, x: Tensor) -> Tensor:
    """Σ mass · x over the slices; one whose logits are all −inf has no mass, and an x that is NaN."""
    return (mass * x).masked_fill(mass == 0, 0.0).sum(0)


def local_slice(name: str, tensor: Tensor | None, group: ProcessGroup) -> Tensor | None:
    """This rank's rows: a plain tensor is them already, a DTensor must be cut along its rows over `group` alone."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    mesh, placements = tensor.device_mesh, tensor.placements
    by_rows = len(placements) == 1 and placements[0].is_shard(0)
    if not by_rows or mesh.mesh.tolist() != dist.get_process_group_ranks(group):
        raise ValueError(
            f"{name}: expected a DTensor with placements (Shard(0),) over the ranks of group, got {tuple(placements)} "
            f"over {mesh}; give this rank's rows as a plain tensor, or leave out group to gather the whole weight"
        )
    return tensor.to_local()


def gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """x of every rank, stacked."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.stack(parts)
