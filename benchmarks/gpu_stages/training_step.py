"""A whole PPO step of a model with random weights, by the trainer and written plainly: right, how fast, how large.

The trainer's step is `Trainer.train_step`, as `fastppo train` runs it; the plain one is in `plain_step.py`. A step on
few tokens precedes the measured one of each: kernels are compiled and memory is allocated in it.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from fastppo.training.config import Config, build_config
from fastppo.training.plan.phases import Machine, memory_of
from fastppo.training.silent import Silent
from fastppo.training.trainer import Trainer
from gpu_stages import random_model
from gpu_stages.bench import Bench
from gpu_stages.plain_step import PlainStep

WARM_UP_TOKENS = 4
NOISE = 1e-5  # of a loss that is 0 but for rounding
HELD_MIB = 64  # of a step's models, once they are gone


def run(
    bench: Bench, model: str, sections: dict, *, sequences: int, size: int, prompt: int, new: int, card_gib: float
) -> None:
    """Both steps, with a model of the size of tests/configurations/MODEL.

    Args:
        sections: of the trainer's configuration, besides those of lengths and batches.
        sequences, size: of the step, and of a pass.
        prompt, new: tokens of every prompt, and of every completion.
        card_gib: of the GPU, as `fastppo plan` is told.
    """
    if bench.tiny:
        sequences, size, prompt, new = 8, 4, 12, 6
    tree = random_model.configuration(model, tiny=bench.tiny)
    case = f"{model}, {sequences} completions of {new} tokens, prompts of {prompt}"
    with random_model.scratch_folder(2 * random_model.num_parameters(tree)) as name:
        began = time.monotonic()
        random_model.write_model(Path(name), tree, device=bench.device)
        random_model.write_prompts(Path(name, "prompts.txt"), sequences + 1, prompt)
        bench.row(case, "weights written", "ok", seconds=round(time.monotonic() - began, 1))
        whole = build_config(sections | {
            "output_dir": f"{name}/run", "total_steps": 2, "device": bench.device.type, "report_to": "none",
            "model": sections["model"] | {"name_or_path": name},
            "data": {"train": f"{name}/prompts.txt", "eval_size": 1, "max_prompt_length": prompt},
            "rollout": {"num_prompts": sequences, "num_generations": 1, "max_new_tokens": new},
            "batch": {"max_tokens": size * (prompt + new)},
            "ppo": {"num_ppo_epochs": 2},
        })  # fmt: skip
        reward = early_tokens(tree["vocab_size"])
        planned = planned_gib(whole, card_gib)
        bench.attempt(case, f"fastppo, {size} sequences a pass", lambda: trainer_step(bench, whole, reward, planned))
        gc.collect()
        bench.attempt(
            case, f"plain, {size} sequences a pass if they fit", lambda: plain_step(bench, whole, reward, size)
        )


def early_tokens(vocab: int) -> Callable:
    """A reward that every model can raise: the share of tokens in the first half of the vocabulary."""

    def share(completion_ids):
        return [sum(token < vocab // 2 for token in row) / len(row) for row in completion_ids]

    return share


def planned_gib(config: Config, card_gib: float) -> dict[str, float]:
    """What `fastppo plan` expects PyTorch to allocate in each phase."""
    phases = memory_of(config, Machine("cuda", int(card_gib * 2**30))).phases
    tensors = {phase.name: (phase.total - phase.kinds["reserve"]) / 2**30 for phase in phases}
    updates = max(tensors[name] for name in ("policy update", "critic update", "optimizer step"))
    return {"rollout": tensors["rollout"], "score": tensors["score"], "update": updates}


class Phases:
    """Seconds and peak memory of each phase of a step."""

    def __init__(self, bench: Bench) -> None:
        self.on_gpu, self.found = bench.on_gpu, {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        yield
        found = {}
        if self.on_gpu:  # on a CPU neither means anything
            torch.cuda.synchronize()
            found["seconds"] = time.perf_counter() - began
            found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.found[name] = found

    def fields(self, tokens: int) -> dict:
        """For a row. `tokens` that were sampled count for every phase's speed."""
        kept = {name: self.found[name] for name in ("rollout", "score", "update")}
        for found in kept.values():
            if found:
                found["tokens_per_s"] = tokens / found["seconds"]
        seconds = sum(found.get("seconds", 0.0) for found in kept.values())
        if not seconds:
            return {"phases": kept}
        peak = max(found["peak_gib"] for found in kept.values())
        return {"phases": kept, "seconds": round(seconds, 2), "tokens_per_s": tokens / seconds, "peak_gib": peak}


