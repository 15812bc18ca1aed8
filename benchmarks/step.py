"""Tokens per second of one training step of the example, and of the same step in plain PyTorch and transformers.

    python benchmarks/step.py                                    # 32 completions of 24 tokens, 2 epochs; minutes
    python benchmarks/step.py --steps 1 --epochs 1 --ours-only   # whether it runs
    python benchmarks/step.py --fp32 --output benchmarks/results/step.json

The plain step is what one would write first: generate(), logits of whole sequences, log-softmax, one pass each of
policy and reference for the old log-probabilities and the KL, GAE as a loop, AdamW with its defaults, and padding
computed like everything else. Both steps have the same models, prompts, rewards, sampling, loss, critic and bfloat16
autocast (`--fp32` adds a plain step without autocast). Each runs in its own process, ours set up as by `fastppo train`,
and they take turns step by step. Phases are wall-clock seconds of the median step.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import functools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from arguments import count, output, run_script
from cpu import describe_machine
from torch import Tensor, nn
from transformers import GenerationConfig

from fastppo.models import load_causal_lm, load_tokenizer
from fastppo.training.allocator import keep_freed_memory
from fastppo.training.config import load_config
from fastppo.training.progress import ProgressDisplay
from fastppo.training.rewards import build_rewards
from fastppo.training.trainer import Trainer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "sentiment.yaml"


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began

    def wrap(self, phase: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            with self(phase):
                return function(*args, **kwargs)

        return timed


class PlainStep:
    """The step in plain PyTorch and transformers."""

    def __init__(self, config, autocast: bool = True) -> None:
        self.config, self.autocast = config, autocast
        self.tokenizer = load_tokenizer(config.model)
        self.tokenizer.padding_side = "left"
        self.policy = load_causal_lm(config.model)
        self.policy.set_attn_implementation("sdpa")  # transformers' own choice
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.value_head = nn.Linear(self.policy.config.hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)
        parameters = [*self.policy.parameters(), *self.value_head.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=config.optim.learning_rate, weight_decay=0.0)
        self.rewards = build_rewards(config.rewards, device=torch.device("cpu"), model_defaults=config.model)
        self.generation = GenerationConfig(
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.rollout.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def __call__(self, prompts: list[str], clock: Clock) -> int:
        """One step; returns how many tokens were sampled."""
        ppo = self.config.ppo
        # Entered anew for every use: it keeps copies of the weights, which an optimizer step makes stale.
        autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=self.autocast)
        with clock("rollout"), autocast():
            inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
            width = inputs["input_ids"].shape[1]
            self.policy.generation_config = self.generation
            sequences = self.policy.generate(**inputs)
            tokens = sequences[:, width:]
            is_eos = tokens == self.tokenizer.eos_token_id
            mask = (is_eos.cumsum(1) - is_eos.long()) == 0
            attention = torch.cat([inputs["attention_mask"], mask.long()], 1)
            positions = (attention.cumsum(1) - 1).clamp(min=0)
        scores = self.rewards(prompts, self.tokenizer.batch_decode(tokens, skip_special_tokens=True), {}).total

        def run(model: nn.Module) -> tuple[Tensor, Tensor]:
            """Log-probabilities and last hidden states of the completions, [B, T] and [B, T, D]."""
            out = model(
                input_ids=sequences,
                attention_mask=attention,
                position_ids=positions,
                use_cache=False,
                output_hidden_states=True,
            )
            log_p = torch.log_softmax(out.logits[:, width - 1 : -1].float(), -1)
            return log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), out.hidden_states[-1][:, width - 1 : -1]

        with clock("score"), torch.no_grad(), autocast():
            old, hidden = run(self.policy)
            old_values = self.value_head(hidden.float()).squeeze(-1).float() * mask
            ref, _ = run(self.reference)
            rewards = -ppo.kl_coef * (old - ref) * mask
            rewards[torch.arange(len(scores)), mask.sum(1) - 1] += scores
            advantages, last = torch.zeros_like(rewards), torch.zeros(len(scores))
            for t in reversed(range(rewards.shape[1])):
                after = old_values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros(len(scores))
                last = rewards[:, t] + ppo.gamma * after - old_values[:, t] + ppo.gamma * ppo.lam * last
                advantages[:, t] = last
            returns = advantages + old_values
            real = advantages[mask]
            advantages = (advantages - real.mean()) / (real.std() + 1e-8)

        with clock("update"):
            for _ in range(ppo.num_ppo_epochs):
                with clock("update: forward and loss"), autocast():
                    new, hidden = run(self.policy)
                    values = self.value_head(hidden.float()).squeeze(-1).float()
                    ratio = (new - old).exp()
                    clipped = ratio.clamp(1 - ppo.clip_low, 1 + ppo.clip_high)
                    surrogate = -torch.minimum(ratio * advantages, clipped * advantages)
                    near = old_values + (values - old_values).clamp(-ppo.cliprange_value, ppo.cliprange_value)
                    error = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
                    loss = ((surrogate + ppo.vf_coef * 0.5 * error) * mask).sum() / mask.sum()
                with clock("update: backward"):
                    loss.backward()
                with clock("update: optimizer"):
                    torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.optim.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
        return int(mask.sum())


class OurStep:
    """`Trainer.train_step`, with clocks around what it calls."""

    def __init__(self, config) -> None:
        keep_freed_memory()
        self.trainer = Trainer(config, progress=ProgressDisplay(config.total_steps))
        self.texts = [prompt.text for prompt in self.trainer.data.train]

    def __call__(self, prompts: list[str], clock: Clock) -> int:
        trainer = self.trainer
        chosen = {prompt.text: index for index, prompt in enumerate(trainer.data.train)}
        trainer.sampler = iter([[chosen[text] for text in dict.fromkeys(prompts)]])
        updating = False

        def in_update(phase: str, function: Callable) -> Callable:
            timed = clock.wrap(f"update: {phase}", function)
            return lambda *args, **kwargs: (timed if updating else function)(*args, **kwargs)

        def update(*args):
            nonlocal updating
            updating = True
            return algorithm_update(*args)

        algorithm_update = trainer.algorithm.update
        patched = [
            (trainer.algorithm, "update", update),
            (trainer.algorithm, "loss", in_update("loss and gradient of the head", trainer.algorithm.loss)),
            (trainer.models, "hidden", in_update("forward", trainer.models.hidden)),
            (torch.Tensor, "backward", in_update("backward", torch.Tensor.backward)),
            (trainer.learner, "_optimizer_step", in_update("optimizer", trainer.learner._optimizer_step)),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, function in patched:
                stack.enter_context(_replaced(owner, name, function))
            metrics = trainer.train_step()
        for phase in ("rollout", "score", "update"):
            clock.seconds[phase] = metrics[f"time/{phase}"]
        return int(metrics["tokens"])


class Apart:
    """A step in its own process, so that memory and settings of the others do not affect it."""

    def __init__(self, make: Callable[[], Callable]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=self._serve, args=(make, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.texts: list[str] | None = self._pipe.recv()

    def __call__(self, seed: int, prompts: list[str]) -> tuple[float, int, dict[str, float], float]:
        """Seconds, sampled tokens, seconds by phase, and the process's peak memory in MiB."""
        self._pipe.send((seed, prompts))
        return self._pipe.recv()

    @staticmethod
    def _serve(make: Callable[[], Callable], pipe) -> None:
        step = make()
        pipe.send(getattr(step, "texts", None))
        while True:
            try:
                seed, prompts = pipe.recv()
            except EOFError:  # the parent is done
                return
            torch.manual_seed(seed)
            clock = Clock()
            began = time.perf_counter()
            sampled = step(prompts, clock)
            seconds = time.perf_counter() - began
            pipe.send((seconds, sampled, clock.seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


@contextlib.contextmanager
def _replaced(owner: object, name: str, value: object) -> Iterator[None]:
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=count, default=3, help="measured steps, after one that is not")
    parser.add_argument("--epochs", type=count, default=2)
    parser.add_argument("--fp32", action="store_true", help="the plain step without autocast too")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--around", help="run the measured part while this command waits for the end of its input")
    parser.add_argument("--output", type=output, help="write the results here as JSON")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            EXAMPLE,
            [f"--output_dir={folder}", f"--ppo.num_ppo_epochs={args.epochs}", "--ppo.num_mini_batches=1"],
        )
        steps = {"fastppo": Apart(functools.partial(OurStep, config))}
        if not args.ours_only:
            steps["plain"] = Apart(functools.partial(PlainStep, config))
        if args.fp32:
            steps["plain, float32"] = Apart(functools.partial(PlainStep, config, autocast=False))
        texts = steps["fastppo"].texts
        machine = describe_machine() | {"transformers": transformers.__version__}
        waiting = subprocess.Popen(args.around.split(), stdin=subprocess.PIPE) if args.around else None
        try:
            results = measure(steps, texts, config, args.steps)
        finally:
            if waiting:
                waiting.stdin.close()
                waiting.wait()
        machine["load_average_after"] = os.getloadavg()[0]
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    print_table(results)
    if args.output:
        here = Path(__file__).parent
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True).stdout.strip()
        settings = {
            "sequences": config.rollout.num_prompts * config.rollout.num_generations,
            "max_new_tokens": config.rollout.max_new_tokens,
            "epochs": args.epochs,
            "steps": args.steps,
            "date": datetime.date.today().isoformat(),
            "commit": commit,
        }
        args.output.write_text(json.dumps({"machine": machine, "settings": settings, "results": results}, indent=1))


