"""The random-number generators of a process as tensors and JSON, so that a resumed run draws the same numbers."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.engines.dispatch import FastPPOWarning
from fastppo.training.checkpoint import CheckpointError


def seed_everything(seed: int) -> None:
    """Seed Python's `random`, numpy's global generator, and torch's on the CPU and every GPU.

    Args:
        seed: 0 <= seed < 2**64; numpy takes its lowest 32 bits, all that its seed has.

    Raises:
        ValueError: a seed outside that range.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an integer in [0, 2**64), got {seed!r}")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  the global generator is the one that libraries draw from
    torch.manual_seed(seed)


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of Python's `random`, numpy's global generator, torch's CPU generator and every GPU's.

    GPUs are included once this process has used one: before that nothing has been drawn there, and asking would claim
    memory on all of them.

    Returns:
        tensors: generator's name -> integer tensor, on the CPU.
        meta: JSON values; the rest of those generators' states.
    """
    version, words, gauss_next = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    numpy_words = numpy_state["state"].pop("key", None)  # MT19937's words; other bit generators have a few integers
    tensors = {"python": torch.tensor(words, dtype=torch.int64), "torch": torch.get_rng_state()}
    if numpy_words is not None:
        tensors["numpy"] = torch.from_numpy(numpy_words.astype(np.int64))
    if torch.cuda.is_initialized():
        for index, generator_state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = generator_state
    return tensors, {"python": {"version": version, "gauss_next": gauss_next}, "numpy": numpy_state}


def set_rng_state(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Put every generator back to where `rng_state` found it.

    GPUs that were saved but are not here are warned of (FastPPOWarning): numbers drawn in their stead differ.

    Raises:
        CheckpointError: a generator's state is missing or not one that this Python, numpy or torch can take.
    """
    try:
        words = tuple(tensors["python"].tolist())
        numpy_state = {**meta["numpy"], "state": dict(meta["numpy"]["state"])}
        if "numpy" in tensors:
            numpy_state["state"]["key"] = tensors["numpy"].numpy().astype(np.uint32)
        random.setstate((meta["python"]["version"], words, meta["python"]["gauss_next"]))
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.set_rng_state(tensors["torch"])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the random-number generators cannot be restored: {error!r}") from error
    saved = sorted(int(name.removeprefix("cuda.")) for name in tensors if name.startswith("cuda."))
    present = torch.cuda.device_count() if saved and torch.cuda.is_available() else 0
    if present < len(saved):
        warnings.warn(
            f"the checkpoint has random-number states of {len(saved)} GPUs, {present} are here: what is drawn from now "
            "on may differ from the run that was saved",
            FastPPOWarning,
            stacklevel=2,
        )
    for index in saved[:present]:
        torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
