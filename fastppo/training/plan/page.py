"""A plan as it is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastppo.training.plan.phases import AMPLE, CONTEXT, CONTEXT_OF_SEVERAL, FRAGMENTED, KINDS, PROCESS

if TYPE_CHECKING:
    from fastppo.training.plan.plan import Plan

_GIB = 2**30


def gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB" if num_bytes >= _GIB / 10 else f"{num_bytes / 2**20:.0f} MiB"


def verdict(plan: Plan) -> str:
    """One line: whether it fits."""
    peak, machine = plan.memory.peak, plan.machine
    each = f" for each of {machine.processes} processes" if machine.processes > 1 else ""
    where = "GPU" if machine.device == "cuda" else "CPU"
    fits = "does not fit" if not plan.fits else "fits" if peak.total <= AMPLE * machine.memory else "just fits"
    there = f"{gib(machine.memory)} of {where} memory{each}"
    return f"{fits}: needs {gib(peak.total)} at its peak, the {peak.name}; there are {there}"


def page(plan: Plan) -> str:
    """The verdict, the table of phases and kinds, and the advice."""
    lines = [verdict(plan), ""]
    phases = plan.memory.phases
    kinds = [kind for kind in KINDS if any(phase.kinds[kind] for phase in phases)]
    rows = [["GiB", *kinds, "sum"]]
    for phase in phases:
        cells = [f"{phase.kinds[kind] / _GIB:.2f}" if phase.kinds[kind] else "-" for kind in kinds]
        mark = "  <- peak" if phase is plan.memory.peak else ""
        rows.append([phase.name, *cells, f"{phase.total / _GIB:.2f}{mark}"])
    widths = [max(len(row[column].split("  <-")[0]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True))]
        total, _, mark = row[-1].partition("  ")
        lines.append("  ".join([*cells, total.rjust(widths[-1])]) + (f"  {mark}" if mark else ""))
    lines += ["", *_explain(plan), ""]
    if plan.advice:
        lines.append("Changes that would help most, each by itself:")
        for advice in plan.advice:
            fits = "" if advice.peak > plan.machine.memory or plan.fits else ", which fits"
            lines.append(f"  {advice.change:44} saves {gib(advice.saves)}: {gib(advice.peak)}{fits}")
    elif not plan.fits:
        lines.append("No change of one key would help much: take a smaller model, more processes, or a larger GPU.")
    return "\n".join(lines).rstrip()


def _explain(plan: Plan) -> list[str]:
    shape, machine = plan.memory.shape, plan.machine
    length = shape.prompt + shape.completion
    together = f"{shape.sampled} sequences together"
    if plan.memory.vllm is not None:
        together = f"which gets {gib(plan.memory.vllm)}: {plan.memory.vllm / machine.device_memory:.3f} of the memory"
    lines = [
        f"A pass: {shape.rows} sequences of {shape.prompt} + {shape.completion} tokens (data.max_prompt_length + "
        f"rollout.max_new_tokens), {shape.rows * length:,} in all.",
        f"Sampled by {plan.memory.engine}, {together}.",
    ]
    if plan.most_tokens:
        lines.append(f"Largest batch.max_tokens that fits: {plan.most_tokens:,}.")
    elif plan.most_tokens == 0:
        lines.append(f"No batch.max_tokens fits: a pass of one sequence has {length:,} tokens.")
    if machine.device == "cuda":
        context = gib(CONTEXT if machine.processes == 1 else CONTEXT_OF_SEVERAL)
        lines.append(f"Reserve, by assumption: {context} for CUDA and its libraries, and {FRAGMENTED:.0%} of the "
                     "tensors for the allocator's gaps.")  # fmt: skip
        lines.append("A GiB is 2**30 bytes: a GPU sold as 24 GB has about 23.5 of them, one of 80 GB about 79.")
    else:
        lines.append(f"Reserve, by assumption: {gib(PROCESS)} for Python and its packages.")
    lines += [f"Note: {note}." for note in plan.memory.notes]
    return lines
