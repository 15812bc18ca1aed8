"""What a run says of its plan: a line before it loads, and why when memory runs out.

A plan must never stop a run, so whatever goes wrong with one here leaves nothing to say.
"""

from __future__ import annotations

from fastppo.errors import one_line
from fastppo.training.config import Config
from fastppo.training.distributed.launch import world_size
from fastppo.training.plan.advice import advise
from fastppo.training.plan.page import gib, verdict
from fastppo.training.plan.phases import memory_of
from fastppo.training.plan.plan import Plan, machine_of


def in_one_line(config: Config) -> str:
    """Whether the run fits, as planned; empty where there is no plan."""
    try:
        return f"memory: {verdict(_plan(config))}; `fastppo plan` says more"
    except Exception:
        return ""


def out_of_memory(error: BaseException, config: Config) -> str:
    """What happened, what was planned and what to change.

    Args:
        error: PyTorch's, or Python's own; `phase` is that of the step.
    """
    phase = getattr(error, "phase", "load")
    happened = f"out of memory in phase `{phase}` ({one_line(error, 350)})"
    try:
        plan = _plan(config)
        names = ("policy update", "critic update", "optimizer step") if phase == "update" else (phase,)
        there = [p for p in plan.memory.phases if p.name in names]
        planned = max(there or plan.memory.phases, key=lambda p: p.total)
        advice = advise(config, plan.machine, plan.memory)
        what = f"planned were {gib(planned.total)} of {gib(plan.machine.memory)} for it"
        changes = ", or ".join(f"{a.change} (saves {gib(a.saves)})" for a in advice)
        return f"{happened}; {what}; try {changes or 'a smaller model'}"
    except Exception:
        return f"{happened}; take a smaller model or fewer tokens at a time: batch.max_tokens, model.lora"


def _plan(config: Config) -> Plan:
    machine = machine_of(config, None, world_size())
    return Plan(machine, memory_of(config, machine), [])
