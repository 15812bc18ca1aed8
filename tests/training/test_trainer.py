"""Whole runs on a tiny model: their files, how they end, and that a resumed run gives the same bits."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import start_ranks
from rich.console import Console
from safetensors.torch import load_file
from tiny import build_changed_config, make_tiny_model, metrics_of, same, weights_of

from fastppo.algorithms.learner import NonFiniteError
from fastppo.cli import main
from fastppo.models import ValueHead, ValueModel
from fastppo.training.checkpoint import CheckpointError, find_checkpoint
from fastppo.training.config import ConfigError
from fastppo.training.data import DataError
from fastppo.training.progress import ProgressDisplay
from fastppo.training.report import write_report
from fastppo.training.rewards import RewardError, RewardOutput
from fastppo.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("no_report")


def vowels(prompts, completions, **_):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


REWARDS = """
import itertools, os, time
from pathlib import Path

calls = itertools.count(1)


def vowels(prompts, completions, **_):
    if "HOLD" in os.environ:  # <folder>:<n>: call n says that it was reached, call n + 1 waits to be let go
        folder, at = os.environ["HOLD"].rsplit(":", 1)
        call = next(calls)
        if call == int(at):
            Path(folder, "reached").touch()
        while call > int(at) and not Path(folder, "release").exists():
            time.sleep(0.01)
    return [sum(c in "aeiou" for c in t) / max(len(t), 1) for t in completions]


