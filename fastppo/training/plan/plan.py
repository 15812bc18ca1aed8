"""Whether a run fits in memory, from its configuration alone: no weights are read and nothing is computed."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from fastppo.training.config import Config
from fastppo.training.distributed import strategy_of
from fastppo.training.plan.advice import Advice, advise
from fastppo.training.plan.phases import Machine, Memory, memory_of


@dataclass
class Plan:
    """What a run needs and what there is, of one process; processes need the same."""

    machine: Machine
    memory: Memory
    advice: list[Advice]
    most_tokens: int | None = None
    """Largest batch.max_tokens that fits; 0 if none does, None if nobody asked."""

    @property
    def fits(self) -> bool:
        return self.memory.peak.total <= self.machine.memory


def plan(config: Config, machine: Machine) -> Plan:
    """Plan a run, with advice.

    Raises:
        ModelError: the configuration of a model cannot be had.
    """
    memory = memory_of(config, machine)
    most_tokens = _most_tokens(config, machine, memory)
    return Plan(machine, memory, advise(config, machine, memory), most_tokens)


def machine_of(config: Config, memory_gib: float | None, processes: int) -> Machine:
    """What there is: GPUs of so many GiB; else this machine's GPUs, or its memory, divided among the processes.

    Raises:
        ConfigError: the run cannot be divided among so many processes.
    """
    strategy_of(config, processes)  # refuses what cannot be divided
    device = config.device
    if memory_gib is not None:
        return Machine("cuda", int(memory_gib * 2**30), processes)
    if device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda" if device == "auto" else device)
        return Machine("cuda", torch.cuda.get_device_properties(device).total_memory, processes)
    return Machine("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes, processes)


def _most_tokens(config: Config, machine: Machine, memory: Memory) -> int:
    """Every moment grows by the same number of bytes with every sequence of a pass; the least that any allows.

    Except for scratch, which has a budget: so what two sizes tell is corrected by what the size itself takes.
    """
    shape, sequences = memory.shape, config.rollout.num_prompts * config.rollout.num_generations
    # All that a pass can have.
    most = math.ceil(sequences / config.algorithm_config.num_mini_batches / machine.processes)
    rows = _most_rows(memory, memory_of(config, machine, rows=2 * shape.rows), machine, most)
    if 0 < rows < most and rows != shape.rows:
        rows = _most_rows(memory, memory_of(config, machine, rows=rows), machine, most)
    return rows * (shape.prompt + shape.completion)


def _most_rows(memory: Memory, other: Memory, machine: Machine, rows: int) -> int:
    """Sequences of a pass that fit, at most so many, by what two numbers of them take."""
    for phase, larger in zip(memory.phases, other.phases, strict=True):
        for moment, total in phase.moments.items():
            each = (larger.moments[moment] - total) / (other.shape.rows - memory.shape.rows)
            free = machine.memory - total
            if each <= 0 and free < 0:
                return 0
            if each > 0:
                rows = min(rows, math.floor(memory.shape.rows + free / each))
    return max(0, rows)
