"""What alarms do to a run: rollback, lower learning rate, stop; also if the run is killed meanwhile."""

from __future__ import annotations

import pytest
from tiny import build_changed_config, make_tiny_model, metrics_of, same, weights_of

from fastppo.training.metrics import read_alarms, read_metrics, read_samples
from fastppo.training.report import write_report
from fastppo.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")


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
        "report_to": "none",
        "model": {"name_or_path": str(world / "model")},
        "data": {"train": str(world / "prompts.txt"), "eval_size": 8},
        "rewards": [{"name": "vowels", "function": f"{__file__}:vowels"}],
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_new_tokens": 8},
        "ppo": {"kl_coef": 0.0},
        "optim": {"learning_rate": 1e-3},
        "checkpoint": {"every": 2, "keep_last": 1},
        "eval": {"num_prompts": 8},
    }
    return build_changed_config(tree, changes)


# A learning rate at which one step ruins the model.
COLLAPSE = {
    "optim__learning_rate": 0.3,
    "watch__lr_factor": 0.003,
    "watch__rules": [{"metric": "kl/reference", "above": 5.0, "patience": 2, "action": "rollback"}],
}


@pytest.fixture(scope="module")
def collapsed(world, tmp_path_factory):
    """A run with COLLAPSE that was not interrupted: its folder and its result."""
    out = tmp_path_factory.mktemp("collapsed") / "run"
    return out, Trainer(config(world, out, **COLLAPSE)).train()


def test_a_run_that_collapses_is_rolled_back_and_finishes(collapsed):
    out, result = collapsed
    assert (result.step, result.stopped) == (8, None)
    assert result.final is not None
    [alarm] = [a for a in read_alarms(out) if a["action"] == "rollback"]
    assert (alarm["step"], alarm["metric"]) == (3, "kl/reference")
    assert "rolled back to step 0, with other random numbers" in alarm["outcome"]
    assert alarm["outcome"] in write_report(out).read_text()
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "lr" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))  # the abandoned steps are elsewhere
    assert all(row["lr"] == pytest.approx(0.3 * 0.003) and row["watch/rollbacks"] == 1 for row in rows)
    assert max(row["kl/reference"] for row in rows) < 5.0
    abandoned = read_metrics(out / "abandoned-1.jsonl")
    assert [row["step"] for row in abandoned] == [1, 2, 3]
    assert abandoned[-1]["kl/reference"] > 5.0
    # Step 1 samples from the same policy and the same prompts as before: what it draws is all that differs.
    assert rows[0]["reward/mean"] != abandoned[0]["reward/mean"]


class Killed(BaseException):
    """Like SIGKILL, not caught by anything in a run."""


@pytest.mark.parametrize("moment", ["before", "amid", "after"])
def test_a_run_killed_around_its_rollback_comes_to_the_same_bits(world, collapsed, tmp_path, moment):
    whole, killed = collapsed[0], tmp_path / "killed"

    def kill(*args, **kwargs):
        raise Killed

    trainer = Trainer(config(world, killed, **COLLAPSE))
    if moment == "amid":  # later checkpoints are deleted, and there is none yet that knows of the rollback
        roll_back = trainer._roll_back
        trainer._roll_back = lambda *arguments: (setattr(trainer, "_checkpoint", kill), roll_back(*arguments))
    else:
        step, calls = trainer.train_step, []
        last = 2 if moment == "before" else 3 + 5  # the third is rolled back
        trainer.train_step = lambda: (calls.append(1), kill() if len(calls) > last else step())[1]
    with pytest.raises(Killed):
        trainer.train()
    resumed = Trainer(config(world, killed, **COLLAPSE), resume=True)
    assert resumed.step == {"before": 2, "amid": 0, "after": 4}[moment]
    resumed.train()
    assert same(weights_of(whole), weights_of(killed))
    assert metrics_of(whole) == metrics_of(killed)
    assert read_alarms(whole) == read_alarms(killed)


def rule(**fields):
    return {"watch__defaults": False, "watch__rules": [fields]}


