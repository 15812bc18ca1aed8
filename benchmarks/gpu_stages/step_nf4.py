"""A PPO step of a model of 8 billion parameters in 4 bits, with adapters for policy and critic, on a card of 24 GB."""

from __future__ import annotations

import importlib.util

import torch

from gpu_stages import training_step
from gpu_stages.bench import Bench

MODEL = "Qwen3-8B"
SECTIONS = {
    "model": {
        "dtype": "bfloat16",
        "autocast": "bfloat16",
        "quantization": "nf4",
        "gradient_checkpointing": True,
        "lora": {"r": 16, "lora_alpha": 32},
        "value_model": "adapter",
    },
    "optim": {"learning_rate": 1.0e-3, "value_learning_rate": 1.0e-3},
}
CARD_GIB = 23.0  # what PyTorch may take of 24: the context, and what is not on offer, take the rest


def run(bench: Bench) -> None:
    if missing := [name for name in ("bitsandbytes", "peft") if importlib.util.find_spec(name) is None]:
        bench.row(MODEL, "nf4", "skipped", error=f"{missing[0]} is not installed")
        return
    if bench.on_gpu:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, CARD_GIB * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        )
    training_step.run(bench, MODEL, SECTIONS, sequences=32, size=8, prompt=96, new=96, card_gib=24.0)
