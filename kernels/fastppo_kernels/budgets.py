"""budgets.json: what each kernel's machine code may cost, and which of the tuner's configurations compile clean.

    {Triton minor version: {architecture: {
        "budgets": {"kernel precision": {figure: number}},
        "candidates": {"kernel precision": [fields of Gemm less their defaults, best guess first]}}}}

`python -m fastppo_kernels.aot --write-budgets` writes it and `python -m fastppo_kernels.aot` checks it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import triton

from fastppo_kernels.configs import Gemm

PATH = Path(__file__).with_name("budgets.json")
SLACK = 0.1  # ptxas allocates and schedules a little differently after any change
SLACK_COUNT = 8  # for what is counted in ones and tens
VERSION = ".".join(triton.__version__.split(".")[:2])


def read() -> dict[str, dict[str, dict[str, dict]]]:
    return json.loads(PATH.read_text())


def excess(arch: str, key: str, measured: Mapping[str, int]) -> list[str]:
    """In what a kernel exceeds its budget; nothing under a Triton that the file does not name."""
    known = read().get(VERSION)
    if known is None:
        return []
    budget = known.get(arch, {}).get("budgets", {}).get(key)
    if budget is None:
        return ["has no budget: run --write-budgets"]
    return [
        f"{name} {value}, its budget is {budget[name]}"
        for name, value in measured.items()
        if name != "tensor_core" and value > budget[name] * (1 + SLACK) + (SLACK_COUNT if name != "registers" else 0)
    ]


def candidates(kernel: str, arch: str, precision: str) -> list[Gemm]:
    """Configurations that compile clean: under this Triton, or, where the file does not name it, under all it does."""
    everything = read()
    known = [everything[VERSION]] if VERSION in everything else list(everything.values())
    lists = [entry.get(arch, {}).get("candidates", {}).get(f"{kernel} {precision}", []) for entry in known]
    return [Gemm(**config) for config in (lists[0] if lists else []) if all(config in other for other in lists)]


def write(
    measured: Mapping[tuple[str, str], Mapping[str, int]], clean: Mapping[tuple[str, str, str, Gemm], bool]
) -> None:
    """In place of what the file says of this Triton and the architectures that are named in each.

    Args:
        measured: (architecture, "kernel precision") -> figures.
        clean: (kernel, architecture, precision, configuration) -> whether it compiles clean.
    """
    everything = read() if PATH.exists() else {}
    of_version = everything.setdefault(VERSION, {})
    for arch in {arch for arch, _ in measured}:
        of_version.setdefault(arch, {"candidates": {}})["budgets"] = {}
    for arch in {arch for _, arch, _, _ in clean}:
        of_version[arch]["candidates"] = {}
    for (arch, key), figures in measured.items():
        of_version[arch]["budgets"][key] = dict(figures)
    for (kernel, arch, precision, config), works in clean.items():
        if works:
            given = {k: v for k, v in config._asdict().items() if v != Gemm._field_defaults.get(k)}
            of_version[arch]["candidates"].setdefault(f"{kernel} {precision}", []).append(given)
    PATH.write_text(_lines(everything, 4) + "\n")


def _lines(value: dict, depth: int, indent: str = "") -> str:
    """JSON with sorted keys and a line for each entry `depth` levels down."""
    if depth == 0 or not value:
        return json.dumps(value)
    entries = (f'{indent} "{key}": {_lines(value[key], depth - 1, indent + " ")}' for key in sorted(value))
    return "{\n" + ",\n".join(entries) + f"\n{indent}}}"
