"""Seed, save and restore the process's random-number generators: Python's, numpy's and torch's."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.engines.dispatch import FastPPOWarning


def seed_everything(seed: int) -> None:
    """Seed Python's `random`, numpy's global generator (with the seed's lowest 32 bits) and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries draw from the global generator
    torch.manual_seed(seed)


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The generators' states: integer tensors on the CPU by name, and JSON values for the rest.

    GPUs are included only if this process has used one; asking would otherwise allocate memory on all of them.
    """
    version, words, gauss_next = random.getstate()
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002
    numpy_words = numpy_state["state"].pop("key", None)  # of MT19937; other bit generators have only a few integers
    tensors = {"python": torch.tensor(words, dtype=torch.int64), "torch": torch.get_rng_state()}
    if numpy_words is not None:
        tensors["numpy"] = torch.from_numpy(numpy_words.astype(np.int64))
    if torch.cuda.is_initialized():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": {"version": version, "gauss_next": gauss_next}, "numpy": numpy_state}


def set_rng_state(tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Restore what `rng_state` returned. A FastPPOWarning tells of states whose GPU is missing.

    Raises:
        Exception: a state is missing, or this version of Python, numpy or torch does not accept it.
    """
    words, gauss_next = tuple(tensors["python"].tolist()), meta["python"]["gauss_next"]
    numpy_state = {**meta["numpy"], "state": dict(meta["numpy"]["state"])}
    if "numpy" in tensors:
        numpy_state["state"]["key"] = tensors["numpy"].numpy().astype(np.uint32)
        if not 0 <= numpy_state["state"]["pos"] <= tensors["numpy"].numel():  # numpy would read beyond the key
            raise ValueError(f"pos is outside of the key: {numpy_state['state']['pos']}")
    if not isinstance(gauss_next, float | None):  # Python takes anything, and fails at the next draw
        raise TypeError(f"gauss_next is no number: {gauss_next!r:.60}")
    random.setstate((meta["python"]["version"], words, gauss_next))
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(tensors["torch"])
    saved = sorted(int(name.removeprefix("cuda.")) for name in tensors if name.startswith("cuda."))
    present = torch.cuda.device_count() if saved and torch.cuda.is_available() else 0
    if present < len(saved):
        message = f"the checkpoint has random-number states of {len(saved)} GPUs, {present} are here"
        warnings.warn(f"{message}: the resumed run may draw other numbers", FastPPOWarning, stacklevel=2)
    for index in saved[:present]:
        torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
