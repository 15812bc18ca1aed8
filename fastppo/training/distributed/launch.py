"""From torchrun's environment to the ranks of a run, and one error message for all of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from fastppo.algorithms.ranks import Ranks
from fastppo.errors import ConfigError, quote

if TYPE_CHECKING:
    from fastppo.training.config import Config

_SECOND_ORDER = ("trpo", "npg", "cpi")


def world_size() -> int:
    """The number of processes that this one was started with, as torchrun says."""
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"WORLD_SIZE: expected a number of processes, got {quote(given)}; start with torchrun")
    return int(given)


def connect() -> None:
    """Join the group of all processes, unless there is only one, or it has been joined."""
    if world_size() == 1 or dist.is_initialized():
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(f"WORLD_SIZE is {world_size()}, but {missing[0]} is not set; start with torchrun")
    gpus = torch.cuda.device_count()
    if gpus > (local := int(os.environ["LOCAL_RANK"])):
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus > local else "gloo")


def rank_device(device: torch.device) -> torch.device:
    """This rank's device of the kind that the configuration names."""
    if world_size() == 1 or device.type != "cuda":
        return device
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"device: process {local} of this host has no GPU of its own, the host has {torch.cuda.device_count()}; "
            "start as many processes (torchrun --nproc-per-node), or set device: cpu"
        )
    return torch.device("cuda", local)


def open_ranks(config: Config, device: torch.device) -> Ranks:
    """The ranks of a run, whose group they join.

    Raises:
        ConfigError: the run cannot be divided among so many processes.
    """
    size = world_size()
    if size == 1:
        return Ranks()
    connect()
    strategy = config.distributed.strategy
    if strategy == "auto":
        strategy = "fsdp2" if config.model.lora is None else "replicate"
    if config.rollout.num_prompts % size:
        raise ConfigError(
            f"rollout.num_prompts: {config.rollout.num_prompts} prompts cannot be divided among {size} processes; give "
            f"a multiple of {size}"
        )
    if config.distributed.cpu_offload and strategy == "replicate":
        raise ConfigError("distributed.cpu_offload: has no effect on replicas; set distributed.strategy: fsdp2")
    if strategy == "fsdp2" and config.algorithm in _SECOND_ORDER:
        raise ConfigError(
            f"distributed.strategy: {config.algorithm} needs all parameters on every rank, which fsdp2 shards; take "
            "adapters (model.lora), or distributed.strategy: replicate"
        )
    if strategy == "replicate":
        from fastppo.training.distributed.processes import Processes

        return Processes(device)
    from fastppo.training.distributed.sharded import ShardedProcesses

    autocast = config.model.autocast and getattr(torch, config.model.autocast)
    return ShardedProcesses(device, autocast=autocast, cpu_offload=config.distributed.cpu_offload)
