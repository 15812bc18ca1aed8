"""NaN and Inf at every stage of a run: `on_nonfinite` decides, in one line, and nothing that is saved is spoiled."""

from __future__ import annotations

import errno
import json
import math
import os
import re

import pytest
import torch
import yaml
from tiny import build_changed_config, make_tiny_model, metrics_of

from fastppo.algorithms.learner import NonFiniteError
from fastppo.cli import main
from fastppo.training.config import to_dict
from fastppo.training.metrics import MetricsLogger
from fastppo.training.optim import optimizer_tensors
from fastppo.training.progress import ProgressDisplay
from fastppo.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model", hidden_size=16, layers=1)
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"The number {i}"}) for i in range(8)))
    (folder / "reward.py").write_text("def nan(completions):\n    return [float('nan')] * len(completions)\n")
    return folder


def config(world, out, **changes):
    tree = {
        "output_dir": str(out),
        "total_steps": 2,
        "report_to": "none",
        "model": {"name_or_path": str(world / "model")},
        "data": {"train": str(world / "prompts.jsonl"), "eval_size": 0},
        "rewards": [
            {"name": "nan", "function": f"{world / 'reward.py'}:nan", "normalize": True},
            {"name": "bound", "function": f"{world / 'reward.py'}:nan", "threshold": 0.0},
        ],
        "rollout": {"num_prompts": 2, "num_generations": 2, "max_new_tokens": 3},
        "ppo": {"num_ppo_epochs": 1, "kl_controller": "adaptive"},
        "optim": {"learning_rate": 1e-3},
    }
    return build_changed_config(tree, changes)


def make_trainer(config, **options):
    """Rewards that give a number for each completion, set by `trainer.given`."""
    trainer = Trainer(config, **options)
    trainer.progress = ProgressDisplay(config.total_steps, enabled=False)
    trainer.given = {"nan": lambda i: float(i), "bound": lambda i: 0.5 * i}
    for reward in trainer.rewards.rewards:
        reward.function = lambda completions, name=reward.name: [
            trainer.given[name](i) for i in range(len(completions))
        ]
    return trainer


def spoil_values(trainer):
    with torch.no_grad():
        trainer.models.value.weight.fill_(math.nan)


def spoil_reference(trainer):
    hidden = trainer.models.reference_hidden
    trainer.models.reference_hidden = lambda *a: (hidden(*a)[0] * math.nan, hidden(*a)[1])


def spoil_policy(trainer):
    with torch.no_grad():
        next(iter(trainer.policy_parameters.values())).fill_(math.inf)


def spoil_multiplier(trainer):
    multiplier = trainer.rewards.multipliers["bound"]
    multiplier.threshold = multiplier.learning_rate = 1e308


SPOILED = {
    "a reward": (
        lambda trainer: trainer.given.update(nan=lambda i: math.nan if i == 1 else 1.0),
        r"reward: reward 'nan' gave nan for completion 1, .*, prompt 'The number \d'",
    ),
    "a weight": (lambda trainer: setattr(trainer.rewards.rewards[0], "weight", 1e300), "reward: the weighted sum"),
    "the multiplier": (spoil_multiplier, "reward: reward 'bound': multiplier: inf after 0.925, at a mean of 0.75"),
    "the KL penalty": (
        lambda trainer: setattr(trainer.algorithm.kl_controller, "value", 1e300),
        r"score: rewards, less the KL penalty \(kl_coef 1e\+300\): .* prompt 'The number",
    ),
    "the critic": (spoil_values, "score: values of the critic: nan at token 0 of completion 0, prompt 'The number"),
    "the reference": (spoil_reference, "score: log-probabilities under the reference: nan at token 0"),
    "the policy": (spoil_policy, "rollout: the policy's probabilities are not finite"),
}


@pytest.mark.parametrize("what", SPOILED)
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_step_whose_update_cannot_begin(world, tmp_path, what, on_nonfinite):
    """It changes neither parameters, optimizer, normalizers, multipliers nor the KL's coefficient."""
    trainer = make_trainer(config(world, tmp_path / "run", on_nonfinite=on_nonfinite))
    trainer.train_step()
    trainer.step, (spoil, message) = 1, SPOILED[what]
    spoil(trainer)

    def state():
        tensors = {**trainer.learner.parameters(), **optimizer_tensors(trainer.optimizer)[0]}
        controllers = json.dumps([trainer.algorithm.state_dict(), trainer.rewards.state_dict()])
        return {name: x.detach().clone() for name, x in tensors.items()}, controllers

    told, (tensors, controllers) = [], state()
    trainer.learner._warn = told.append
    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteError) as caught:
            trainer.train_step()
        told, end = [str(caught.value)], "; with on_nonfinite: skip, this step would be skipped"
    else:
        assert trainer.train_step() == {"policy/skipped_steps": 1.0, "tokens": 0, "lr": 1e-3}
        assert state()[1] == controllers
        assert trainer.models._kept is None
        end = "; this step is skipped"
    assert len(told) == 1
    assert re.match(f"step 2, {message}", told[0]), told
    assert told[0].endswith(end)
    assert "\n" not in told[0]
    for name, now in state()[0].items():
        torch.testing.assert_close(now, tensors[name], rtol=0, atol=0, equal_nan=True)


