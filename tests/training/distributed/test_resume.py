"""Runs of several processes resume: on as many to the same bits, on another number with the same state."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import config, make_world
from ranks import run_ranks
from tiny import metrics_of

from fastppo.training import trainer as module
from fastppo.training.optim import optimizer_tensors

pytestmark = pytest.mark.slow

RUNS = {
    "sharded": {"model__value_model": "separate", "ppo__reference_refresh_steps": 1},
    "adapters": {"model__lora": {"r": 4}},
}


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}
    flat = {name: t.detach().contiguous().reshape(-1).view(torch.uint8).numpy() for name, t in whole.items()}
    return {name: hashlib.sha256(values).hexdigest() for name, values in flat.items()}


def noise(completions: list[str]) -> list[float]:
    """A reward that draws random numbers, more of them on later ranks."""
    return [random.random() for _ in completions for _ in range(1 + int(os.environ["RANK"]))][-len(completions) :]


def go_on(world: Path, out: Path, total_steps: int, rewards: Any, changes: dict[str, Any]) -> Any:
    """Resume a run to `total_steps`; returns the bits of all state at both ends."""
    module.write_report = lambda folder: folder / "report.html"
    settings = config(world, out, total_steps=total_steps, checkpoint__every=1, **changes)
    trainer = module.Trainer(settings, rewards=rewards, resume=True)

    def state() -> dict[str, str]:
        return bits({**trainer.learner.parameters(), **optimizer_tensors(trainer.optimizer)[0]})

    began = state()
    assert trainer.train().step == total_steps
    return began, state()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", RUNS)
def test_on_another_number_of_ranks(world, name):
    ended = None
    for step, num_ranks in enumerate((2, 1, 4), 1):
        results = run_ranks(num_ranks, go_on, world, world / "moved" / name, step, None, RUNS[name])
        assert all(result == results[0] for result in results)
        assert ended in (None, results[0][0])
        ended = results[0][1]
    assert [row["step"] for row in metrics_of(world / "moved" / name)] == [1, 2, 3]


def test_on_as_many_ranks_the_run_goes_on_to_the_same_bits(world):
    straight = run_ranks(2, go_on, world, world / "straight", 3, [noise], RUNS["sharded"])
    for steps in (1, 3):
        stopped = run_ranks(2, go_on, world, world / "stopped", steps, [noise], RUNS["sharded"])
    assert stopped[0][1] == stopped[1][1] == straight[0][1]
    assert metrics_of(world / "stopped") == metrics_of(world / "straight")


def roll_back(world: Path, out: Path) -> tuple[int, dict[str, str]]:
    module.write_report = lambda folder: folder / "report.html"
    rule = {"metric": "kl/reference", "above": 5.0, "action": "rollback"}
    # At this learning rate one step ruins the model.
    changes = {"optim__learning_rate": 0.3, "watch__lr_factor": 0.003, "watch__rules": [rule]}
    trainer = module.Trainer(config(world, out, checkpoint__every=1, **changes))
    assert trainer.train().step == 3
    return trainer.watch.rollbacks, bits(trainer.learner.parameters())


def test_ranks_roll_back_together(world):
    first, second = run_ranks(2, roll_back, world, world / "rolled back")
    assert first == second
    assert first[0] > 0
    assert [row["step"] for row in metrics_of(world / "rolled back")] == [1, 2, 3]
