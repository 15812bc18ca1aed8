"""A PPO step of a model of 1.2 billion parameters, all of which are trained: policy, critic and reference apart."""

from __future__ import annotations

from gpu_stages import training_step
from gpu_stages.bench import Bench

MODEL = "Llama-3.2-1B"
SECTIONS = {
    "model": {"dtype": "float32", "autocast": "bfloat16", "value_model": "separate"},
    "optim": {"learning_rate": 3.0e-5, "value_learning_rate": 3.0e-5},
}


def run(bench: Bench) -> None:
    training_step.run(bench, MODEL, SECTIONS, sequences=64, size=8, prompt=128, new=256, card_gib=80.0)