def test_a_run_stops_in_one_line_and_goes_on_with_skip(world, tmp_path, capsys):
    arguments = [str(tmp_path / "config.yaml"), "--plain"]
    (tmp_path / "reward.py").write_text(
        "steps = 0\ndef late(completions):\n    global steps\n    steps += 1\n"
        "    return [float('nan') if steps == 2 else 1.0 for _ in completions]\n"
    )
    late = {"name": "late", "function": f"{tmp_path / 'reward.py'}:late"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config(world, tmp_path / "run", rewards=[late]))))
    assert main(["train", *arguments]) == 1
    out, error = capsys.readouterr()
    assert "saved a checkpoint of step 1" in out
    assert error.count("\n") == 1
    assert error.startswith("fastppo: step 2, reward: reward 'late' gave nan for completion 0, ")
    assert error.endswith("this step would be skipped; newest checkpoint: step 1, for --resume\n")
    (tmp_path / "reward.py").write_text("def late(completions):\n    return [float('nan') for _ in completions]\n")
    assert main(["train", *arguments, "--resume", "--on_nonfinite", "skip"]) == 0
    out, error = capsys.readouterr()
    assert "expected a finite number (reward.py, line 1), prompt 'The number" in out
    assert error == ""
    assert [row.get("policy/skipped_steps") for row in metrics_of(tmp_path / "run")] == [None, 1.0]


def test_a_skipped_evaluation_raises_alarms_that_act_and_leaves_no_samples(world, tmp_path):
    rules = [{"metric": "eval/skipped", "above": 0.0, "action": "rollback", "patience": 2}]
    changes = {"data__eval_size": 2, "eval__every": 1, "watch__rules": rules, "watch__max_rollbacks": 1}
    trainer = make_trainer(config(world, tmp_path / "run", total_steps=4, on_nonfinite="skip", **changes))
    evaluate = trainer.scorer.evaluate

    def spoiled(*arguments):
        if trainer.step:
            raise NonFiniteError("evaluation: spoiled")
        return evaluate(*arguments)

    trainer.scorer.evaluate = spoiled
    assert trainer.train().stopped == "eval/skipped 1 is above 0, 2 times in a row"
    outcomes = ["rolled back to step 0, with other random", "run stopped after 1 rollbacks"]
    for alarm, outcome in zip(trainer.watch.alarms, outcomes, strict=True):
        assert alarm.outcome.startswith(outcome)
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["before.jsonl"]


def test_a_skipped_step_that_cannot_be_logged_is_made_again_with_its_learning_rate(world, tmp_path, monkeypatch):
    changes = {"on_nonfinite": "skip", "optim__lr_scheduler_type": "linear", "total_steps": 3, "checkpoint__every": 10}

    def run(name, resume=False):
        trainer = make_trainer(config(world, tmp_path / name, **changes), resume=resume)
        trainer.given["nan"] = lambda i: math.nan if trainer.step == 1 else 1.0
        trainer.train()

    def full(self, step, metrics):
        if step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        log(self, step, metrics)

    run("whole")
    log = MetricsLogger.log
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "log", full)
        with pytest.raises(OSError, match="No space"):
            run("failed")
    run("failed", resume=True)
    assert metrics_of(tmp_path / "failed") == metrics_of(tmp_path / "whole")


def test_an_evaluation_is_skipped_or_stops_the_run(world, tmp_path):
    changes = {"data__eval_size": 2, "rewards": [{"name": "nan", "function": f"{world / 'reward.py'}:nan"}]}
    with pytest.raises(NonFiniteError, match=r"^after step 0, evaluation: reward 'nan' gave nan .*, this evaluation "):
        Trainer(config(world, tmp_path / "stop", **changes)).train()
    Trainer(config(world, tmp_path / "skip", **changes, on_nonfinite="skip", total_steps=1)).train()
    rows = metrics_of(tmp_path / "skip")
    assert [(row["step"], row.get("eval/skipped"), row.get("eval/reward", 0.0)) for row in rows] == [
        (0, 1.0, None),
        (1, None, 0.0),
        (1, 1.0, None),
    ]


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_parameters_that_are_not_finite_are_never_saved(world, tmp_path, on_nonfinite):
    """Not even by the step that made them so, whose loss and gradient were finite."""
    decay = {"optim__learning_rate": 3e38, "optim__weight_decay": 1e4}  # each parameter times 1 - 3e42
    trainer = make_trainer(config(world, tmp_path / "run", on_nonfinite=on_nonfinite, **decay))
    trainer.config.total_steps = 1
    with pytest.raises(NonFiniteError, match=r"^after step 1: the parameter .* is not finite, so nothing was saved"):
        trainer.train()
    assert not (tmp_path / "run" / "final").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_the_coefficient_of_the_kl_may_overflow_after_an_update(world, tmp_path, monkeypatch):
    trainer = make_trainer(config(world, tmp_path / "run", on_nonfinite="skip"))
    told, controller = [], trainer.algorithm.kl_controller
    trainer.learner._warn = told.append
    controller.horizon = 1

    def update(learner, experience):
        controller.value, experience.kl = 1.7e308, experience.kl + 1e38
        return {}

    monkeypatch.setattr(trainer.algorithm, "update", update)
    metrics = trainer.train_step()
    assert metrics["kl/reference"] > 1e38
    assert told == ["step 1, kl_coef: inf after 1.7e+308, at a KL of 3e+38; this update of kl_coef is skipped"]
    assert controller.value == 1.7e308
