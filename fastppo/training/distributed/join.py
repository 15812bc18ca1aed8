"""Put together what ranks have sampled and scored, as one process would have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.rollout.prompt import Prompt
from fastppo.rollout.sample import Rollout
from fastppo.training.rewards import RewardError


def on_cpu(rollout: Rollout, count: int) -> Rollout:
    """Its first `count` completions, in the host's memory."""
    fields = rollout._asdict().items()
    return Rollout(**{k: v[:count].cpu() if isinstance(v, Tensor) else v[:count] for k, v in fields})


def join_rollouts(parts: list[Rollout], prompts: list[Prompt], pad: int, device: torch.device) -> Rollout:
    """One rollout of those of all ranks.

    Args:
        parts: of `on_cpu`, by rank.
        prompts: those of all ranks.
        pad: token id of padding.
        device: of the result.
    """
    lengths = [part.mask.shape[1] for part in parts]
    widths = [part.sequences.shape[1] - length for part, length in zip(parts, lengths, strict=True)]

    def join(name: str, fill: int | float | bool, *, with_prompts: bool = False) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        padded = [
            F.pad(tensor, (max(widths) - width if with_prompts else 0, max(lengths) - length), value=fill)
            for tensor, width, length in zip(tensors, widths, lengths, strict=True)
        ]
        return torch.cat(padded).to(device)

    numbers: dict[int, int] = {}  # as `sample` counts
    groups = [numbers.setdefault(id(prompt), len(numbers)) for prompt in prompts]
    return Rollout(
        sequences=join("sequences", pad, with_prompts=True),
        attention_mask=join("attention_mask", 0, with_prompts=True),
        mask=join("mask", False),
        completions=[text for part in parts for text in part.completions],
        ended=torch.cat([part.ended for part in parts]).to(device),
        groups=torch.tensor(groups, device=device),
        logprobs=join("logprobs", 0.0),
    )


def join_rewards(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The rewards [B] or [B, T] of all ranks by name; a rank without completions has none."""
    joined = {}
    for name in next(filter(None, parts)):
        tensors = [part[name] for part in parts if part]
        if len({tensor.dim() for tensor in tensors}) > 1:
            raise RewardError(f"reward {name!r}: gave numbers for tokens on some ranks, for completions on others")
        longest = max(tensor.shape[-1] for tensor in tensors)
        if tensors[0].dim() == 2:
            tensors = [F.pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors]
        joined[name] = torch.cat(tensors)
    return joined
