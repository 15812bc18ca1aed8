"""Several completions of one prompt in one row, the prompt computed once, and no padding between them.

    [B, P + T], padded on both sides      p p p a a .      ──>   [R, L]       p p p a a b b b
                                          p p p b b b                         q q c c c d . .
                                          . q q c c c
                                          . q q d . .      (R, L: whatever costs least)

A token sees its own prompt and its own completion up to itself, and has the position it would have in a row of its own,
so its hidden state is the same. That takes a dense mask, which SDPA and the attention of fastppo.models.attention
accept, and layers that mix tokens by attention over the whole sequence and nothing else (`can_pack`).
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastppo.models.attention import NAME
from fastppo.models.head import hidden_close, token_hidden

_DENSE = {"sdpa", NAME}


class Packed(NamedTuple):
    """Sequences laid out in R rows of L tokens."""

    input_ids: Tensor
    """[R, L] int64, 0 on padding."""
    position_ids: Tensor
    """[R, L] int64"""
    visible: Tensor
    """[R, 1, L, L] bool: whether a token (third axis) sees another (fourth)."""
    states: Tensor
    """[B, T] int64: where in [R · L] the state is that predicts each completion token; 0 for padding."""


def pack(sequences: Tensor, attention_mask: Tensor, num_completion: int, dim: int) -> Packed | None:
    """Lay out B sequences, those with equal prompts together.

    Args:
        sequences: [B, P + T] int64, P columns of prompts padded on the left, T = `num_completion` of completions
            padded on the right.
        attention_mask: [B, P + T], 1 for tokens.
        dim: width of the model, for the cost of attention beside that of everything else.

    Returns:
        None where no layout costs less than the given one.
    """
    width = sequences.shape[1] - num_completion
    starts = (width - attention_mask[:, :width].sum(1)).tolist()
    counts = attention_mask[:, width:].sum(1).tolist()
    ids = sequences.tolist()
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, start in enumerate(starts):
        groups.setdefault(tuple(ids[row][start:width]), []).append(row)
    if () in groups:  # the state before the first token of an empty prompt is nowhere
        return None

    longest = max(len(prompt) + counts[row] for prompt, rows in groups.items() for row in rows)
    layouts = [_fill_rows(groups, counts, longest * times) for times in (1, 2, 4, 8, 16)]
    layouts = [(_cost(len(rows), max(used for used, _ in rows), dim), rows) for rows in layouts]
    cost, rows = min(layouts, key=lambda layout: layout[0])
    if cost >= _cost(*sequences.shape, dim):
        return None
    return _lay_out(rows, ids, counts, len(ids), num_completion, sequences.device)


def _cost(rows: int, length: int, dim: int) -> float:
    """Of one layer, in arbitrary units: about 24 D² operations a token in its products; 4 L D in attention, which runs
    at a quarter of their rate."""
    return rows * length * (1.5 * dim + length)


_Piece = tuple[tuple[int, ...], list[int]]  # a prompt, and the sequences whose completions follow it


def _fill_rows(
    groups: dict[tuple[int, ...], list[int]], counts: list[int], capacity: int
) -> list[tuple[int, list[_Piece]]]:
    """(tokens used, pieces) of each row: groups cut into pieces that fit, the largest placed first, each where it fits
    first."""
    pieces: list[tuple[int, _Piece]] = []
    for prompt, sequences in groups.items():
        used, members = len(prompt), []
        for sequence in sequences:
            if members and used + counts[sequence] > capacity:
                pieces.append((used, (prompt, members)))
                used, members = len(prompt), []
            members.append(sequence)
            used += counts[sequence]
        pieces.append((used, (prompt, members)))
    rows: list[tuple[int, list[_Piece]]] = []
    for used, piece in sorted(pieces, key=lambda item: -item[0]):
        for index, (taken, content) in enumerate(rows):
            if taken + used <= capacity:
                rows[index] = (taken + used, [*content, piece])
                break
        else:
            rows.append((used, [piece]))
    return rows


def _lay_out(
    rows: list[tuple[int, list[_Piece]]],
    ids: list[list[int]],
    counts: list[int],
    batch: int,
    num_completion: int,
    device: torch.device,
) -> Packed:
    length = max(used for used, _ in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    position_ids = torch.zeros_like(input_ids)
    # Padding sees itself: a softmax over nothing would be NaN.
    visible = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    states = torch.zeros(batch, num_completion, dtype=torch.long)
    for row, (_, pieces) in enumerate(rows):
        at = 0
        for prompt, members in pieces:
            first, after = at, at + len(prompt)
            input_ids[row, first:after] = torch.tensor(prompt)
            position_ids[row, first:after] = torch.arange(len(prompt))
            visible[row, first:after, first:after] = _causal(len(prompt))
            at = after
            for member in members:
                count = counts[member]
                own = slice(at, at + count)
                tokens = len(ids[member]) - num_completion
                input_ids[row, own] = torch.tensor(ids[member][tokens : tokens + count], dtype=torch.long)
                position_ids[row, own] = torch.arange(len(prompt), len(prompt) + count)
                visible[row, own, first:after] = True
                visible[row, own, own] = _causal(count)
                # The prompt's last state predicts the first token, each token's state the next one.
                states[member, :1] = row * length + after - 1
                states[member, 1:count] = row * length + torch.arange(at, at + max(count - 1, 0))
                at += count
    return Packed(*(x.to(device) for x in (input_ids, position_ids, visible[:, None], states)))


def _causal(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool).tril()


def packed_hidden(backbone: nn.Module, packed: Packed) -> Tensor:
    """[B, T, D]: the states that predict the completion tokens; what stands at padding is arbitrary but finite."""
    hidden = backbone(
        input_ids=packed.input_ids,
        attention_mask=packed.visible,
        position_ids=packed.position_ids,
        use_cache=False,
    ).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, packed.states.flatten()).unflatten(0, packed.states.shape)


_tried: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_pack(backbone: nn.Module) -> bool:
    """Whether packed sequences give this model's hidden states: tried out once, on a few tokens.

    Only on a CPU: on a GPU the fused kernels that take no dense mask are worth more. Only for parameters in float32:
    in half precision the rounding of a deep model is too near to what a wrong mask does to tell them apart.
    """
    if backbone not in _tried:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            _tried[backbone] = _try_to_pack(backbone)
    return _tried[backbone]


def _try_to_pack(backbone: nn.Module) -> bool:
    config = backbone.config
    parameter = next(backbone.parameters())
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if (
        parameter.device.type != "cpu"
        or parameter.dtype != torch.float32
        or config._attn_implementation not in _DENSE
        or layers != {"full_attention"}
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
        return hidden_close(packed_hidden(backbone, packed)[real], token_hidden(backbone, ids, mask)[:, 2:-1][real])
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
