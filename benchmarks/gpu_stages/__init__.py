"""The stages of benchmarks/gpu.py, in the order in which they run.

A stage is a module of this package, of the stage's name, with a function `run(bench: Bench)`. To add one, write its
module and a line below. See `bench.Bench` for what a stage is given.
"""

from typing import NamedTuple


class Stage(NamedTuple):
    """Time limits in seconds: of the whole stage, and of a single case, after which the stage starts again without it.

    A limit of a case bounds how long a stage may go without writing a row. `attempts`: how often a stage that crashes
    is started in all.
    """

    seconds: float
    case_seconds: float
    attempts: int = 4


STAGES = {
    "compile": Stage(60, 60, attempts=1),
    "correctness": Stage(90, 40),
    "ceilings": Stage(20, 20),
    "loss": Stage(90, 40),
    "design": Stage(60, 40),
    "peers": Stage(100, 45),
    "logits": Stage(30, 20),
    "elementwise": Stage(40, 20),
    "graph": Stage(45, 30),
    "sanitizer": Stage(40, 40, attempts=1),
    "tests": Stage(240, 240, attempts=1),
    "rollout": Stage(120, 90, attempts=2),
    "step_full": Stage(120, 90, attempts=2),
    "step_nf4": Stage(120, 90, attempts=2),
    "example": Stage(120, 120, attempts=1),
}
