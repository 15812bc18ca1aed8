"""Runs whose activations and idle models are in the host's memory: when they move, and that results stay the same bits.

There is no GPU here: copies stand in for it, so that what was not moved, or not moved back, has other values.
"""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_changed_config, make_tiny_model, metrics_of, same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo.models import activations, parked
from fastppo.training.silent import Silent
from fastppo.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(f"The number {i} is" for i in range(24)))
    (folder / "texts.txt").write_text("The weather was bad.\nMy new neighbor is quiet.\n")
    (folder / "rewards.py").write_text(
        "def variety(completions):\n    return [len(set(text)) / max(len(text), 1) for text in completions]\n"
    )
    return folder


@pytest.fixture
def device(monkeypatch):
    """Copies where there would be moves; returns the events of moves."""
    events = []
    monkeypatch.setattr(parked, "_copy", lambda tensor, device: tensor.clone())
    monkeypatch.setattr(activations, "_to_host", lambda tensor: events.append("activation") or tensor.detach().clone())
    return events


def config(world, out, **changes):
    tree = {
        "output_dir": str(out),
        "total_steps": 5,
        "report_to": "none",
        "model": {"name_or_path": str(world / "model"), "value_model": "separate"},
        "data": {"train": str(world / "prompts.txt"), "eval_size": 4},
        "rewards": [{"name": "variety", "function": f"{world / 'rewards.py'}:variety"}],
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_new_tokens": 8},
        changes.get("algorithm", "ppo"): {"num_mini_batches": 2},
        "optim": {"learning_rate": 1e-3},
        "checkpoint": {"every": 2},
    }
    return build_changed_config(tree, changes)


def files_of(out):
    """The tensors of a run's files and checkpoints, by file."""
    return {path.relative_to(out): load_file(path) for path in sorted(out.rglob("*.safetensors"))}


LORA = {"r": 4}
ROLLBACK = {"watch__rules": [{"metric": "lr", "above": 6e-4, "patience": 3, "action": "rollback"}]}
MOVES = {"model__offload_idle": True, "model__activation_offloading": True}
VARIANTS = {
    "refreshed reference, rollback": ({"ppo__reference_refresh_steps": 2, **ROLLBACK}, MOVES),
    "exact kl, mini-batches, bfloat16": (
        {
            "ppo__kl_in": "loss", "ppo__kl_estimator": "exact", "ppo__kl_coef": 0.1, "ppo__num_ppo_epochs": 2,
            "model__autocast": "bfloat16", "ppo__gradient_accumulation_steps": 2,
        },
        MOVES,
    ),
    "checkpointing, perplexity, shared critic": (
        {"model__gradient_checkpointing": True, "model__value_model": "shared", "eval__perplexity": "TEXTS"}, MOVES
    ),
    "lora, separate critic, checkpointing, 8-bit, rollback": (
        {"model__lora": LORA, "model__gradient_checkpointing": True, "optim__name": "adamw_8bit", **ROLLBACK},
        {**MOVES, "optim__name": "paged_adamw_8bit"},
    ),
    "4 bits, critic of adapters, checkpointing": (
        {
            "model__lora": LORA, "model__quantization": "nf4", "model__value_model": "adapter",
            "model__gradient_checkpointing": True, "optim__name": "adamw_8bit",
        },
        {"model__activation_offloading": True, "optim__name": "paged_adamw_8bit"},
    ),
    "cpi with a separate critic": ({"algorithm": "cpi", "cpi__step_size": "bound", "total_steps": 2}, MOVES),
    "trpo with a separate critic": ({"algorithm": "trpo", "trpo__cg_iterations": 2, "total_steps": 2}, MOVES),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_results_are_the_same_bits(world, tmp_path, device, name):
    changes, moves = VARIANTS[name]
    changes = {key: str(world / "texts.txt") if value == "TEXTS" else value for key, value in changes.items()}
    if "quantization" in str(changes) or changes.get("optim__name") == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    Trainer(config(world, tmp_path / "plain", **changes)).train()
    assert not device
    given = changes | moves
    steps = given.pop("total_steps", 5)
    Trainer(config(world, tmp_path / "moved", total_steps=steps - 1, **given)).train()  # and resumed
    Trainer(config(world, tmp_path / "moved", total_steps=steps, **given), resume=True).train()
    assert device
    plain, moved = (files_of(tmp_path / run) for run in ("plain", "moved"))
    assert plain.keys() <= moved.keys()
    assert [str(path) for path in plain if not same(plain[path], moved[path])] == []
    rows = {row["step"]: row for row in metrics_of(tmp_path / "moved") if "lr" in row}
    assert [row for row in metrics_of(tmp_path / "plain") if "lr" in row] == list(rows.values())


@pytest.mark.parametrize("exact", [False, True])
def test_idle_models_are_parked_and_those_in_use_are_not(world, tmp_path, monkeypatch, exact):
    """In a step with two optimizer steps of two micro-batches each, and around it."""
    kl = {"ppo__kl_in": "loss", "ppo__kl_estimator": "exact", "ppo__kl_coef": 0.1} if exact else {}
    monkeypatch.setattr(parked, "_copy", lambda tensor, device: tensor.clone())
    passes = {"ppo__gradient_accumulation_steps": 2}
    settings = config(world, tmp_path / "run", model__offload_idle=True, ppo__num_ppo_epochs=1, **passes, **kl)
    trainer = Trainer(settings, progress=Silent())
    models, events = trainer.models, []
    critic, reference = models._parked["value"], models._parked["reference"]

    def say(what):
        where = [name for name, at in (("critic", critic), ("reference", reference)) if at._fetched]
        if events[-1:] != [(what, where)]:
            events.append((what, where))

    for name, model in (("policy", models.policy), ("critic", models.value), ("reference", models._reference)):
        inner = model.backbone if name == "critic" else model.base_model
        inner.register_forward_pre_hook(lambda *_, name=name: say(name + " trained" * torch.is_grad_enabled()))
    for parameter in models.value_parameters().values():
        parameter.register_hook(lambda gradient: say("critic backward"))
    step = trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda: (say("step"), step()))
    assert not critic._fetched
    assert not reference._fetched
    trainer.train_step()
    update = [("policy trained", []), ("critic trained", ["critic"]), ("critic backward", ["critic"])]
    update += [("critic trained", ["critic"]), ("critic backward", ["critic"]), ("step", ["critic"])]
    assert events[0] == ("policy", [])  # sampling
    both = ["critic", "reference"]
    scoring, updates = events[1 : -len(update) * 2], events[-len(update) * 2 :]
    assert scoring[:2] == [("critic", ["critic"]), ("reference", both)]  # of the first part; then there are others
    assert dict(scoring[2:]) == {"policy": both, "critic": both, "reference": both}
    assert updates == update * 2
    assert not critic._fetched
    assert not reference._fetched
    assert all(p.data_ptr() == host.data_ptr() for p, host in zip(critic._parameters, critic._hosts, strict=True))


