"""Rollouts of whole runs: the same completions after a resume, and a sampler that is behind the policy is noticed."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny import build_changed_config, make_tiny_model, metrics_of

from fastppo.rollout.engine import EngineError
from fastppo.rollout.loop import LoopEngine
from fastppo.training.metrics import read_alarms
from fastppo.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")

EOS = [2, 40]


def vowels(prompts, completions, **_):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    path = make_tiny_model(folder / "model", hidden_size=8, layers=1) / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": EOS}))
    (folder / "prompts.txt").write_text("\n".join(f"The number {i} is" for i in range(12)))
    return folder


def config(world, out, **changes):
    tree = {
        "output_dir": str(out),
        "total_steps": 4,
        "report_to": "none",
        "model": {"name_or_path": str(world / "model")},
        "data": {"train": str(world / "prompts.txt"), "eval_size": 2},
        "rewards": [{"name": "vowels", "function": f"{__file__}:vowels"}],
        "rollout": {"num_prompts": 4, "num_generations": 4, "max_new_tokens": 8, "engine": "loop"},
        "ppo": {"num_ppo_epochs": 1},
        "optim": {"learning_rate": 3e-2},
        "checkpoint": {"every": 1},
    }
    return build_changed_config(tree, changes)


class Killed(BaseException):
    """Like SIGKILL: nothing is saved."""


def rollouts_of(trainer, kill_in=None):
    """Train, and return what was sampled, by the name of each rollout."""
    taken, sample = {}, trainer.scorer.sample

    def record(prompts, name, progress):
        told = []
        taken[name] = sample(prompts, name, lambda ended: told.append(ended) or progress(ended))
        assert told == sorted(told)
        assert told[-1] == len(prompts)
        if name == kill_in:
            raise Killed
        return taken[name]

    trainer.scorer.sample = record
    try:
        trainer.train()
    except Killed:
        del taken[kill_in]
    return taken


def test_a_killed_and_resumed_run_samples_the_completions_of_an_unbroken_one(world, tmp_path):
    """Which end by several EOS tokens and by stop strings."""
    stop = {"rollout__stop": ["e", "a"], "ppo__missing_eos_penalty": 0.5}
    whole_run = Trainer(config(world, tmp_path / "whole", **stop))
    whole = rollouts_of(whole_run)
    killed = rollouts_of(Trainer(config(world, tmp_path / "killed", **stop)), kill_in="rollback 0/step 3")
    assert list(killed) == ["evaluation", "rollback 0/step 1", "rollback 0/step 2"]
    resumed = Trainer(config(world, tmp_path / "killed", **stop), resume=True)
    assert resumed.step == 2
    again = rollouts_of(resumed)
    assert list(again) == ["rollback 0/step 3", "rollback 0/step 4", "evaluation"]
    ends = set()
    for name, rollout in (killed | again).items():
        for field, values in rollout._asdict().items():
            expected = getattr(whole[name], field)
            assert values == expected if isinstance(values, list) else torch.equal(values, expected), (name, field)
        for ids, mask, ended in zip(rollout.sequences, rollout.mask, rollout.ended, strict=True):
            tokens = ids[-len(mask) :][mask].tolist()
            last, text = tokens[-1], whole_run.tokenizer.decode(tokens)
            stopped = "e" in text or "a" in text
            assert ended == (stopped or last in EOS)
            ends.add(last if last in EOS else "string" if stopped else "length")
    assert ends == {*EOS, "string", "length"}
    assert len({str(rollout.sequences.tolist()) for rollout in whole.values()}) == 5
    rows = [row for row in metrics_of(tmp_path / "whole") if "completion/ended" in row]
    for step, row in enumerate(rows, 1):
        assert row["completion/ended"] == whole[f"rollback 0/step {step}"].ended.float().mean().item()


class BehindThePolicy(LoopEngine):
    """Has weights of its own, which only the first `sync` brings up to date."""

    def sync(self, policy):
        if not hasattr(self, "policy"):
            super().sync(copy.deepcopy(policy))


@pytest.mark.parametrize("behind", [False, True])
def test_a_sampler_that_is_behind_the_policy_shows_in_the_gap_and_raises_an_alarm(world, tmp_path, behind):
    trainer = Trainer(config(world, tmp_path / "run", total_steps=6, eval__num_prompts=1))
    if behind:
        trainer.scorer.engine = BehindThePolicy()
    trainer.train()
    rows = [row for row in metrics_of(tmp_path / "run") if "rollout/logprob_gap_mean" in row]
    gaps = [max(-row["rollout/logprob_gap_min"], row["rollout/logprob_gap_max"]) for row in rows]
    alarms = [alarm["metric"] for alarm in read_alarms(tmp_path / "run")]
    assert gaps[0] < 1e-4  # before any update
    assert all(gap > 0.3 if behind else gap < 1e-4 for gap in gaps[1:]), gaps
    assert ("rollout/logprob_gap_mean" in alarms) == behind, [row["rollout/logprob_gap_mean"] for row in rows]


def test_a_run_whose_engine_fails_keeps_its_completed_steps_and_goes_on(world, tmp_path):
    rollouts_of(Trainer(config(world, tmp_path / "whole")))
    trainer = Trainer(config(world, tmp_path / "run", checkpoint__every=10))
    sample, calls = trainer.scorer.engine.sample, []

    def fail(*arguments):
        calls.append(trainer.step)
        if trainer.step == 2:
            raise EngineError("the engine is out of memory; lower it")
        return sample(*arguments)

    trainer.scorer.engine.sample = fail
    with pytest.raises(EngineError, match="the engine is out of memory"):
        trainer.train()
    assert calls == [0, 0, 1, 2]  # an evaluation and three steps
    resumed = Trainer(config(world, tmp_path / "run", checkpoint__every=10), resume=True)
    assert resumed.step == 2
    resumed.train()
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
