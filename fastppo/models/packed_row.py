"""Lay out sequences in one row without padding, for attention functions that take the boundaries of sequences.

    [B, P + T], padded on both sides      p p p a a .      ──>   [1, N]    p p p a a q q b b b
                                          . q q b b b                      boundaries 0, 5, 10

FlashAttention 2 and 3 do, and that of fastppo.models.attention by PyTorch's own `varlen_attn`. A prompt is computed
for each of its completions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastppo.models.attention import VARLEN
from fastppo.models.head import readable_ids

IMPLEMENTATIONS = {"flash_attention_2", "flash_attention_3", VARLEN}


class PackedRow(NamedTuple):
    """Sequences of N tokens laid out in one row."""

    input_ids: Tensor  # [1, N] int64
    position_ids: Tensor  # [1, N] int64, from 0 in every sequence
    boundaries: Tensor  # [B + 1] int32: where sequences begin, and N
    longest: int  # tokens of the longest sequence
    states: Tensor  # [B, T] int64: index into [N] of the state that predicts a completion token; any for padding


def pack_row(sequences: Tensor, attention_mask: Tensor, num_completion: int) -> PackedRow | None:
    """Lay out B sequences in a row; None if a prompt is empty, since no state predicts the token after it.

    Waits once for the device: nothing can be launched before N is known.

    Args:
        sequences: [B, P + T] int64, P columns of prompts padded on the left, T = `num_completion` of completions padded
            on the right.
        attention_mask: [B, P + T], 1 for tokens.
    """
    real = attention_mask.bool()
    lengths, prompts = real.sum(1), real[:, :-num_completion].sum(1)
    tokens, longest, shortest_prompt = torch.stack([lengths.sum(), lengths.max(), prompts.min()]).tolist()
    if not shortest_prompt:
        return None
    boundaries = F.pad(lengths.cumsum(0), (1, 0))
    # The prompt's last state predicts the first token, each token's state the next one.
    states = (boundaries[:-1] + prompts - 1)[:, None] + torch.arange(num_completion, device=real.device)
    index = real.flatten().logical_not().int().argsort(stable=True)[:tokens]  # nonzero() would wait
    return PackedRow(
        input_ids=sequences.flatten()[index][None],
        position_ids=(real.cumsum(1) - 1).flatten()[index][None],
        boundaries=boundaries.int(),
        longest=longest,
        states=states.clamp(max=tokens - 1),
    )


def row_hidden(backbone: nn.Module, row: PackedRow) -> Tensor:
    """The states [B, T, D] that predict the completion tokens, arbitrary but finite at padding."""
    ids = readable_ids(backbone, row.input_ids, torch.ones_like(row.input_ids))
    # transformers passes a mask of four dimensions on as it is, where it would make one of [N, N] from the positions.
    # Its FlashAttention needs none, and makes none.
    unused = row.position_ids.new_ones(1, 1, 1, 1) if backbone.config._attn_implementation == VARLEN else None
    hidden = backbone(
        input_ids=ids,
        position_ids=row.position_ids,
        attention_mask=unused,
        use_cache=False,
        cu_seq_lens_q=row.boundaries,
        cu_seq_lens_k=row.boundaries,
        max_length_q=row.longest,
        max_length_k=row.longest,
    ).last_hidden_state
    return hidden[0].index_select(0, row.states.flatten()).unflatten(0, row.states.shape)


def has_tangents(backbone: nn.Module) -> bool:
    """Whether a forward-mode derivative is wanted, which no attention function for rows has."""
    return any(forward_ad.unpack_dual(parameter).tangent is not None for parameter in backbone.parameters())