def test_a_parked_critic_is_tried_for_packing_where_it_computes(world, tmp_path, monkeypatch):
    trainer = Trainer(config(world, tmp_path / "run", model__offload_idle=True), progress=Silent())
    critic, tried = trainer.models._parked["value"], []
    monkeypatch.setattr("fastppo.models.policy_models.can_pack", lambda _: tried.append(critic._fetched) or True)
    assert trainer.models.packs
    assert tried == [True, True]


class LiveMemory(TorchDispatchMode):
    """Follows the bytes of tensors that are made inside; `peak` is the most that were there at a time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def _free(self, num_bytes):
        self.now -= num_bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        storages = [
            {t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)}
            for tree in ((args, kwargs), output)
        ]
        for address in storages[1].keys() - storages[0].keys():  # the others are views, and results in place
            storage = storages[1][address]
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return output


CRITICS = {"separate": {}, "adapter": {"model__value_model": "adapter", "model__lora": LORA}}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("critic", CRITICS)
def test_activations_of_one_model_are_there_at_a_time(world, tmp_path, critic, checkpointing):
    options = CRITICS[critic] | {"model__gradient_checkpointing": checkpointing, "rollout__num_generations": 16}
    trainer = Trainer(config(world, tmp_path / "run", ppo__num_mini_batches=1, **options), progress=Silent())
    prompts = [prompt for prompt in trainer.data.train[:4] for _ in range(16)]
    rollout = trainer.scorer.sample(prompts, "rollout")
    experience = trainer.scorer.score(rollout, trainer.scorer.reward(prompts, rollout))
    trainer.models.drop_kept_pass()
    trainer.algorithm.estimate_advantages(experience)
    learner, loss = trainer.learner, trainer.algorithm.loss

    def peak(*passes):
        with LiveMemory() as memory, trainer.models.training():
            learner.accumulate(experience, *passes)
        trainer.optimizer.zero_grad(set_to_none=True)
        return memory.peak

    policy, value = partial(learner.evaluate, loss), partial(learner._evaluate_critic, loss)
    alone = max(peak(policy), peak(value))
    by_turns, together = peak(policy, value), peak(partial(learner.evaluate, loss, with_values=True))
    gradients = sum(p.nbytes for p in trainer.policy_parameters.values())  # which wait for the optimizer meanwhile
    assert alone <= by_turns <= alone + gradients + 1024
    assert by_turns < (0.95 if checkpointing else 0.6) * together
