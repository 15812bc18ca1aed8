"""Several processes under torchrun: FSDP2 or replicas, and what all ranks decide together."""

from fastppo.training.distributed.launch import connect, open_ranks, rank_device

__all__ = ["connect", "open_ranks", "rank_device"]
