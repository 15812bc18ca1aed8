"""A tiny world to train in on several ranks, and runs of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ranks import run_ranks
from tiny import build_changed_config, make_tiny_model

REWARDS = """
def vowels(prompts, completions, **_):
    return [sum(c in "aeiou" for c in t) / max(len(t), 1) for t in completions]


def early(completion_ids):
    return [[1.0 / (1 + i + t % 7) for i, t in enumerate(ids)] for ids in completion_ids]
"""


def make_world(folder: Path) -> Path:
    """A model with tied embeddings, one without, prompts and a reward file. Completions differ in length."""
    for name, tie in (("model", True), ("untied", False)):
        make_tiny_model(folder / name, tie=tie)
        generation = json.loads((folder / name / "generation_config.json").read_text())
        generation["eos_token_id"] = list(range(2, 60))
        (folder / name / "generation_config.json").write_text(json.dumps(generation))
    rows = [json.dumps({"prompt": f"The number {i} is {'very ' * (i % 3)}"}) for i in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "texts.txt").write_text("\n".join(f"There are {'so ' * i}many words." for i in range(5)))
    (folder / "reward.py").write_text(REWARDS)
    return folder


def config(world: Path, out: Path, **changes: Any):
    tree = {
        "output_dir": str(out),
        "total_steps": 3,
        "report_to": "none",
        "model": {"name_or_path": str(world / "model")},
        "data": {"train": str(world / "prompts.jsonl"), "eval_size": 0},
        "rewards": [{"name": "vowels", "function": f"{world / 'reward.py'}:vowels"}],
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_new_tokens": 8},
        "optim": {"learning_rate": 2e-4},
        "checkpoint": {"every": 0},
    }
    return build_changed_config(tree, changes)


def start(function: Callable[..., None], size: int, *arguments: Any) -> None:
    """Call function(*arguments) in `size` processes at once; raises what one of them raises."""
    run_ranks(size, _without_report, function, arguments, seconds=400)


def _without_report(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    from fastppo.training import trainer

    trainer.write_report = lambda folder: folder / "report.html"  # its plots take most of a tiny run's time
    function(*arguments)