def measure(steps: dict[str, Apart], texts: list[str], config, count: int) -> list[dict]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    tokens: dict[str, list[int]] = {name: [] for name in steps}
    phases: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    peak: dict[str, float] = {}
    size = config.rollout.num_prompts
    for round_ in range(count + 1):
        chosen = texts[round_ * size : (round_ + 1) * size]
        prompts = [text for text in chosen for _ in range(config.rollout.num_generations)]
        for name, step in steps.items():
            took, sampled, by_phase, peak[name] = step(round_, prompts)
            if round_:  # the first step allocates memory and fills oneDNN's caches
                seconds[name].append(took)
                tokens[name].append(sampled)
                phases[name].append(by_phase)
    results = []
    for name in steps:
        median = statistics.median_low(seconds[name])
        at = seconds[name].index(median)
        results.append(
            {
                "name": name,
                "median_s": median,
                "min_s": min(seconds[name]),
                "tokens_per_second": tokens[name][at] / median,
                "phases_s": phases[name][at],
                "peak_mib": peak[name],
            }
        )
    for result in results:
        plain = next((r for r in results if r["name"] == "plain"), None)
        result["speedup"] = result["tokens_per_second"] / plain["tokens_per_second"] if plain else None
    return results


def print_table(results: list[dict]) -> None:
    print(f"\n{'':40}{'median s':>10}{'min s':>10}{'tokens/s':>10}{'speedup':>9}")
    for r in results:
        speedup = f"{r['speedup']:.2f}" if r["speedup"] else ""
        print(f"{r['name']:40}{r['median_s']:10.2f}{r['min_s']:10.2f}{r['tokens_per_second']:10.1f}{speedup:>9}")
        for phase, seconds in r["phases_s"].items():
            print(f"    {phase:36}{seconds:10.2f}")
        print(f"    {'peak memory, MiB':36}{r['peak_mib']:10.0f}")


if __name__ == "__main__":
    run_script(main)
