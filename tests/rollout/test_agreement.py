"""Runs that sample by different engines learn alike."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import build_changed_config, make_tiny_model, metrics_of, within_noise

from fastppo.training.trainer import Trainer

pytest.importorskip("transformers", minversion="5.17")

SEEDS, STEPS = 8, 3


def early(completion_ids):
    return [sum(token < 150 for token in ids) / len(ids) for ids in completion_ids]


def curves(engine: str, folder, **changes) -> torch.Tensor:
    """Mean reward and KL to the reference, [seeds, 2, steps] float64."""
    if not (folder / "prompts.txt").exists():
        path = make_tiny_model(folder / "model", layers=1) / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": list(range(2, 30))}))
        (folder / "prompts.txt").write_text("\n".join(f"The number {i} is {'very ' * (i % 3)}" for i in range(40)))
    found = []
    for seed in range(SEEDS):
        out = folder / f"{engine} {seed}"
        tree = {
            "output_dir": str(out),
            "seed": seed,
            "total_steps": STEPS,
            "report_to": "none",
            "model": {"name_or_path": str(folder / "model")},
            "data": {"train": str(folder / "prompts.txt"), "eval_size": 0},
            "rewards": [{"name": "early", "function": f"{__file__}:early"}],
            "rollout": {"num_prompts": 16, "num_generations": 8, "max_new_tokens": 12, "engine": engine},
            "optim": {"learning_rate": 5e-3},
            "checkpoint": {"every": 0},
        }
        Trainer(build_changed_config(tree, changes)).train()
        rows = [row for row in metrics_of(out) if "rollout/logprob_gap_max" in row]
        found.append([[row[name] for row in rows] for name in ("reward/mean", "kl/reference")])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.slow
def test_engines_agree_within_sampling_noise(tmp_path, monkeypatch):
    """Over eight seeds, whose completions differ from one engine to another."""
    monkeypatch.setattr("fastppo.training.trainer.write_report", lambda folder: folder / "report.html")
    loop, continuous = curves("loop", tmp_path), curves("continuous", tmp_path)
    assert (loop.mean(0)[:, -1] > loop.mean(0)[:, 0] + 0.05).all()  # it learns, and moves away from the reference
    assert within_noise(loop, continuous).all()
