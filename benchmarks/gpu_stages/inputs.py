"""Random inputs of the stages: a head with logits as spread as a language model's, and what PPO knows of a rollout."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]
SPREAD = 2.0  # standard deviation of the logits
ROWS = 1024  # logits of so many rows at a time, where they are only looked at


def head(tokens: int, dim: int, vocab: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensors:
    """hidden [N, D] and weight [V, D] of `dtype`; targets [N], every other one the likeliest token; advantages [N].

    old [N] is the log-probability now, a little moved: within the clip range, as in the first steps after a rollout.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    hidden, weight = normal(tokens, dim, dtype=dtype), normal(vocab, dim, dtype=dtype).mul_(SPREAD / dim**0.5)
    targets = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    logprobs = torch.empty(tokens, device=device)
    for start in range(0, tokens, ROWS):
        rows = slice(start, start + ROWS)
        z = hidden[rows] @ weight.t()
        likeliest = z.argmax(-1)
        even = torch.arange(len(likeliest), device=device) % 2 == 0
        targets[rows] = torch.where(even, likeliest, targets[rows])
        taken = z.gather(-1, targets[rows, None])[:, 0]
        logprobs[rows] = taken.float() - z.float().logsumexp(-1)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "targets": targets,
        "old": logprobs + 0.03 * normal(tokens),
        "advantages": normal(tokens),
    }
