"""Checkpoints: the folders on disk, optimizer states in them, and the check that a run resumes its own."""

from fastppo.training.checkpoint.optimizer import load_optimizer, optimizer_tensors
from fastppo.training.checkpoint.same_run import MAY_DIFFER, check_same_run
from fastppo.training.checkpoint.store import (
    Checkpoint,
    CheckpointError,
    discard_checkpoints,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

__all__ = [
    "MAY_DIFFER", "Checkpoint", "CheckpointError", "check_same_run", "discard_checkpoints", "find_checkpoint",
    "load_checkpoint", "load_optimizer", "optimizer_tensors", "save_checkpoint",
]  # fmt: skip
