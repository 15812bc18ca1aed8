"""The share of the device's memory that vLLM runs with, from the plan of the run."""

from __future__ import annotations

from fastppo.errors import ConfigError, one_line
from fastppo.models.source import ModelError
from fastppo.training.config import Config
from fastppo.training.plan.page import gib
from fastppo.training.plan.phases import Machine, memory_of

_KEY = "rollout.vllm.gpu_memory_utilization"


def vllm_memory_utilization(config: Config, machine: Machine) -> float:
    """vLLM's `gpu_memory_utilization`: as configured, or what the trainer leaves and no more than it can use.

    Raises:
        ConfigError: too little is left, or the run cannot be planned.
    """
    if config.rollout.vllm.gpu_memory_utilization is not None:
        return config.rollout.vllm.gpu_memory_utilization
    try:
        memory = memory_of(config, machine)
    except (ModelError, NotImplementedError) as error:
        raise ConfigError(f"{_KEY}: no plan to take it from; set it ({one_line(error, 300)})") from error
    rollout = next(phase for phase in memory.phases if phase.name == "rollout")
    if rollout.total > machine.memory:
        raise ConfigError(
            f"rollout.engine: vLLM does not fit beside the trainer: sampling needs {gib(rollout.total)}, there are "
            f"{gib(machine.memory)}; `fastppo plan` says what helps, and {_KEY} overrules it"
        )
    return memory.vllm / machine.device_memory
