"""Pack several completions of a prompt into one row, so that the prompt is computed once and without padding.

    [B, P + T], padded on both sides      p p p a a .      ──>   [R, L]       p p p a a b b b
                                          p p p b b b                         q q c c c d . .
                                          . q q c c c
                                          . q q d . .      (R, L: whatever costs least)

A token sees its own prompt and its own completion up to itself, at the position it would have in a row of its own, so
its hidden state is the same. This needs an attention function that accepts a dense mask (SDPA and that of
fastppo.models.attention do) and a model that mixes tokens only by attention over the whole sequence (`can_pack`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

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
    """The states that predict the completion tokens, packed if the model allows it and that costs less.

    Args:
        model: a causal language model.
        sequences, attention_mask, num_completion: as for `pack`.

    Returns:
        The states [B, T, D], arbitrary but finite at padding, and the model's head.

    Raises:
        ModelError: a token that is not padding has no embedding.
    """
    backbone, head = backbone_and_head(model)
    if can_pack(backbone):
        packed = pack(sequences, attention_mask, num_completion, head.weight.shape[1])
        if packed is not None:
            return packed_hidden(backbone, packed), head
    return token_hidden(backbone, sequences, attention_mask)[:, -num_completion - 1 : -1], head


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


def can_pack(backbone: nn.Module, device: torch.device | None = None) -> bool:
    """Whether packed sequences give this model's hidden states, tried once on a few tokens.

    Only on a CPU, since on a GPU the fused kernels without a dense mask are faster. Only for float32 parameters: in
    half precision the rounding of a deep model is as large as the effect of a wrong mask.

    Args:
        backbone: it and its copies remember the answer.
        device: what will compute with it, if it is elsewhere now.
    """
    if not hasattr(backbone, "fastppo_can_pack"):
        device = device or next(backbone.parameters()).device
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            backbone.fastppo_can_pack = device.type == "cpu" and _try_to_pack(backbone)
    return backbone.fastppo_can_pack


def _try_to_pack(backbone: nn.Module) -> bool:
    config, parameter = backbone.config, next(backbone.parameters())
    if (
        parameter.dtype != torch.float32
        or config._attn_implementation not in _DENSE
        or set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}
        or (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))
    ):
        return False
    # Prompts of 2 and 3 tokens, two and three completions of up to 3.
    ids = torch.tensor(
        [[0, 3, 1, 4, 15, 9], [0, 3, 1, 2, 6, 5], [3, 5, 8, 9, 7, 9], [3, 5, 8, 3, 2, 0], [3, 5, 8, 4, 0, 0]]
    )
    mask = (ids != 0).long()
    ids = ids % config.vocab_size
    real = mask[:, 3:].bool()
    packed = pack(ids, mask, 3, dim=1_000_000)
    try:
        return close(packed_hidden(backbone, packed)[real], token_hidden(backbone, ids, mask)[:, 2:-1][real])
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