def test_rollbacks_are_bounded(world, tmp_path):
    out = tmp_path / "run"
    changes = rule(metric="completion/length", above=0.0, action="rollback")  # never satisfied
    result = Trainer(config(world, out, watch__max_rollbacks=2, **changes)).train()
    assert (result.step, result.final) == (1, None)
    assert result.stopped.startswith("completion/length")
    outcomes = [alarm["outcome"] for alarm in read_alarms(out)]
    assert [outcome.split(",")[0] for outcome in outcomes] == [
        "rolled back to step 0",
        "rolled back to step 0",
        "run stopped after 2 rollbacks",
    ]
    rates = [read_metrics(out / f"abandoned-{n}.jsonl")[-1]["lr"] for n in (1, 2)]
    assert rates == pytest.approx([1e-3, 0.5e-3])
    assert read_metrics(out / "metrics.jsonl")[-1]["lr"] == pytest.approx(0.25e-3)


def test_a_rule_may_lower_the_learning_rate(world, tmp_path):
    out, scheduled = tmp_path / "run", {"optim__lr_scheduler_type": "linear"}
    changes = rule(metric="completion/length", above=0.0, patience=2, action="lower_lr") | scheduled
    Trainer(config(world, out, total_steps=5, **changes)).train()
    rates = [row["lr"] for row in read_metrics(out / "metrics.jsonl") if "lr" in row]
    assert rates == pytest.approx([1e-3 * (6 - k) / 6 * 0.5 ** ((k - 1) // 2) for k in range(1, 6)])


def test_a_rule_may_stop_the_run_and_a_resume_goes_on(world, tmp_path, capsys):
    out = tmp_path / "run"
    changes = rule(metric="completion/length", above=0.0, patience=3, action="stop")
    result = Trainer(config(world, out, total_steps=5, **changes)).train()
    assert (result.step, result.final, result.interrupted_by) == (3, None, None)
    assert "step 3: completion/length" in capsys.readouterr().out
    assert read_alarms(out)[-1]["outcome"] == "run stopped"
    resumed = Trainer(config(world, out, total_steps=5, **changes), resume=True)
    assert resumed.step == 3
    assert resumed.train().step == 5


def test_a_rule_for_an_unknown_metric_is_reported(world, tmp_path, capsys):
    changes = rule(metric="policy/entropie", below=0.1)
    Trainer(config(world, tmp_path / "run", total_steps=1, **changes)).train()
    assert "watch: there is no metric policy/entropie so far" in capsys.readouterr().out


def test_a_healthy_run_raises_no_alarm(world, tmp_path):
    Trainer(config(world, tmp_path / "run", eval__perplexity=str(world / "texts.txt"))).train()
    assert read_alarms(tmp_path / "run") == []


def one_letter(completions, **_):
    return [text.count("e") / 8 for text in completions]


def test_a_held_out_reward_and_the_perplexity_reveal_reward_hacking(world, tmp_path):
    out = tmp_path / "run"
    gamed = {
        "total_steps": 25,
        "rewards": [{"name": "e", "function": f"{__file__}:one_letter"}],
        "eval__rewards": [{"name": "variety", "function": f"{world / 'rewards.py'}:variety"}],
        "eval__perplexity": str(world / "texts.txt"),
        "eval__every": 5,
        "optim__learning_rate": 1e-2,
        "rollout__num_prompts": 16,
    }
    Trainer(config(world, out, **gamed)).train()
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "eval/reward" in row]
    first, last = rows[0], rows[-1]
    assert last["eval/reward"] > first["eval/reward"] + 0.2
    assert last["eval/variety"] < first["eval/variety"] - 0.2
    assert last["eval/perplexity"] > 1.5 * first["eval/perplexity"]
    assert first["eval/perplexity"] == pytest.approx(first["eval/perplexity_reference"], rel=1e-4)
    assert last["eval/perplexity_reference"] == first["eval/perplexity_reference"]
    alarmed = {alarm["metric"] for alarm in read_alarms(out)}
    assert {"eval/variety_effect", "eval/perplexity"} <= alarmed
    assert set(read_samples(out, "after")[0]["rewards"]) == {"e", "variety"}
