"""What happens to one rank alone is decided by all: NaN, errors, signals, refusals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import config, make_world, start
from tiny import make_tiny_model, metrics_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]

LORA = {"r": 4}


def test_two_processes_decide_alike(tmp_path):
    make_tiny_model(tmp_path / "elsewhere" / "model", seed=1)
    (tmp_path / "elsewhere" / "prompts.jsonl").write_text('{"prompt": "Another"}\n' * 40)
    # In one go: most of the time goes into starting processes.
    start(check_all, 2, make_world(tmp_path))


def check_all(world: Path) -> None:
    for check in (
        refused,
        other_files,
        a_nan_reward,
        a_nan_gradient,
        a_failing_reward,
        a_full_disk,
        a_signal,
        an_orphan,
        a_rule,
        a_draw,
    ):
        check(world, world / check.__name__)


def on_rank_1(value: Any, otherwise: Any) -> Any:
    return value if os.environ["RANK"] == "1" else otherwise


def lengths(completions):
    return [float(len(text)) for text in completions]


def vowels(completions):
    return [float(sum(c in "aeiou" for c in text)) for text in completions]


def error_of(function: Callable[[], Any], kind: type[Exception]) -> str:
    """The message of the error that function() raises, which is the same on all ranks."""
    with pytest.raises(kind) as raised:
        function()
    messages = [None, None]
    torch.distributed.all_gather_object(messages, str(raised.value))
    assert messages[0] == messages[1]
    return messages[0]


def equal_everywhere(trainer) -> bool:
    """Whether the ranks' copies of the policy's parameters are the same to the bit."""
    own = torch.cat([p.detach().flatten() for p in trainer.policy_parameters.values()])
    copies = [torch.empty_like(own) for _ in range(2)]
    torch.distributed.all_gather(copies, own)
    return torch.equal(*copies)


def refused(world, out):
    from fastppo.training.config import ConfigError
    from fastppo.training.distributed import sharded
    from fastppo.training.trainer import Trainer

    def message(**changes):
        return error_of(lambda: Trainer(config(world, out, **changes)), ConfigError)

    assert "3 prompts cannot be divided among 2 processes" in message(rollout__num_prompts=3)
    assert "trpo needs all parameters on every rank" in message(algorithm="trpo")
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        assert f"{name} (bitsandbytes) cannot update" in message(optim__name=name)
    sharded_lora = {"model__lora": LORA, "distributed__strategy": "fsdp2"}
    for key, given in (("quantization", "nf4"), ("value_model", "adapter")):
        assert f"model.{key}: {given} is not possible with" in message(**{f"model__{key}": given}, **sharded_lora)
    assert "set distributed.cpu_offload: true" in message(model__offload_idle=True)
    offload = {"distributed__cpu_offload": True, "model__lora": LORA}
    assert "cpu_offload: has no effect" in message(**offload)
    assert "seed: 5 on rank 1, 0 on rank 0" in message(seed=on_rank_1(5, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "causal_of", lambda model: None)  # an architecture that names no layers
        assert "has no decoder layers" in message()
    assert not out.exists()


def other_files(world, out):
    """Under the same names, as on machines that share no folder."""
    from fastppo.training.config import ConfigError
    from fastppo.training.trainer import Trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(on_rank_1(world / "elsewhere", world))
        for changes in ({"distributed__strategy": "replicate"}, {"model__lora": LORA}):
            settings = config(world, out, model__name_or_path="./model", **changes)
            assert "all ranks need the same model" in error_of(lambda settings=settings: Trainer(settings), ConfigError)
        settings = config(world, out, data__train="prompts.jsonl")
        assert "sha256 of the prompts: '" in error_of(lambda: Trainer(settings), ConfigError)
    message = error_of(lambda: Trainer(config(world, out), resume=on_rank_1(True, False)), ConfigError)
    assert message.startswith("resume: True on rank 1, False on rank 0")
    message = error_of(lambda: Trainer(config(world, out), rewards=[on_rank_1(lengths, vowels)]), ConfigError)
    assert message.startswith("rewards: 'lengths' on rank 1, 'vowels' on rank 0")
    assert not out.exists()


def a_nan_reward(world, out):
    from fastppo.algorithms.learner import NonFiniteError
    from fastppo.training.trainer import Trainer

    def reward(completions):
        return [on_rank_1(float("nan"), 1.0) for _ in completions]

    trainer = Trainer(config(world, out / "stop", model__lora=LORA), rewards=[reward])
    message = error_of(trainer.train, NonFiniteError)
    assert "step 1, reward: rank 1: reward 'reward' gave nan for completion 0" in message
    assert "prompt 'The number" in message
    trainer = Trainer(config(world, out / "skip", model__lora=LORA, on_nonfinite="skip"), rewards=[reward])
    assert trainer.train().step == 3
    if trainer.ranks.rank == 0:
        assert [row["policy/skipped_steps"] for row in metrics_of(out / "skip")] == [1, 1, 1]


def a_nan_gradient(world, out):
    from fastppo.algorithms.learner import NonFiniteError
    from fastppo.training.trainer import Trainer

    for name, changes in (("sharded", {}), ("replicas", {"model__lora": LORA})):
        for policy in ("stop", "skip"):
            settings = config(world, out / name / policy, on_nonfinite=policy, **changes, ppo__num_ppo_epochs=1)
            trainer = Trainer(settings, rewards=[lengths])
            loss, before = trainer.algorithm.loss, [p.detach().clone() for p in trainer.policy_parameters.values()]

            def broken(*arguments, loss=loss, trainer=trainer):
                output = loss(*arguments)
                return output._replace(loss=output.loss * on_rank_1(float("nan") if trainer.step == 0 else 1.0, 1.0))

            trainer.algorithm.loss = broken
            if policy == "stop":
                assert "first non-finite gradient in" in error_of(trainer.train, NonFiniteError)
                changed = [not p.equal(b) for p, b in zip(trainer.policy_parameters.values(), before, strict=True)]
                assert not any(changed)
            else:
                assert trainer.train().step == 3
                assert name == "sharded" or equal_everywhere(trainer)
                if trainer.ranks.rank == 0:
                    skips = [row.get("policy/skipped_steps") for row in metrics_of(out / name / "skip")]
                    assert skips == [1, None, None]


def a_failing_reward(world, out):
    from fastppo.training.rewards import RewardError
    from fastppo.training.trainer import Trainer

    def reward(completions):
        if on_rank_1(True, False):
            raise KeyError("no such thing")
        return lengths(completions)

    trainer = Trainer(config(world, out, model__lora=LORA), rewards=[reward])
    assert "reward 'reward' raised KeyError: 'no such thing'" in error_of(trainer.train, RewardError)


def a_full_disk(world, out):
    from fastppo.training import trainer as module

    def log(*arguments):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.MetricsLogger, "log", log)
        trainer = module.Trainer(config(world, out, model__lora=LORA), rewards=[lengths])
        assert "No space left on device" in error_of(trainer.train, OSError)


def a_signal(world, out):
    from fastppo.training.trainer import Trainer

    trainer = Trainer(config(world, out, model__lora=LORA), rewards=[lengths])
    step = trainer.train_step

    def interrupted():
        if trainer.step == 1:
            on_rank_1(lambda: os.kill(os.getpid(), signal.SIGINT), lambda: None)()
        return step()

    trainer.train_step = interrupted
    result = trainer.train()
    assert (result.step, result.interrupted_by, result.final) == (2, signal.SIGINT, None)


def an_orphan(world, out):
    """torchrun has ended: nobody would end the ranks any more."""
    from fastppo.training.trainer import Trainer

    with pytest.MonkeyPatch.context() as patch:

        def reward(completions):
            on_rank_1(lambda: patch.setattr(os, "getppid", lambda: 1), lambda: None)()
            return lengths(completions)

        trainer = Trainer(config(world, out, model__lora=LORA), rewards=[reward])
        result = trainer.train()
    assert (result.step, result.interrupted_by, result.final) == (1, signal.SIGTERM, None)
    assert (out / "checkpoints" / "step-000001").exists()


def a_rule(world, out):
    """Of a metric that differs between ranks: the first one's decides."""
    from fastppo.training.trainer import Trainer

    rule = {"metric": "time/rollout", "above": 1e6, "action": "stop"}
    trainer = Trainer(config(world, out, model__lora=LORA, watch={"rules": [rule]}), rewards=[lengths])
    update = trainer._rollout_and_update
    trainer._rollout_and_update = lambda prompts: update(prompts) | {"time/rollout": on_rank_1(0.0, 1e7)}
    assert trainer.train().step == 1


def a_draw(world, out):
    """A reward function that draws random numbers on one rank alone does not change the order of its rows."""
    from fastppo.training.trainer import Trainer

    def drawing(completions):
        on_rank_1(lambda: torch.rand(3), lambda: None)()
        return lengths(completions)

    ends = []
    for reward in (lengths, drawing):
        settings = config(world, out / reward.__name__, model__lora=LORA, ppo__num_mini_batches=2)
        trainer = Trainer(settings, rewards=[reward])
        assert trainer.train().step == 3
        assert equal_everywhere(trainer)
        ends.append(torch.cat([p.detach().flatten() for p in trainer.policy_parameters.values()]))
    assert torch.equal(*ends)
