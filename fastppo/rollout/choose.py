"""Which engine samples a run's completions."""

from __future__ import annotations

import torch
from torch import nn

from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.engine import Engine, EngineError
from fastppo.rollout.generate import TransformersEngine
from fastppo.rollout.loop import LoopEngine, can_decode
from fastppo.rollout.vllm import VLLMEngine


def open_engine(
    policy: nn.Module,
    config: RolloutConfig,
    device: torch.device,
    *,
    max_length: int | None = None,
    gpu_memory_utilization: float | None = None,
) -> Engine:
    """The engine that `rollout.engine` asks for, or what fits best on this device.

    Args:
        max_length: tokens of the longest sequence, for engines that reserve memory for it; None if nobody knows.
        gpu_memory_utilization: share of the device's memory for vLLM.

    Raises:
        EngineError: that engine cannot sample from this policy here.
    """
    name = config.engine
    if name == "auto":
        # On a CPU most of generate()'s time is not the model's.
        name = "loop" if device.type == "cpu" and can_decode(policy) else "transformers"
    if name == "loop" and device.type != "cpu":
        raise EngineError(f"rollout.engine: loop samples on a CPU, this run is on {device}; set it to auto")
    if name == "loop" and not can_decode(policy):
        raise EngineError("rollout.engine: loop does not know how this model keeps its states; set it to transformers")
    if name == "vllm":
        return VLLMEngine(config, device, max_length=max_length, gpu_memory_utilization=gpu_memory_utilization)
    return {"loop": LoopEngine, "transformers": TransformersEngine}[name]()
