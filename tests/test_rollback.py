"""Runs in trouble: what an alarm does to a run, and that a killed run comes to the same end."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tiny_model

from fastppo.training.checkpoint import find_checkpoint
from fastppo.training.config import build_config
from fastppo.training.metrics import read_alarms, read_metrics, read_samples
from fastppo.training.trainer import Trainer


def vowels(prompts, completions, **_):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(f"The number {i} is" for i in range(24)))
    (folder / "texts.txt").write_text("The weather was bad, the food was good.\n\nMy new neighbor is quiet.\n")
    (folder / "rewards.py").write_text(
        "def variety(completions):\n    return [len(set(text)) / max(len(text), 1) for text in completions]\n"
    )
    return folder


def config(world, out, **changes):
    tree = {
        "output_dir": str(out),
        "total_steps": 8,
        "tensorboard": False,
        "model": {"name_or_path": str(world / "model")},
        "data": {"train": str(world / "prompts.txt"), "eval_size": 8},
        "rewards": [{"name": "vowels", "function": f"{__file__}:vowels"}],
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_new_tokens": 8},
        "ppo": {"kl_coef": 0.0},
        "optim": {"learning_rate": 1e-3},
        "checkpoint": {"every": 2, "keep_last": 1},
        "eval": {"num_prompts": 8},
    }
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return build_config(tree)


def metrics_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time") and k != "tokens_per_second"} for r in rows]


def weights_of(out):
    return load_file(out / "final" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# A learning rate at which one step is enough to leave the model in ruins.
COLLAPSE = {
    "optim__learning_rate": 0.3,
    "watch__lr_factor": 0.003,
    "watch__rules": [{"metric": "kl/reference", "above": 5.0, "patience": 2, "action": "rollback"}],
}


def test_a_run_that_collapses_is_rolled_back_and_finishes(world, tmp_path):
    out = tmp_path / "run"
    result = Trainer(config(world, out, **COLLAPSE)).train()
    assert (result.step, result.stopped) == (8, None)
    assert result.final is not None
    [alarm] = [a for a in read_alarms(out) if a["action"] == "rollback"]
    assert (alarm["step"], alarm["metric"]) == (3, "kl/reference")
    assert "rolled back to step 0, with other random numbers" in alarm["outcome"]
    assert alarm["outcome"] in (out / "report.html").read_text()
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "lr" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))  # the abandoned steps are elsewhere
    assert all(row["lr"] == pytest.approx(0.3 * 0.003) and row["watch/rollbacks"] == 1 for row in rows)
    assert max(row["kl/reference"] for row in rows) < 5.0
    abandoned = read_metrics(out / "abandoned-1.jsonl")
    assert [row["step"] for row in abandoned] == [1, 2, 3]
    assert abandoned[-1]["kl/reference"] > 5.0
    # Step 1 samples from the same policy and the same prompts as before: what it draws is all that differs.
    assert rows[0]["reward/mean"] != abandoned[0]["reward/mean"]


@pytest.mark.parametrize("killed_at", [2, 3, 6])
def test_a_kill_before_in_or_after_a_rollback_changes_nothing(world, tmp_path, killed_at, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    Trainer(config(world, whole, **COLLAPSE)).train()

    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    trainer = Trainer(config(world, killed, **COLLAPSE))
    if killed_at == 3:  # after the newer checkpoints were deleted, before there is one that knows of the rollback
        trainer.progress = None
        roll_back, checkpoint = trainer._roll_back, trainer._checkpoint
        trainer._roll_back = lambda *a: (setattr(trainer, "_checkpoint", kill), roll_back(*a))
    else:
        step, count = trainer.train_step, []
        # The third step is the one that is rolled back.
        trainer.train_step = lambda: kill() if len(count) == {2: 2, 6: 3 + 5}[killed_at] else (count.append(1), step())[1]
    with pytest.raises(Killed):
        trainer.train()
    resumed = Trainer(config(world, killed, **COLLAPSE), resume=True)
    assert resumed.train().step == 8
    assert same(weights_of(whole), weights_of(killed))
    assert metrics_of(whole) == metrics_of(killed)
    assert read_alarms(whole) == read_alarms(killed)
    if killed_at != 3:
        assert [r["step"] for r in read_metrics(killed / "abandoned-1.jsonl")] == [1, 2, 3]
