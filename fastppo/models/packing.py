"""Compute only the tokens of padded sequences. On a CPU, completions of a prompt share a row and the prompt:

    [B, P + T], padded on both sides      p p p a a .      ──>   [R, L]       p p p a a b b b
                                          p p p b b b                         q q c c c d . .
                                          . q q c c c
                                          . q q d . .      (R, L: whatever costs least)

A token sees its own prompt and its own completion up to itself, at the position it would have in a row of its own, so
its hidden state is the same. This needs an attention function that accepts a dense mask (SDPA and that of
fastppo.models.attention do) and a model that mixes tokens only by attention over the whole sequence (`can_pack`).

On a GPU, fused kernels without a dense mask are faster, and sequences go in one row (`fastppo.models.packed_row`).
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastppo.models import packed_row
from fastppo.models.attention import NAME
from fastppo.models.head import LMHead, backbone_and_head, close, readable_ids, token_hidden

_DENSE = {"sdpa", NAME}


class Packed(NamedTuple):
    """Sequences laid out in R rows of L tokens."""

    input_ids: Tensor  # [R, L] int64, 0 on padding
    position_ids: Tensor  # [R, L] int64
    visible: Tensor  # [R, 1, L, L] bool: whether a token (third axis) sees another (fourth)
    states: Tensor  # [B, T] int64: index into [R · L] of the state that predicts a completion token; 0 for padding


def completion_hidden(
    model: nn.Module, sequences: Tensor, attention_mask: Tensor, num_completion: int
) -> tuple[Tensor, LMHead]:
    """`completion_states` of a causal language model, and its head."""
    backbone, head = backbone_and_head(model)
    return completion_states(backbone, sequences, attention_mask, num_completion, head.weight.shape[1]), head


def completion_states(
    backbone: nn.Module, sequences: Tensor, attention_mask: Tensor, num_completion: int, dim: int
) -> Tensor:
    """The states that predict the completion tokens, packed if the model allows it and that costs less.

    Args:
        backbone: maps tokens to hidden states.
        sequences, attention_mask, num_completion, dim: as for `pack`, on the backbone's device.

    Returns:
        [B, T, D], arbitrary but finite at padding.

    Raises:
        ModelError: a token that is not padding has no embedding.
    """
    if can_pack(backbone):
        if _takes_rows(backbone):
            row = None
            if not packed_row.has_tangents(backbone):
                row = packed_row.pack_row(sequences, attention_mask, num_completion)
            if row is not None:
                return packed_row.row_hidden(backbone, row)
        elif (packed := pack(sequences, attention_mask, num_completion, dim)) is not None:
            return packed_hidden(backbone, packed)
    return token_hidden(backbone, sequences, attention_mask)[:, -num_completion - 1 : -1]


def pack(sequences: Tensor, attention_mask: Tensor, num_completion: int, dim: int) -> Packed | None:
    """Lay out B sequences, those with equal prompts together, in the number of rows that costs least.

    Args:
        sequences: [B, P + T] int64 on a CPU, P columns of prompts padded on the left, T = `num_completion` of
            completions padded on the right.
        attention_mask: [B, P + T], 1 for tokens.
        dim: width of the model, which sets the cost of attention relative to the rest.

    Returns:
        The layout, or None if none costs less than the given one or a prompt is empty.
    """
    width = sequences.shape[1] - num_completion
    starts = (width - attention_mask[:, :width].sum(1)).tolist()
    counts = attention_mask[:, width:].sum(1).tolist()
    ids = sequences.tolist()
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, start in enumerate(starts):
        groups.setdefault(tuple(ids[row][start:width]), []).append(row)
    if () in groups:  # no state predicts the first token after an empty prompt
        return None

    longest = max(len(prompt) + counts[row] for prompt, rows in groups.items() for row in rows)
    layouts = [_fill_rows(groups, counts, longest * times) for times in (1, 2, 4, 8, 16)]
    rows, length = min(layouts, key=lambda layout: _cost(len(layout[0]), layout[1], dim))
    if _cost(len(rows), length, dim) >= _cost(*sequences.shape, dim):
        return None
    completions = [row[width : width + count] for row, count in zip(ids, counts, strict=True)]
    return _lay_out(rows, length, completions, num_completion)


def _cost(rows: int, length: int, dim: int) -> float:
    """Cost of a layer in arbitrary units: about 24 D² operations a token in its products, and 4 L D in attention at a
    quarter of their rate."""
    return rows * length * (1.5 * dim + length)


class _Piece(NamedTuple):
    prompt: tuple[int, ...]
    members: list[int]  # the sequences whose completions follow the prompt
    tokens: int


def _fill_rows(
    groups: dict[tuple[int, ...], list[int]], counts: list[int], capacity: int
) -> tuple[list[list[_Piece]], int]:
    """Rows of at most `capacity` tokens, by first-fit decreasing, and the number of tokens in the longest of them."""
    pieces: list[_Piece] = []
    for prompt, sequences in groups.items():
        used, members = len(prompt), []
        for sequence in sequences:
            if members and used + counts[sequence] > capacity:
                pieces.append(_Piece(prompt, members, used))
                used, members = len(prompt), []
            members.append(sequence)
            used += counts[sequence]
        pieces.append(_Piece(prompt, members, used))
    rows: list[list[_Piece]] = []
    taken: list[int] = []  # tokens of each row
    for piece in sorted(pieces, key=lambda piece: -piece.tokens):
        row = next((i for i, tokens in enumerate(taken) if tokens + piece.tokens <= capacity), len(rows))
        if row == len(rows):
            rows.append([])
            taken.append(0)
        rows[row].append(piece)
        taken[row] += piece.tokens
    return rows, max(taken)


def _lay_out(rows: list[list[_Piece]], length: int, completions: list[list[int]], num_completion: int) -> Packed:
    input_ids, position_ids = torch.zeros(2, len(rows), length, dtype=torch.long)
    # The piece and the sequence of each token; -1 at padding and, for the sequence, in a prompt.
    piece_of, sequence_of = torch.full((2, len(rows), length), -1)
    states = torch.zeros(len(completions), num_completion, dtype=torch.long)
    for row, pieces in enumerate(rows):
        at = 0
        for number, (prompt, members, _) in enumerate(pieces):
            last = at + len(prompt) - 1
            for member in (-1, *members):
                tokens, first = (prompt, 0) if member < 0 else (completions[member], len(prompt))
                here = slice(at, at + len(tokens))
                input_ids[row, here] = torch.tensor(tokens, dtype=torch.long)
                position_ids[row, here] = torch.arange(first, first + len(tokens))
                piece_of[row, here], sequence_of[row, here] = number, member
                if member >= 0 and tokens:
                    # The prompt's last state predicts the first token, each token's state the next one.
                    states[member, : len(tokens)] = row * length + torch.tensor([last, *range(at, here.stop - 1)])
                at = here.stop
    shared = (sequence_of[:, None] < 0) | (sequence_of[:, None] == sequence_of[:, :, None])
    # Padding sees padding, since a softmax over no keys would be NaN.
    visible = (shared & (piece_of[:, None] == piece_of[:, :, None])).tril()
    return Packed(input_ids, position_ids, visible[:, None], states)


def packed_hidden(backbone: nn.Module, packed: Packed) -> Tensor:
    """The states [B, T, D] that predict the completion tokens, arbitrary but finite at padding."""
    ids = readable_ids(backbone, packed.input_ids, torch.ones_like(packed.input_ids))  # 0 at padding already
    hidden = backbone(
        input_ids=ids, attention_mask=packed.visible, position_ids=packed.position_ids, use_cache=False
    ).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, packed.states.flatten()).unflatten(0, packed.states.shape)


def can_pack(backbone: nn.Module) -> bool:
    """Whether packed sequences give this model's hidden states, tried once on a few tokens.

    Args:
        backbone: it and its copies remember the answer.
    """
    if not hasattr(backbone, "fastppo_can_pack"):
        backbone.fastppo_can_pack = _may_pack(backbone) and _try_to_pack(backbone)
    return backbone.fastppo_can_pack


def _takes_rows(backbone: nn.Module) -> bool:
    return backbone.config._attn_implementation in packed_row.IMPLEMENTATIONS


def _may_pack(backbone: nn.Module) -> bool:
    """Whether the configuration says nothing against it."""
    config = backbone.config
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config._attn_implementation.startswith("flash_attention"):  # it has windows
        return _takes_rows(backbone) and layers <= {"full_attention", "sliding_attention"}
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    on_cpu = next(backbone.parameters()).device.type == "cpu"
    takes = _takes_rows(backbone) or (on_cpu and config._attn_implementation in _DENSE)
    return bool(takes and layers == {"full_attention"} and not window)


@torch.no_grad()
def _try_to_pack(backbone: nn.Module) -> bool:
    """Compare with rows of padding on prompts of 4 and 6 tokens, each with four completions of up to 8.

    In half precision the rounding of a deep model can be as large as what a wrong mask changes of some state, so the
    difference is measured over all states, against those of two layouts that are wrong: without a mask between
    sequences, and with positions by column. SmolLM2's packed states differ from the padded ones by 0.1% in bfloat16 and
    1.1% in nf4, wrong ones by 22% to 41% (docs/LOG.md).
    """
    device = next(backbone.parameters()).device
    prompts = torch.arange(12).view(2, 6).repeat_interleave(4, 0)
    ids = torch.cat([prompts, 12 + torch.arange(64).view(8, 8).flip(0)], 1) * 7 % backbone.config.vocab_size
    mask = torch.ones_like(ids)
    for row in range(8):
        mask[row, : 2 * (row < 4)] = 0
        mask[row, 14 - row % 3 :] = 0
    real, batch = mask[:, 6:].bool().to(device), (ids.to(device), mask.to(device))
    # As it will compute: on a CPU in the precision of the parameters, which is right for autocast as well.
    here = torch.autocast("cpu", enabled=False) if device.type == "cpu" else contextlib.nullcontext()
    try:
        with here:
            if _takes_rows(backbone):
                packed, hidden = packed_row.pack_row(*batch, 8), packed_row.row_hidden
                wrong = [packed._replace(boundaries=packed.boundaries[[0, -1]], longest=packed.input_ids.shape[1])]
            else:
                packed, hidden = pack(*batch, 8, dim=1_000_000), packed_hidden
                columns = torch.arange(packed.input_ids.shape[1]).expand_as(packed.position_ids)
                wrong = [
                    packed._replace(visible=torch.ones_like(packed.visible).tril()),
                    packed._replace(position_ids=columns),
                ]
            padded = token_hidden(backbone, *batch)[:, 5:-1][real].float()
            exact = all(p.dtype == torch.float32 for p in backbone.parameters())
            if exact and not torch.is_autocast_enabled(device.type):
                return close(hidden(backbone, packed)[real], padded)
            found, *others = ((hidden(backbone, x)[real].float() - padded).norm() for x in (packed, *wrong))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return all(5 * found < other for other in others)
