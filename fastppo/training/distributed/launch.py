"""From torchrun's environment to the ranks of a run, and one error message for all of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

import fastppo
from fastppo.algorithms.ranks import Ranks
from fastppo.errors import ConfigError, one_line, quote

if TYPE_CHECKING:
    from fastppo.training.config import Config

_SECOND_ORDER = ("trpo", "npg", "cpi")
_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL", "Broken pipe")  # the backends' words


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
    try:
        local = int(os.environ["LOCAL_RANK"])
        if has_gpu := local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    except (ValueError, RuntimeError) as error:  # no number, a port in use, a process that is missing
        raise ConfigError(f"the processes cannot connect ({one_line(error, 200)}); start them with torchrun") from error


def disconnect() -> None:
    """Leave the group, after the last exchange."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank_device(device: torch.device) -> torch.device:
    """This rank's device of the kind that the configuration names."""
    if world_size() == 1 or device.type != "cuda":
        return device
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if device.index is not None:
        raise ConfigError(f"device: {device} is one GPU for {world_size()} processes; set device: cuda")
    if local >= gpus:
        raise ConfigError(
            f"device: there is no GPU for process {local} of this host, which has {gpus}; start as many processes, or "
            "set device: cpu"
        )
    return torch.device("cuda", local)


def open_ranks(config: Config, device: torch.device) -> Ranks:
    """The ranks of a run.

    Raises:
        ConfigError: the run cannot be divided among so many processes, or they differ in configuration or versions.
    """
    strategy = strategy_of(config, world_size())
    if strategy is None:
        return Ranks()
    connect()
    if strategy == "replicate":
        ranks = open_replicas(device)
    else:
        from fastppo.training.distributed.sharded import ShardedProcesses

        autocast = config.model.autocast and getattr(torch, config.model.autocast)
        ranks = ShardedProcesses(device, autocast=autocast, cpu_offload=config.distributed.cpu_offload)
    _check_alike(ranks, config)
    return ranks


def strategy_of(config: Config, size: int) -> str | None:
    """How so many processes share the models: `fsdp2` or `replicate`; None for one.

    Raises:
        ConfigError: the run cannot be divided among them.
    """
    share = config.rollout.vllm.tensor_parallel_size
    if size % share:
        processes = f"{size} processes" if size > 1 else "one process"
        raise ConfigError(
            f"rollout.vllm.tensor_parallel_size: {processes} cannot be divided into groups of {share}; start a "
            f"multiple of {share} with torchrun, or set it to 1"
        )
    if size == 1:
        return None
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
    if strategy == "fsdp2" and config.optim.name != "adamw":
        raise ConfigError(
            f"optim.name: {config.optim.name} (bitsandbytes) cannot update parameters that fsdp2 shards; set "
            "optim.name: adamw, or distributed.strategy: replicate"
        )
    if strategy == "fsdp2" and config.model.offload_idle:
        raise ConfigError(
            "model.offload_idle: fsdp2 shards the models; set distributed.cpu_offload: true, which keeps all shards in "
            "the host's memory"
        )
    for key, given in (("quantization", "nf4"), ("value_model", "adapter")):
        if strategy == "fsdp2" and getattr(config.model, key) == given:
            raise ConfigError(
                f"model.{key}: {given} is not possible with distributed.strategy: fsdp2; set that to replicate"
            )
    return strategy


def open_replicas(device: torch.device) -> Ranks:
    """The ranks of a job that changes no parameters, each with the whole of every model."""
    connect()
    if world_size() == 1:
        return Ranks()
    from fastppo.training.distributed.processes import Processes

    return Processes(device)


def _check_alike(ranks: Ranks, config: Config) -> None:
    import transformers

    from fastppo.training.config import to_dict

    versions = {module.__name__: module.__version__ for module in (fastppo, torch, transformers)}
    facts = {f"version of {name}": version for name, version in versions.items()} | _flat(to_dict(config))
    ranks.check_equal(facts, "all ranks need one configuration and the same versions")


def _flat(tree: Any, key: str = "") -> dict[str, Any]:
    """The values of a tree of dicts and lists by dotted keys."""
    if not isinstance(tree, dict | list):
        return {key: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for name, item in items for k, v in _flat(item, f"{key}.{name}".lstrip(".")).items()}


# One message, whichever ranks fail


def tells(error: BaseException) -> bool:
    """Whether this process is the one to tell of an error: the one whose it is, or the first of several."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    rank = getattr(error, "rank", None)
    if rank is not None:
        return rank == dist.get_rank()
    try:
        return dist.distributed_c10d._get_default_store().add("fastppo/errors", 1) == 1
    except Exception:  # the store has ended with its process
        return True


def lost_process(error: BaseException) -> bool:
    """Whether an exchange failed because another process has ended."""
    return (
        dist.is_available()
        and dist.is_initialized()
        and isinstance(error, RuntimeError)
        and any(words in str(error) for words in _LOST)
    )
