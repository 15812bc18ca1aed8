"""What vLLM takes of the device beside the trainer: weights of its own, activations, CUDA graphs, keys and values.

Its `gpu_memory_utilization` is a share of the whole device, of which keys and values get what the rest leaves. More
than all sequences of a rollout can fill would be in vain, so the share is no larger. On a CPU it is that of weights,
keys and values alone, since the engine tells vLLM the bytes of its keys and values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastppo.models.load import load_configuration
from fastppo.training.config import Config

_BLOCK = 128  # tokens; a sequence has whole blocks, which are no larger
GRAPHS, OTHERWISE = 2**30, 2**28
"""What stays on a GPU while it is asleep: its CUDA graphs and its kernels' workspaces, or these alone."""


class VLLMBytes(NamedTuple):
    """Bytes of one process while vLLM is awake."""

    weights: int
    activations: int
    cache: int
    """Keys and values of all sequences at their full length."""
    sequence: int
    """Of `cache`: those of one sequence, which is the least that it runs with."""

    def cache_in(self, room: float, *, fill: bool) -> int:
        """Keys and values where they and the weights have so much room: all that is left, or what can be used of it."""
        left = int(room) - self.weights
        return max(self.sequence, left if fill else min(self.cache, left))


def largest_batch(device: str, memory: int, processes: int) -> tuple[int, int]:
    """Tokens and sequences of a forward pass of vLLM, by its defaults, of processes that share an engine."""
    if device == "cpu":
        return 4096 * processes, 256 * processes
    return (16384, 1024) if memory >= 70 * 2**30 else (8192, 256)


def vllm_bytes(
    config: Config, batch: tuple[int, int], *, weights: int, adapters: int, cache: int, sequences: int, length: int
) -> VLLMBytes:
    """What vLLM needs for a rollout.

    Args:
        batch: see `largest_batch`.
        weights: bytes of the policy's weights, in the data type that vLLM has them in.
        adapters: bytes of the policy's adapters.
        cache: bytes of the keys and values of a token.
        sequences: of one process, each of at most `length` tokens.
    """
    shared, block = config.rollout.vllm.tensor_parallel_size, cache * _BLOCK
    whole = block * math.ceil(length / _BLOCK)
    model = load_configuration(config.model).get_text_config()
    width, inner = model.hidden_size, getattr(model, "intermediate_size", None) or 4 * model.hidden_size
    itemsize = getattr(torch, config.model.autocast or config.model.dtype).itemsize
    # The hidden states, their residual and a gated MLP's two inner states; then logits, their float32 copy and its
    # softmax, sorted once.
    tokens, rows = batch
    activations = tokens * (4 * width + 3 * inner // shared) * itemsize + rows * model.vocab_size * (itemsize + 3 * 4)
    # Each process keeps its part of the heads of what `shared` of them sample together. vLLM leaves one block empty.
    least = math.ceil((whole + block) / shared)
    return VLLMBytes(weights // shared + adapters, activations, whole * sequences + block, least)
