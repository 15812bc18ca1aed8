"""Several processes under torchrun: FSDP2 or replicas, and what all ranks decide together."""

from fastppo.training.distributed.launch import (
    connect,
    disconnect,
    lost_process,
    open_ranks,
    open_replicas,
    rank_device,
    strategy_of,
    tells,
)

__all__ = [
    "connect",
    "disconnect",
    "lost_process",
    "open_ranks",
    "open_replicas",
    "rank_device",
    "strategy_of",
    "tells",
]
