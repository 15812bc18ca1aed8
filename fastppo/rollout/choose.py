"""Which engine samples a run's completions."""

from __future__ import annotations

import torch
from torch import nn

from fastppo.models.head import causal_of
from fastppo.rollout import continuous
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.continuous import ContinuousEngine
from fastppo.rollout.engine import Engine, EngineError
from fastppo.rollout.generate import TransformersEngine
from fastppo.rollout.loop import LoopEngine, can_decode
from fastppo.rollout.vllm import VLLMEngine, check_vllm

NAMES = ("vllm", "continuous", "loop", "transformers")


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
        gpu_memory_utilization: share of the device's memory for vLLM. `auto` takes vLLM only if it is given: without,
            nobody has planned for a second copy of the weights.

    Raises:
        EngineError: that engine cannot sample from this policy here.
    """
    planned = gpu_memory_utilization is not None
    name = auto(device, policy, vllm=planned)[0] if config.engine == "auto" else config.engine
    if name == "vllm":
        return VLLMEngine(config, device, max_length=max_length, gpu_memory_utilization=gpu_memory_utilization)
    if config.engine != "auto" and (reason := why_not(name, device, policy)):
        raise EngineError(f"rollout.engine: {name} cannot be used: {reason}; set it to auto")
    return {"continuous": ContinuousEngine, "loop": LoopEngine, "transformers": TransformersEngine}[name]()


def auto(device: torch.device, policy: nn.Module | None = None, *, vllm: bool = True) -> tuple[str, str]:
    """The engine that `rollout.engine: auto` takes, and why.

    Without a policy: for one in half precision that every engine can sample from.

    Args:
        vllm: whether it may be vLLM.
    """
    if device.type == "cpu":  # most of generate()'s time is not the model's there
        names, why = ("loop", "transformers"), "on a CPU it spends the least time outside the model"
    else:
        names, why = ("vllm", "continuous", "transformers")[not vllm :], "the fastest here"
    for name in names:
        if name == "continuous" and policy is not None and causal_of(policy).dtype == torch.float32:
            reason = "these weights are float32, and its thread does not see autocast"
        else:
            reason = why_not(name, device, policy)
        if reason is None:
            return name, why
        why = f"{name} cannot be used: {reason}"
    raise AssertionError("generate() samples anywhere")


def why_not(name: str, device: torch.device, policy: nn.Module | None = None) -> str | None:
    """Why this engine cannot sample on this device, or from this policy; None if it can."""
    if name == "vllm":
        try:
            check_vllm()
        except EngineError as error:
            return str(error).removeprefix("rollout.engine: ")
    if name == "continuous":
        return continuous.why_not(policy)
    if name == "loop" and device.type != "cpu":
        return f"it samples on a CPU, this is {device}"
    if name == "loop" and policy is not None and not can_decode(policy):
        return "it does not know how this model keeps its states"
    return None