def early(completion_ids):
    return [[1.0 / (1 + i + t % 7) for i, t in enumerate(ids)] for ids in completion_ids]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, prompts and a reward file, shared by the runs."""
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model")
    rows = [json.dumps({"prompt": f"The number {i} is {'very ' * (i % 3)}"}) for i in range(40)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "reward.py").write_text(REWARDS)
    return folder


def config(world, out, **changes):
    tree = {
        "output_dir": str(out),
        "total_steps": 4,
        "report_to": "none",
        "model": {"name_or_path": str(world / "model")},
        "data": {"train": str(world / "prompts.jsonl"), "eval_size": 8},
        "rewards": [{"name": "vowels", "function": f"{world / 'reward.py'}:vowels"}],
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_new_tokens": 8},
        changes.get("algorithm", "ppo"): {"num_mini_batches": 2},
        "optim": {"learning_rate": 1e-3},
        "checkpoint": {"every": 2},
    }
    if "rewards" in changes:
        path = str(world / "reward.py")
        changes["rewards"] = [r | {"function": r["function"].replace("WORLD", path)} for r in changes["rewards"]]
    return build_changed_config(tree, changes)


def fixed_rewards(count):
    values = torch.linspace(-1, 1, count)
    return RewardOutput(values, values[:, None], {"vowels": 1.0}, {"vowels": values})


def test_a_run_leaves_everything_behind(world, tmp_path, monkeypatch):
    monkeypatch.setattr("fastppo.training.trainer.write_report", write_report)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import AutoModelForCausalLM, AutoTokenizer

    screen = io.StringIO()
    rule = {"metric": "kl/reference", "above": -1e9}  # always broken
    settings = config(world, tmp_path / "run", report_to="tensorboard", watch={"rules": [rule]})
    trainer = Trainer(settings, progress=ProgressDisplay(4, console=Console(file=screen, width=400)))
    result, out = trainer.train(), tmp_path / "run"
    held_out = f"{metrics_of(out)[0]['eval/reward']:.4g}"
    line = next(line for line in screen.getvalue().splitlines() if line.startswith("step=3/4"))
    assert f" held_out={held_out} " in line
    assert " alarms=1 " in line
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == [1, 2, 3, 4]
    assert [event.step for event in events.Tensors("samples/text_summary")] == [0, 4]
    assert result.step == 4
    assert result.interrupted_by is None
    names = {p.relative_to(out).as_posix() for p in out.rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "report.html", "samples/before.jsonl", "samples/after.jsonl"} <= names
    assert {"checkpoints/step-000002/manifest.json", "checkpoints/step-000004/manifest.json"} <= names
    assert any(n.startswith("tensorboard/events") for n in names)
    assert any(n.startswith("plots/") for n in names)
    assert not [n for n in names if n.rsplit("/")[-1].startswith(".")]
    rows = metrics_of(out)
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4, 4]
    assert rows[1]["kl/reference"] == 0.0  # the policy still is the reference
    assert rows[1]["policy/ratio_mean"] == pytest.approx(1.0, abs=0.1)
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # still tied
    assert AutoTokenizer.from_pretrained(out / "final").eos_token == "<|im_end|>"
    assert torch.equal(model.get_input_embeddings().weight, weights_of(out)["model.embed_tokens.weight"])
    assert [path.name for path in (out / "final").rglob("*.safetensors")] == ["model.safetensors"]
    head = ValueHead.from_pretrained(out / "final-value")
    assert same(dict(head.named_parameters()), trainer.models.value_parameters())


def test_a_separate_value_model_is_saved_beside_the_policy(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "run", model__value_model="separate"))
    for folder in (tmp_path / "final", tmp_path / "final"):  # the second time in the place of the first
        assert trainer.save_policy(folder) == folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "final-value", "run"]
    assert [path.name for path in (tmp_path / "final").rglob("*.safetensors")] == ["model.safetensors"]
    value = ValueModel.from_pretrained(tmp_path / "final-value")
    assert same(dict(value.named_parameters()), trainer.models.value_parameters())


def test_a_pad_token_without_an_embedding_changes_nothing(world, tmp_path):
    """In training and evaluation: of policy, reference, critic and perplexity."""
    from transformers import AutoTokenizer

    from fastppo.training.evaluate import evaluate_policy

    (tmp_path / "texts.txt").write_text("A short text.\nAnother text, which is longer.\n")
    results = []
    for name in ("own", "added"):
        model = tmp_path / name
        shutil.copytree(world / "model", model)
        if name == "added":
            tokenizer = AutoTokenizer.from_pretrained(model)
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
            tokenizer.save_pretrained(model)
        given = config(
            world,
            tmp_path / f"run-{name}",
            total_steps=1,
            model__name_or_path=str(model),
            model__value_model="separate",
            eval__perplexity=str(tmp_path / "texts.txt"),
        )
        Trainer(given).train()
        run = tmp_path / f"run-{name}"
        results.append((metrics_of(run), weights_of(run), evaluate_policy(given)))
    own, added = results
    assert added[0] == own[0]
    assert same(added[1], own[1])
    assert added[2] == own[2]


def test_a_missing_tracker_is_told_before_the_model_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("fastppo.training.trainer.PolicyModels", pytest.fail)
    with pytest.raises(ConfigError, match=r"^report_to: tensorboard needs the package tensorboard .*\[train\]"):
        Trainer(config(world, tmp_path / "run", report_to="tensorboard"))


def test_the_reward_rises(world, tmp_path):
    Trainer(
        config(
            world,
            tmp_path / "run",
            total_steps=30,
            ppo__kl_coef=0.0,
            optim__learning_rate=3e-3,
            rollout__num_prompts=16,
        )
    ).train()
    rows = metrics_of(tmp_path / "run")
    assert rows[-1]["eval/reward"] > rows[0]["eval/reward"] + 0.1
    assert rows[-1]["eval/kl"] > 0.1


TWO_REWARDS = [
    {"name": "vowels", "function": "WORLD:vowels"},
    {"name": "early", "function": "WORLD:early", "weight": 0.5},  # by token
]
CONSTRAINED = [
    {"name": "vowels", "function": "WORLD:vowels"},
    {"name": "early", "function": "WORLD:early", "threshold": 0.9, "multiplier_learning_rate": 0.5},
]
VARIANTS = {
    "plain": {},
    "adaptive": {"ppo__kl_controller": "adaptive", "ppo__kl_target": 0.01, "ppo__kl_horizon": 16},
    "kl k3 in the loss": {"ppo__kl_in": "loss", "ppo__kl_estimator": "k3", "ppo__kl_coef": 0.1},
    "exact kl in the loss": {"ppo__kl_in": "loss", "ppo__kl_estimator": "exact", "ppo__kl_coef": 0.1},
    "exact kl in the reward": {"ppo__kl_estimator": "exact"},
    "no reference": {"model__reference": "none", "ppo__kl_coef": 0.0},
    "separate value model": {"model__value_model": "separate"},
    "lora": {"model__lora": {"r": 4}},
    "lora with exact kl": {"model__lora": {"r": 4}, "ppo__kl_in": "loss", "ppo__kl_estimator": "exact"},
    "8-bit optimizer": {"optim__name": "adamw_8bit"},
    "autocast": {"model__autocast": "bfloat16"},
    "bfloat16": {"model__dtype": "bfloat16"},
    "gradient checkpointing": {"model__gradient_checkpointing": True},
    "sequence ratio": {"ppo__ratio_level": "sequence-geometric", "ppo__loss_agg": "seq-mean-token-mean"},
    "dr. grpo norm": {"ppo__loss_agg": "seq-mean-token-sum-norm", "ppo__gradient_accumulation_steps": 2},
    "everything else": {
        "ppo__entropy_coef": 0.01, "ppo__dual_clip": 3.0, "ppo__whiten_rewards": True,
        "ppo__missing_eos_penalty": 0.5, "ppo__cliprange_value": None, "ppo__target_kl": 0.5, "optim__warmup_steps": 1,
        "optim__lr_scheduler_type": "cosine", "optim__value_learning_rate": 1e-2, "optim__weight_decay": 0.1,
    },
    "reference backend": {"backend": "reference"},
    "reinforce": {"algorithm": "reinforce"},
    "reinforce with a critic": {"algorithm": "reinforce", "reinforce__baseline": "learned"},
    "trpo": {"algorithm": "trpo", "trpo__cg_iterations": 3, "trpo__fisher_fraction": 0.5},
    "trpo by differences": {"algorithm": "trpo", "trpo__fisher_method": "finite_difference", "model__lora": {"r": 4}},
    "npg": {"algorithm": "npg", "model__gradient_checkpointing": True},
    "cpi": {"algorithm": "cpi", "cpi__step_size": "bound"},
    "actor-critic": {"algorithm": "actor_critic", "actor_critic__n_steps": 2, "optim__value_learning_rate": 1e-2},
    "grpo": {"ppo__adv_estimator": "grpo", "ppo__kl_in": "loss", "ppo__kl_estimator": "k3"},
    "linear kl, refreshed reference": {
        "ppo__kl_controller": "linear", "ppo__kl_horizon": 24, "ppo__reference_refresh_steps": 3,
    },
    "importance sampling": {
        "rollout__correction": "mask", "rollout__correction_max": 1.5,
        "model__autocast": "bfloat16", "rollout__temperature": 0.8,
    },
    "objectives with values of their own": {
        "rewards": TWO_REWARDS, "ppo__kl_in": "loss", "ppo__multi_objective_aggregation": "normalize_then_sum",
    },
    "constraint": {"rewards": CONSTRAINED},
}  # fmt: skip


QUICK = ["everything else", "lora with exact kl", "bfloat16", "trpo", "cpi", "actor-critic", "importance sampling"]
QUICK += ["linear kl, refreshed reference", "objectives with values of their own", "constraint"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in VARIANTS]
)
def test_resumed_runs_give_the_same_bits(world, tmp_path, name):
    """Stopped after half the steps and resumed, against never stopped; for every kind of run."""
    Trainer(config(world, tmp_path / "a", **VARIANTS[name])).train()
    half = Trainer(config(world, tmp_path / "b", **VARIANTS[name]))
    step = half.train_step

    def stop_after_two():
        half._asked = signal.SIGTERM if half.step == 1 else None
        return step()

    half.train_step = stop_after_two
    assert half.train().interrupted_by == signal.SIGTERM
    resumed = Trainer(config(world, tmp_path / "b", **VARIANTS[name]), resume=True)
    assert resumed.step == 2
    resumed.train()
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    assert same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    start = load_file(world / "model" / "model.safetensors")
    assert not same(start, weights_of(tmp_path / "a"))  # it did train
    assert all(torch.isfinite(w).all() for w in weights_of(tmp_path / "a").values())


@pytest.mark.parametrize("changes", [{"algorithm": "reinforce"}, {"ppo__adv_estimator": "rloo"}])
def test_without_a_critic_there_is_no_value_anywhere(world, tmp_path, changes):
    trainer = Trainer(config(world, tmp_path / "run", model__value_model="separate", **changes))
    assert trainer.models.value is None
    trainer.train()
    assert not [row for row in metrics_of(tmp_path / "run") if any("value" in name for name in row)]
    assert not [path for path in (tmp_path / "run").rglob("*value*") if "plots" not in path.parts]
    groups = {path.stem for path in find_checkpoint(tmp_path / "run" / "checkpoints").path.glob("*.safetensors")}
    assert groups == {"policy", "optimizer", "rng"}


def test_sampling_keeps_its_own_logprobs(world, tmp_path):
    """In float32 they are those of the scoring; so the importance weights are 1."""
    out = tmp_path / "run"
    changes = {"rollout__correction": "truncate", "rollout__temperature": 0.7, "rollout__generation_batch_size": 3}
    trainer = Trainer(config(world, out, **changes))
    rollout = trainer.scorer.sample([p for p in trainer.data.train[:4] for _ in range(2)], "test")
    experience = trainer.scorer.score(rollout, fixed_rewards(8))
    torch.testing.assert_close(experience.rollout_logprobs, experience.old_logprobs, atol=2e-4, rtol=1e-4)
    assert experience.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    trainer.train()
    step = metrics_of(out)[1]
    assert step["rollout/importance_weight"] == pytest.approx(1.0, abs=1e-3)
    assert step["rollout/corrected_fraction"] == 0.0
    gap = [step[f"rollout/logprob_gap_{name}"] for name in ("min", "mean", "max")]
    assert gap == sorted(gap)
    assert max(gap[2], -gap[0]) < 1e-3


def test_the_reference_is_refreshed(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "run", ppo__reference_refresh_steps=2, total_steps=5))
    trainer.train()
    kl = {row["step"]: row["kl/reference"] for row in metrics_of(tmp_path / "run") if "lr" in row}
    assert [kl[step] == 0.0 for step in (1, 2, 3, 4, 5)] == [True, False, True, False, True]
    assert not same(trainer.models.reference_parameters(), trainer.models.policy_parameters())


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_policy_with_other_parameters(world, tmp_path, lora):
    """`Learner.hidden(batch, parameters)`: as if they were loaded, and differentiable in both modes."""
    # SDPA's kernel on a CPU has no forward-mode derivative.
    trainer = Trainer(config(world, tmp_path / "run", model__lora=lora, model__attn_implementation="eager"))
    rollout = trainer.scorer.sample(trainer.data.train[:4], "test")
    batch = trainer.scorer.score(rollout, fixed_rewards(4))
    learner = trainer.learner
    start = {name: p.detach().clone() for name, p in learner.policy_parameters().items()}
    other = {name: value + 0.01 * torch.randn_like(value) for name, value in start.items()}

    tangent = {name: value - start[name] for name, value in other.items()}
    with torch.no_grad():
        _, forward = torch.func.jvp(lambda p: learner.hidden(batch, p)[0], (other,), (tangent,))
    _, pull = torch.func.vjp(lambda p: learner.hidden(batch, p)[0], other)
    cotangent = torch.randn_like(forward)
    backward = sum((pull(cotangent)[0][name] * value).sum() for name, value in tangent.items())
    torch.testing.assert_close((forward * cotangent).sum(), backward, atol=1e-3, rtol=1e-3)

    with torch.no_grad():
        hidden, head = learner.hidden(batch, other)
        before = learner.hidden(batch)
        learner.load_policy(other)
        loaded = learner.hidden(batch)
    assert trainer.learner.changed
    assert not torch.allclose(hidden, before[0])
    torch.testing.assert_close(hidden, loaded[0])
    torch.testing.assert_close(head.weight, loaded[1].weight)  # a tied head follows its embedding


def test_backends_agree(world, tmp_path):
    for backend in ("reference", "chunked"):
        Trainer(config(world, tmp_path / backend, backend=backend, optim__learning_rate=1e-4)).train()
    a, b = weights_of(tmp_path / "reference"), weights_of(tmp_path / "chunked")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)


def test_accumulation_gives_the_gradient_of_the_whole_mini_batch(world, tmp_path):
    for agg in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"):
        gradients = []
        for parts in (1, 4):
            trainer = Trainer(
                config(
                    world, tmp_path / f"{agg}{parts}", ppo__num_mini_batches=1, ppo__loss_agg=agg,
                    ppo__gradient_accumulation_steps=parts, ppo__entropy_coef=0.01,
                )
            )  # fmt: skip
            prompts = [p for p in trainer.data.train[:4] for _ in range(2)]
            rollout = trainer.scorer.sample(prompts, "test")
            experience = trainer.scorer.score(rollout, fixed_rewards(8))
            experience.mask[0, 3:] = False  # ragged
            trainer.algorithm.estimate_advantages(experience)
            evaluate = functools.partial(trainer.learner.evaluate, trainer.algorithm.loss, with_values=True)
            trainer.learner.accumulate(experience, evaluate)
            gradients.append({n: p.grad for n, p in trainer.policy_parameters.items()})
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4, msg=f"{agg} {name}")


def test_the_scoring_pass_is_the_first_updates_own(world, tmp_path, monkeypatch):
    """With one micro-batch a step, the update reuses the scoring pass and its gradients equal those of a new pass."""
    passes, gradients = {}, {}
    for name in ("kept", "new"):
        settings = config(world, tmp_path / name, ppo__num_ppo_epochs=2, ppo__num_mini_batches=1)
        trainer = Trainer(settings, progress=ProgressDisplay(4))
        trainer.models.value.weight.data.fill_(0.1)  # not zero, so that the backbone's gradient depends on it
        if name == "new":
            monkeypatch.setattr(trainer.models, "hidden_before_update", trainer.models.hidden)
        counted, steps = [], []
        trainer.models.policy.model.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        step = trainer.optimizer.step
        parameters = trainer.learner.parameters()

        def keep_gradients(steps=steps, parameters=parameters, step=step):
            steps.append({name: parameter.grad.clone() for name, parameter in parameters.items()})
            step()

        trainer.optimizer.step = keep_gradients
        prompts = [trainer.data.train[i] for i in (0, 1, 2, 0) for _ in range(2)]
        rollout = trainer.scorer.sample(prompts, "test")
        counted.clear()
        experience = trainer.scorer.score(rollout, trainer.scorer.reward(prompts, rollout))
        trainer.algorithm.estimate_advantages(experience)
        trainer.algorithm.update(trainer.learner, experience)
        passes[name], gradients[name] = len(counted), steps
    assert passes == {"kept": 2, "new": 3}
    kept, new = (steps[0] for steps in gradients.values())
    for name, gradient in kept.items():
        scale = new[name].abs().max().item()
        torch.testing.assert_close(gradient, new[name], rtol=0, atol=1e-3 * scale + 1e-7)


def test_accumulated_metrics_are_means_over_tokens(world, tmp_path):
    for agg in ("seq-mean-token-sum-norm", "seq-mean-token-mean"):
        seen = []
        for parts in (1, 4):
            trainer = Trainer(
                config(
                    world, tmp_path / f"{agg}{parts}", ppo__num_mini_batches=1, ppo__loss_agg=agg,
                    ppo__gradient_accumulation_steps=parts, rollout__max_new_tokens=40,
                )
            )  # fmt: skip
            rollout = trainer.scorer.sample([p for p in trainer.data.train[:4] for _ in range(2)], "test")
            experience = trainer.scorer.score(rollout, fixed_rewards(8))
            for name in ("mask", "old_logprobs", "old_values", "kl", "ref_logprobs"):
                setattr(experience, name, getattr(experience, name)[:, :11])  # shorter than what is allowed
            experience.sequences = experience.sequences[:, : experience.sequences.shape[1] - 29]
            experience.attention_mask = experience.attention_mask[:, : experience.sequences.shape[1]]
            experience.mask[0, 3:] = False
            trainer.algorithm.estimate_advantages(experience)
            evaluate = functools.partial(trainer.learner.evaluate, trainer.algorithm.loss, with_values=True)
            seen.append(trainer.learner.accumulate(experience, evaluate))
        for name in ("policy/entropy", "policy/ratio_mean", "policy/approx_kl", "loss/policy", "loss/value"):
            assert seen[1][name] == pytest.approx(seen[0][name], rel=1e-4, abs=1e-6), (agg, name)
        assert seen[0]["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-3)


def test_a_models_own_sampling_defaults_change_nothing(world, tmp_path):
    """Chat models ship with top-p, penalties and the like, which sampling ignores, as scoring does."""
    trainer = Trainer(config(world, tmp_path / "run"))
    prompts = trainer.data.train[:6]
    expected = trainer.scorer.sample(prompts, "test").sequences
    hostile = trainer.models.policy.generation_config
    hostile.update(top_p=0.1, top_k=1, repetition_penalty=3.0, min_p=0.9, no_repeat_ngram_size=1, num_beams=3)
    hostile.update(suppress_tokens=[1, 2, 3], temperature=0.01, typical_p=0.1, min_length=100)
    assert torch.equal(trainer.scorer.sample(prompts, "test").sequences, expected)
    assert trainer.models.policy.generation_config is hostile  # and it is saved with the model as it came


def test_completions_depend_on_the_seed_and_the_step(world, tmp_path):
    """Whatever a reward function or an evaluation has drawn before, and however many prompts there are."""
    trainer = Trainer(config(world, tmp_path / "run", total_steps=2))
    names, sample = [], trainer.scorer.sample
    trainer.scorer.sample = lambda prompts, name, *rest: (names.append(name), sample(prompts, name, *rest))[1]
    trainer.train()
    assert names == ["evaluation", "rollback 0/step 1", "rollback 0/step 2", "evaluation"]
    prompts = trainer.data.train[:4]
    first = sample(prompts, names[1]).completions
    torch.rand(3)
    assert sample(prompts, names[1]).completions == first
    assert sample(prompts[:3], names[1]).completions == first[:3]
    assert sample(prompts, names[2]).completions != first
    other = Trainer(config(world, tmp_path / "other", seed=1))
    other.models.policy.load_state_dict(trainer.models.policy.state_dict())
    assert other.scorer.sample(prompts, names[1]).completions != first


def test_evaluation_never_changes_a_run(world, tmp_path):
    Trainer(config(world, tmp_path / "a")).train()
    Trainer(config(world, tmp_path / "b", eval__every=1)).train()
    assert same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))
    assert sum("eval/reward" in row for row in metrics_of(tmp_path / "b")) == 5


def test_epochs_stop_early_on_kl(world, tmp_path):
    Trainer(config(world, tmp_path / "run", ppo__target_kl=1e-9, ppo__num_ppo_epochs=3)).train()
    assert all(row["policy/stopped_early"] == 1.0 for row in metrics_of(tmp_path / "run") if "lr" in row)


def test_a_failing_reward_loses_nothing(world, tmp_path):
    calls = []

    def fails_at_fourth(prompts, completions, **_):
        calls.append(1)
        if len(calls) == 4:  # evaluation, then steps 1, 2, 3
            raise RuntimeError("the judge is out")
        return vowels(prompts, completions)

    trainer = Trainer(config(world, tmp_path / "b", checkpoint__every=10), rewards=[fails_at_fourth])
    with pytest.raises(RewardError, match="the judge is out"):
        trainer.train()
    Trainer(config(world, tmp_path / "a"), rewards=[vowels]).train()
    resumed = Trainer(config(world, tmp_path / "b", checkpoint__every=10), rewards=[vowels], resume=True)
    assert resumed.step == 2
    resumed.train()
    assert same(weights_of(tmp_path / "a"), weights_of(tmp_path / "b"))


@pytest.mark.parametrize("returns", [[0.0], ["x"] * 8, [math.nan] * 8, None])
def test_a_wrong_reward_is_named(world, tmp_path, returns):
    kind = NonFiniteError if returns == [math.nan] * 8 else RewardError
    with pytest.raises(kind, match="broken"):
        Trainer(config(world, tmp_path / "run"), rewards=[_named("broken", returns)]).train()


def test_rewards_may_need_columns_also_without_held_out_prompts(world, tmp_path):
    rows = [json.dumps({"prompt": f"The number {i} is", "letter": "aeiou"[i % 5]}) for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    changes = {"data__train": str(tmp_path / "prompts.jsonl"), "total_steps": 1, "data__eval_size": 0}

    def count(completions, letter):
        return [float(text.count(a)) for text, a in zip(completions, letter, strict=True)]

    assert Trainer(config(world, tmp_path / "run", **changes), rewards=[count]).train().step == 1


def _named(name, returns):
    def function(prompts, completions, **_):
        return returns

    function.__name__ = name
    return function


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize(("name", "what"), [("ppo", "gradient"), ("trpo", "not finite"), ("npg", "not finite")])
def test_nonfinite_gradients_never_reach_the_parameters(world, tmp_path, policy, name, what):
    sections = {"ppo": {"num_mini_batches": 1, "num_ppo_epochs": 1} if name == "ppo" else {}, "algorithm": name}
    trainer = Trainer(config(world, tmp_path / "run", **sections, on_nonfinite=policy, total_steps=1))
    before = {n: p.detach().clone() for n, p in trainer.policy_parameters.items()}
    loss = trainer.algorithm.loss
    trainer.algorithm.loss = lambda *a: loss(*a)._replace(loss=loss(*a).loss * float("nan"))
    if policy == "stop":
        with pytest.raises(NonFiniteError, match=f"step 1.*{what}"):
            trainer.train()
    else:
        trainer.train()
        assert metrics_of(tmp_path / "run")[1]["policy/skipped_steps"] == 1
    assert all(torch.equal(before[n], p) for n, p in trainer.policy_parameters.items())


def test_one_of_several_processes_that_cannot_find_the_others_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but RANK is not set; start with torchrun"):
        Trainer(config(tmp_path / "no such folder", tmp_path / "run"), rewards=[vowels])
    assert not (tmp_path / "run").exists()


def test_nonfinite_gradients_are_traced_to_their_parameter(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "run"))
    name = next(n for n in trainer.policy_parameters if "layers.1.mlp.down_proj" in n)
    trainer.policy_parameters[name].register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteError, match=r"first non-finite gradient in .*layers\.1\.mlp\.down_proj"):
        trainer.train()


@pytest.mark.parametrize(("eval_size", "where"), [(0, "step 1, rollout"), (8, "after step 0, evaluation")])
def test_nonfinite_probabilities_are_named(world, tmp_path, eval_size, where):
    trainer = Trainer(config(world, tmp_path / "run", data__eval_size=eval_size))
    with torch.no_grad():
        next(iter(trainer.policy_parameters.values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=f"{where}: the policy's probabilities are not finite"):
        trainer.train()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_reward_that_fails_in_an_evaluation_loses_nothing(world, tmp_path):
    class Judge:
        __name__ = "vowels"
        calls = 0

        def __call__(self, prompts, completions, **_):
            self.calls += 1
            if self.calls == self.fails_at:
                raise RuntimeError("out")
            return vowels(prompts, completions)

    Trainer(config(world, tmp_path / "whole", eval__every=2), rewards=[vowels]).train()
    for fails_at, step, every in ((4, 2, 10), (7, 4, 0)):  # the evaluation of step 2, the last one
        out, judge = tmp_path / f"run{fails_at}", Judge()
        judge.fails_at = fails_at
        with pytest.raises(RewardError):
            Trainer(config(world, out, eval__every=2, checkpoint__every=every), rewards=[judge]).train()
        resumed = Trainer(config(world, out, eval__every=2, checkpoint__every=every), rewards=[vowels], resume=True)
        assert resumed.step == step
        resumed.train()
        assert metrics_of(out) == metrics_of(tmp_path / "whole")
        assert same(weights_of(out), weights_of(tmp_path / "whole"))


def test_resuming_a_finished_run_adds_nothing(world, tmp_path):
    Trainer(config(world, tmp_path / "run")).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    Trainer(config(world, tmp_path / "run"), resume=True).train()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_signal_saves_also_without_periodic_checkpoints(world, tmp_path):
    trainer = Trainer(config(world, tmp_path / "run", checkpoint__every=0))
    step = trainer.train_step
    trainer.train_step = lambda: (setattr(trainer, "_asked", signal.SIGINT), step())[1]
    assert trainer.train().interrupted_by == signal.SIGINT
    assert Trainer(config(world, tmp_path / "run", checkpoint__every=0), resume=True).step == 1


def test_the_learning_rate_that_is_logged_is_the_one_used(world, tmp_path):
    changes = {"optim__lr_scheduler_type": "linear", "optim__warmup_steps": 1, "optim__learning_rate": 1e-3}
    Trainer(config(world, tmp_path / "run", **changes)).train()
    rates = [row["lr"] for row in metrics_of(tmp_path / "run") if "lr" in row]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])  # no step at a rate of 0


def test_a_full_disk_keeps_the_older_checkpoints(world, tmp_path, monkeypatch):
    from fastppo.training import trainer as module

    trainer = Trainer(config(world, tmp_path / "run", checkpoint__every=1))
    save, count = module.save_checkpoint, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) == 3:
            raise CheckpointError("no space left")
        return save(*args, **kwargs)

    monkeypatch.setattr(module, "save_checkpoint", full)
    with pytest.raises(CheckpointError, match="no space left"):
        trainer.train()
    monkeypatch.undo()
    assert Trainer(config(world, tmp_path / "run", checkpoint__every=1), resume=True).step == 2


def test_two_runs_are_never_mixed(world, tmp_path):
    Trainer(config(world, tmp_path / "run")).train()
    with pytest.raises(CheckpointError, match="--resume"):
        Trainer(config(world, tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"ppo\.clip_low was 0\.2, is now 0\.1"):
        Trainer(config(world, tmp_path / "run", ppo__clip_low=0.1), resume=True)
    longer = Trainer(config(world, tmp_path / "run", total_steps=5), resume=True)
    assert longer.step == 4
    assert longer.train().step == 5


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rewards": []}, ConfigError, "rewards: at least one is required"),
        ({"output_dir": "/proc/nowhere"}, ConfigError, "output_dir: '/proc/nowhere' cannot be written to"),
        ({"device": "cuda:7"}, ConfigError, "device: 'cuda:7' cannot be used"),
        ({"backend": "triton"}, ConfigError, "backend"),
        ({"data__train": "/nothing.jsonl"}, DataError, "/nothing.jsonl"),
        ({"data__max_prompt_length": 2}, DataError, "max_prompt_length"),
        ({"rollout__max_new_tokens": 127}, DataError, "max_new_tokens"),
    ],
)
def test_bad_input_is_refused_before_any_work(world, tmp_path, monkeypatch, changes, error, message):
    """Nothing is written; and no model is loaded to find an error that shows without one."""
    if error is ConfigError:
        monkeypatch.setattr("fastppo.training.inputs.load_tokenizer", lambda *_: pytest.fail("a tokenizer was loaded"))
    monkeypatch.setattr(Trainer, "train_step", lambda *_: pytest.fail("a step was run"))
    changes = {"output_dir": str(tmp_path / "run")} | changes
    with pytest.raises(error) as caught:
        Trainer(config(world, changes.pop("output_dir"), **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "run").rglob("*")) == []


def train_until_told(world, out, folder, hold, *extra):
    """`fastppo train`, 12 steps, a checkpoint after each, in a process that has imported the packages.

    Its reward function touches `folder/reached` at call `hold`, and waits at the next for `folder/release`, so that the
    run cannot end, or go on far, before the test has done what it is about.
    """
    import yaml

    from fastppo.training import trainer
    from fastppo.training.config import to_dict

    def without_plots(out):  # which take most of a tiny run's time
        (out / "report.html").touch()
        return out / "report.html"

    trainer.write_report = without_plots
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(to_dict(config(world, out, total_steps=12, checkpoint__every=1))))
    if hold is not None:
        os.environ["HOLD"] = f"{folder}:{hold}"
    with open(folder / "output", "w") as output, contextlib.redirect_stdout(output):
        return main(["train", str(path), *extra])


def start_training(world, out, *extra, hold=None):
    """The process, the pipe for its exit status, and the folder that it tells how far it is in."""
    folder = out.with_name(f"{out.name}-{time.monotonic_ns()}")
    folder.mkdir()
    [(process, report)] = start_ranks(1, train_until_told, world, out, folder, hold, *extra)
    return process, report, folder


def wait_until_reached(process, folder):
    deadline = time.monotonic() + 300
    while not (folder / "reached").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_kill_9_and_resume_give_the_bits_of_a_run_that_was_never_killed(world, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start_training(world, whole)
    extra = []
    for _ in range(3):
        process, _, folder = start_training(world, killed, *extra, hold=3)
        wait_until_reached(process, folder)
        time.sleep(0.3 * random.random())  # while the step is scored, updates the policy and is saved; or in the next
        process.kill()
        process.join(timeout=60)
        assert process.exitcode == -signal.SIGKILL
        extra = ["--resume"]
    for process, report, _ in (start_training(world, killed, "--resume"), undisturbed):
        assert report.poll(300)
        assert report.recv() == (0, None)
        process.join(timeout=60)
    assert same(weights_of(whole), weights_of(killed))
    assert metrics_of(whole) == metrics_of(killed)


@pytest.mark.slow
def test_ctrl_c_finishes_the_step_and_saves_it(world, tmp_path):
    out = tmp_path / "run"
    process, report, folder = start_training(world, out, hold=3)  # an evaluation, step 1, step 2
    wait_until_reached(process, folder)
    os.kill(process.pid, signal.SIGINT)
    (folder / "release").touch()
    assert report.poll(300)
    assert report.recv() == (128 + signal.SIGINT, None)
    process.join(timeout=60)
    assert "stopping after this step" in (folder / "output").read_text()
    assert (out / "report.html").exists()
    step = metrics_of(out)[-1]["step"]
    assert step in (2, 3)
    assert Trainer(config(world, out, total_steps=12, checkpoint__every=1), resume=True).step == step