def trainer_step(bench: Bench, config: Config, reward: Callable, planned: dict[str, float]) -> dict:
    began = time.monotonic()
    trainer = Trainer(config, rewards=[reward], progress=Silent())
    loaded = time.monotonic() - began
    phases, inner = Phases(bench), trainer._phase

    @contextmanager
    def measured(name: str, metrics: dict[str, float]) -> Iterator[None]:
        with inner(name, metrics), phases(name):
            yield

    trainer._phase = measured
    with mock.patch.object(config.rollout, "max_new_tokens", WARM_UP_TOKENS):
        trainer.train_step()
    trainer.learner.forget_policy_moments()  # of another rollout; without them the first step must lower the loss
    before = norms(trainer)
    metrics = trainer.train_step()
    after = norms(trainer)
    checks = {
        "finite": all(map(math.isfinite, [*metrics.values(), *after.values()])),
        "lengths": metrics["completion/length"] == config.rollout.max_new_tokens and not metrics["completion/ended"],
        "policy moved": any(before[name] != after[name] for name in before if not name.startswith("value.")),
        "critic moved": any(before[name] != after[name] for name in before if name.startswith("value.")),
        # The first epoch's is 0, since advantages are whitened: this is the second one's.
        "surrogate rose": metrics["loss/policy"] < -NOISE,
    }
    fields = {"load_s": round(loaded, 1), **phases.fields(int(metrics["tokens"]))}
    for name, each in fields["phases"].items():
        each["planned_gib"] = planned[name]
    fields["planned_gib"] = max(planned.values())
    if bench.on_gpu:
        checks["peak within 10% of the plan"] = abs(fields["peak_gib"] / fields["planned_gib"] - 1) < 0.1
    shown = ("reward/mean", "loss/policy", "loss/value", "policy/approx_kl", "policy/entropy", "grad_norm")
    return judged(checks) | fields | {"metrics": {name: metrics[name] for name in shown}}


def norms(trainer: Trainer) -> dict[str, float]:
    """Of the trained parameters."""
    return {name: parameter.detach().float().norm().item() for name, parameter in trainer.learner.parameters().items()}


def plain_step(bench: Bench, config: Config, reward: Callable, size: int) -> dict:
    if bench.on_gpu and (held := torch.cuda.memory_allocated() / 2**20) > HELD_MIB:
        raise RuntimeError(f"{held:.0f} MiB of what ran before are still allocated")
    began = time.monotonic()
    torch.manual_seed(config.seed)
    step = PlainStep(config, bench.device, reward)
    loaded = time.monotonic() - began
    step(size, WARM_UP_TOKENS, Phases(bench))
    step.optimizer.state.clear()
    phases, too_large = Phases(bench), []
    while True:
        try:
            losses = step(size, config.rollout.max_new_tokens, phases)
            break
        except torch.OutOfMemoryError:
            too_large.append(size)
            step.optimizer.zero_grad()
            if size == 1:
                return {"status": "skipped", "error": "one sequence a pass does not fit", "load_s": round(loaded, 1)}
            size //= 2
        gc.collect()  # outside of the handler, which holds the frames of what failed
        torch.cuda.empty_cache()
    checks = {"finite": all(map(math.isfinite, losses)), "surrogate rose": losses[-1] < -NOISE}
    rollout = config.rollout
    tokens = rollout.num_prompts * rollout.num_generations * rollout.max_new_tokens
    fields = {"load_s": round(loaded, 1), "sequences_a_pass": size, "did_not_fit": too_large}
    return judged(checks) | fields | phases.fields(tokens)


def judged(checks: dict[str, bool]) -> dict:
    wrong = [name for name, right in checks.items() if not right]
    fields = {"status": "FAIL" if wrong else "PASS", "checks": len(checks)}
    return fields | ({"error": f"not so: {', '.join(wrong)}"} if wrong else {})
