"""How a batch of sequences becomes micro-batches: what each rank computes in each of its passes through a model.

By number of sequences, a rank's share is cut as it stands. By tokens, all sequences are sorted by length, dealt to the
ranks in turn, and each rank's are cut where the next one would not fit:

    lengths 9 7 7 5 4 2, two ranks, 12 tokens      rank 0:  9 | 7 4      rank 1:  7 5 | 2

Either way a rank's first pass has its longest sequence, so that what does not fit in memory fails at once, and all
ranks have as many passes, which sharded models need.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def micro_batches(
    prompts: Sequence[int],
    completions: Sequence[int],
    *,
    most_sequences: int,
    max_tokens: int | None = None,
    padded: bool = False,
    ranks: int = 1,
) -> list[list[list[int]]]:
    """Divide B sequences among ranks and passes.

    Args:
        prompts, completions: [B], the tokens of each sequence's prompt and completion.
        most_sequences: most sequences in the passes of all ranks together; not used with `max_tokens`.
        max_tokens: most tokens in one pass of one rank.
        padded: whether `max_tokens` counts padding: a pass of rows as long as the longest prompt and the longest
            completion together.
        ranks: how many there are.

    Returns:
        For each rank, the row numbers of each of its passes. Every row is there once. The last passes of some ranks may
        be empty.

    Raises:
        ValueError: a sequence has more than `max_tokens`.
    """
    count = len(prompts)
    lengths = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    if max_tokens is None:
        most = math.ceil(most_sequences / ranks)
        shares = [range(count * rank // ranks, count * (rank + 1) // ranks) for rank in range(ranks)]
        passes = [[list(share[start : start + most]) for start in range(0, len(share), most)] for share in shares]
        for own in passes:
            own.sort(key=lambda rows: -max(lengths[row] for row in rows))
    else:
        if lengths and max(lengths) > max_tokens:
            raise ValueError(f"a sequence of {max(lengths)} tokens does not fit in a pass of {max_tokens}")
        order = sorted(range(count), key=lambda row: -lengths[row])
        passes = [_cut(order[rank::ranks], prompts, completions, max_tokens, padded) for rank in range(ranks)]
    needed = max(map(len, passes))
    return [own + [[]] * (needed - len(own)) for own in passes]


def _cut(
    rows: list[int], prompts: Sequence[int], completions: Sequence[int], max_tokens: int, padded: bool
) -> list[list[int]]:
    """The rows in parts of at most `max_tokens`, each as long as they allow."""
    parts: list[list[int]] = []
    longest, real = (0, 0), 0  # of the last part: its longest prompt and completion, and its tokens without padding
    for row in rows:
        own = prompts[row], completions[row]
        longer, more = (max(longest[0], own[0]), max(longest[1], own[1])), real + sum(own)
        tokens = (len(parts[-1]) + 1) * sum(longer) if padded and parts else more
        if not parts or tokens > max_tokens:
            parts.append([])
            longer, more = own, sum(own)
        parts[-1].append(row)
        longest, real = longer, more
    return parts
