"""Whole runs with a base in 4 bits and a critic of adapters: what they save, and that a resumed run gives the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_changed_config, make_tiny_model, metrics_of, same

from fastppo.models import ModelError, ValueHead, load_causal_lm
from fastppo.models.adapters import is_critics, load_adapters
from fastppo.models.config import ModelConfig
from fastppo.training.evaluate import evaluate_policy
from fastppo.training.trainer import Trainer

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]


def vowels(prompts, completions, **_):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(f"The number {i} is{' very' * (i % 3)}" for i in range(12)))
    return folder


def config(world, out, **changes):
    tree = {
        "output_dir": str(out),
        "total_steps": 3,
        "report_to": "none",
        "model": {
            "name_or_path": str(world / "model"),
            "quantization": "nf4",
            "lora": {"r": 3},
            "value_model": "adapter",
            "gradient_checkpointing": True,
        },
        "data": {"train": str(world / "prompts.txt"), "eval_size": 2},
        "rewards": [{"name": "vowels", "function": f"{__file__}:vowels"}],
        "rollout": {"num_prompts": 3, "num_generations": 2, "max_new_tokens": 5},
        "ppo": {"num_mini_batches": 2, "gradient_accumulation_steps": 2},
        "optim": {"learning_rate": 1e-2},
        "checkpoint": {"every": 1},
    }
    return build_changed_config(tree, changes)


def files_of(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.relative_to(out).as_posix(): load_file(path) for path in out.glob("final*/*.safetensors")}


@pytest.fixture(scope="module")
def run(world, no_report, tmp_path_factory):
    """A finished run, its trainer and configuration."""
    out = tmp_path_factory.mktemp("runs") / "run"
    settings = config(world, out)
    trainer = Trainer(settings)
    start = {name: p.detach().clone() for name, p in trainer.learner.parameters().items()}
    trainer.train()
    return out, settings, trainer, start


def test_every_adapter_is_trained(run):
    _, _, trainer, start = run
    trained = trainer.learner.parameters()
    assert sum(".default." in name for name in trained) == sum(map(is_critics, trained))
    assert not [name for name, before in start.items() if torch.equal(before, trained[name])]


def test_a_checkpoint_holds_adapters_and_head_alone(run):
    out, _, trainer, _ = run
    saved = [load_file(out / "checkpoints" / "step-000003" / f"{group}.safetensors") for group in ("policy", "value")]
    assert same(saved[0], trainer.models.policy_parameters())
    assert same(saved[1], trainer.models.value_parameters())


def test_a_resumed_run_gives_the_same_bits(world, run, tmp_path):
    Trainer(config(world, tmp_path / "run", total_steps=1)).train()
    Trainer(config(world, tmp_path / "run"), resume=True).train()
    expected, given = files_of(run[0]), files_of(tmp_path / "run")
    assert expected.keys() == given.keys()
    assert all(same(expected[name], given[name]) for name in expected)
    steps = [[row for row in metrics_of(out) if "reward/mean" in row] for out in (run[0], tmp_path / "run")]
    assert steps[0] == steps[1]


def test_what_is_saved_and_its_evaluation(world, run):
    out, settings, trainer, _ = run
    names = {path.relative_to(out).as_posix() for path in out.glob("final*/*") if path.suffix != ".jinja"}
    assert names == {
        "final/adapter_config.json", "final/adapter_model.safetensors", "final/tokenizer.json",
        "final/tokenizer_config.json", "final-value/adapter_config.json", "final-value/adapter_model.safetensors",
        "final-value/value_head.safetensors",
    }  # fmt: skip
    head = ValueHead.from_pretrained(out / "final-value")
    assert all(torch.equal(p, trainer.models.value_parameters()[name]) for name, p in head.named_parameters())
    base = load_causal_lm(ModelConfig(name_or_path=settings.model.name_or_path, quantization="nf4"))
    policy, ids = load_adapters(base, out / "final"), torch.randint(3, 300, (2, 5))
    with torch.no_grad():
        assert torch.equal(policy(ids).logits, trainer.models.policy(ids).logits)
    metrics, rows = evaluate_policy(settings, str(out / "final"))
    last = metrics_of(out)[-1]
    assert metrics["eval/kl"] > 0.01
    assert metrics == {name: last[name] for name in metrics}
    samples = [json.loads(line) for line in (out / "samples" / "after.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in rows] == [row["completion"] for row in samples]
    with pytest.raises(ModelError, match=r"final-value: holds a critic of adapters \(value_head"):
        evaluate_policy(settings, str(out / "final-value"))
    with pytest.raises(ModelError, match=r"final: the folder holds adapters \(adapter_config\.json\), not a model"):
        Trainer(config(world, out.with_name("again"), model__name_or_path=str(out / "final")))


def test_merged_on_request(world, run, tmp_path):
    out, settings, _, _ = run
    merged = config(world, tmp_path / "run", model__lora__merge=True)
    Trainer(merged).train()
    assert {path.name for path in (tmp_path / "run" / "final").glob("*.safetensors")} == {"model.safetensors"}
    metrics, _ = evaluate_policy(merged, str(tmp_path / "run" / "final"))
    expected, _ = evaluate_policy(settings, str(out / "final"))
    assert metrics == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "trpo", "trpo__fisher_method": "finite_difference", "trpo__cg_iterations": 2},
        {"algorithm": "cpi", "model__autocast": "bfloat16"},
        {"model__value_model": "shared", "model__dtype": "bfloat16"},
        {"model__quantization": None, "ppo__gradient_accumulation_steps": 1},
    ],
    ids=["trpo", "cpi", "shared", "dense"],
)
def test_a_step_of_others(world, tmp_path, changes):
    changes = {"total_steps": 1, "data__eval_size": 0, "checkpoint__every": 0} | changes
    if changes.get("algorithm"):
        changes |= {"ppo": {}}
    trainer = Trainer(config(world, tmp_path / "run", **changes))
    start = {name: p.detach().clone() for name, p in trainer.learner.parameters().items()}
    trainer.train()
    trained = trainer.learner.parameters()
    assert not [name for name, before in start.items() if torch.equal(before, trained[name])]
