"""What would lower a plan's peak: the same configuration with one key changed, planned anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from fastppo.errors import FastPPOError
from fastppo.training.config import Config, build_config, to_dict
from fastppo.training.distributed import strategy_of
from fastppo.training.plan.phases import Machine, Memory, memory_of

_WORTH = 0.02  # of the peak, below which a change is not worth a line


class Advice(NamedTuple):
    change: str  # as on the command line
    saves: int  # bytes of the peak
    peak: int  # bytes


def advise(config: Config, machine: Machine, memory: Memory, most: int = 3) -> list[Advice]:
    """The changes that save most, at most so many."""
    found = []
    for key, value, shown in _changes(config, machine, memory):
        tree = to_dict(config)
        *sections, name = key.split(".")
        section = tree
        for part in sections:
            section = section[part]
        section[name] = value
        if name == "max_tokens":
            tree[config.algorithm]["gradient_accumulation_steps"] = 1
        try:
            peak = memory_of(build_config(tree), machine).peak.total
        except (FastPPOError, NotImplementedError):
            continue
        saves = memory.peak.total - peak
        if saves > _WORTH * memory.peak.total:
            found.append(Advice(f"--{key} {shown}", saves, peak))
    return sorted(found, key=lambda advice: -advice.saves)[:most]


def _changes(config: Config, machine: Machine, memory: Memory) -> Iterator[tuple[str, Any, str]]:
    """Keys that are not set to what needs least: key, value, and the value as it is written."""
    model, cuda, rows = config.model, machine.device == "cuda", memory.shape.rows
    phase = memory.peak.name
    passes = phase in ("score", "policy update", "critic update")
    sharded = strategy_of(config, machine.processes) == "fsdp2"
    if passes:
        if not model.gradient_checkpointing:
            yield "model.gradient_checkpointing", True, "true"
        if rows > 1:
            length = memory.shape.prompt + memory.shape.completion
            if config.batch.max_tokens is not None or config.algorithm_config.gradient_accumulation_steps == 1:
                tokens = max(1, rows // 4) * length
                yield "batch.max_tokens", tokens, f"{tokens}"
            else:
                key = f"{config.algorithm}.gradient_accumulation_steps"
                steps = 2 * config.algorithm_config.gradient_accumulation_steps
                yield key, steps, f"{steps}"
        if cuda and not model.activation_offloading:
            yield "model.activation_offloading", True, "true"
    if phase == "rollout" and memory.shape.sampled > 1 and memory.vllm is None:
        size = max(1, memory.shape.sampled // 4)
        yield "rollout.generation_batch_size", size, f"{size}"
    if model.lora is None:
        yield "model.lora", {"r": 16}, '"{r: 16}"'
        if machine.processes > 1 and not sharded:
            yield "distributed.strategy", "fsdp2", "fsdp2"
        if not sharded and config.optim.name == "adamw":
            name = "paged_adamw_8bit" if cuda else "adamw_8bit"
            yield "optim.name", name, name
    else:
        if model.quantization is None and not sharded:
            yield "model.quantization", "nf4", "nf4"
        if model.dtype != "bfloat16":
            yield "model.dtype", "bfloat16", "bfloat16"
        if model.value_model == "separate":
            yield "model.value_model", "adapter", "adapter"
    if model.value_model == "separate":
        yield "model.value_model", "shared", "shared"
    if cuda and not model.offload_idle and (model.value_model == "separate" or model.lora is None):
        yield "model.offload_idle", True, "true"
    if sharded and cuda and not config.distributed.cpu_offload:
        yield "distributed.cpu_offload", True, "true"
