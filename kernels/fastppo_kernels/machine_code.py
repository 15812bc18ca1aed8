"""What a compiled kernel costs, read from its machine code by the disassembler that Triton brings along."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

# Warp-level (Ampere), warpgroup-level (Hopper) and tensor-memory (Blackwell) products.
TENSOR_CORE = re.compile(r"[HIDQ]MMA\.|HGMMA\.|QGMMA\.|UTC[A-Z]*MMA")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"^(\.L_\w+):")


class Counts(NamedTuple):
    """Static instructions of a kernel.

    tensor_core: products on tensor cores. loop: everything else in the innermost loops around products.
    other: all other instructions, nearly all of them the epilogue of a tile, which is straight-line code.
    special: exponentials, logarithms and reciprocals (MUFU) among `other`.
    """

    tensor_core: int
    loop: int
    other: int
    special: int


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread)."""
    text = _run("cuobjdump", "-res-usage", cubin)
    registers, stack, local = (
        max(map(int, re.findall(rf"{key}:(\d+)", text)), default=0) for key in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def count(cubin: bytes) -> Counts:
    return count_instructions(_run("nvdisasm", "-c", cubin))


def count_instructions(assembly: str) -> Counts:
    """Of the text that nvdisasm prints.

    A loop is what lies between a label and a branch back to it. Where a loop around products holds another one, as
    where an iteration was peeled off, only the inner one counts. In a kernel without tensor cores the loop that holds
    the most multiply-adds takes that place.
    """
    opcodes, labels, branches = [], {}, []
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := _INSTRUCTION.match(line):
            if found[1].startswith("BRA") and (target := re.search(r"\.L_\w+", found[2])):
                branches.append((len(opcodes), target[0]))
            opcodes.append(found[1])
    while opcodes and opcodes[-1] == "NOP":  # padding
        opcodes.pop()
    loops = [(labels[to], at + 1) for at, to in branches if to in labels and labels[to] <= at]

    def smallest_around(position: int) -> tuple[int, int] | None:
        around = [loop for loop in loops if loop[0] <= position < loop[1]]
        return min(around, key=lambda loop: loop[1] - loop[0], default=None)

    products = [i for i, opcode in enumerate(opcodes) if TENSOR_CORE.match(opcode)]
    around = {smallest_around(i) for i in products} - {None}
    main = {a for a in around if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in around)}
    if not products:
        homes = [smallest_around(i) for i, opcode in enumerate(opcodes) if opcode.startswith("FFMA")]
        homes = [loop for loop in homes if loop]
        main = {max(set(homes), key=lambda loop: (homes.count(loop), loop))} if homes else set()
    inside = {i for first, last in main for i in range(first, last)}
    outside = [i for i in range(len(opcodes)) if i not in inside]
    return Counts(
        tensor_core=len(products),
        loop=len(inside.difference(products)),
        other=len(set(outside).difference(products)),
        special=sum(opcodes[i].startswith("MUFU") for i in outside),
    )


def _run(tool: str, option: str, cubin: bytes) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout
