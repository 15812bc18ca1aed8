"""Sampling by continuous batching beside generate(), at equal and mixed lengths, and by vLLM where it is installed."""

from __future__ import annotations

from pathlib import Path

import rollout as benchmark
import torch

from fastppo.models import load_tokenizer
from fastppo.models.config import ModelConfig
from fastppo.models.policy_models import PolicyModels
from fastppo.rollout.choose import why_not
from gpu_stages import random_model
from gpu_stages.bench import Bench

MODEL = "Llama-3.2-1B"
GOAL = 3.0  # times generate()'s tokens a second, at mixed lengths
LARGEST_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.5}  # of log-probabilities, by the rounding of the weights
FULL = benchmark.Workload(sequences=192, generations=1, prompt_tokens=128, new_tokens=384, together=64, rounds=1)
TINY = benchmark.Workload(sequences=6, generations=1, prompt_tokens=5, new_tokens=6, together=3, rounds=1)


def run(bench: Bench) -> None:
    work = TINY if bench.tiny else FULL
    tree = random_model.configuration(MODEL, tiny=bench.tiny)
    with random_model.scratch_folder(2 * random_model.num_parameters(tree)) as name:
        random_model.write_model(Path(name), tree, device=bench.device, dtype=bench.dtype)
        config = ModelConfig(name_or_path=name, dtype=str(bench.dtype).removeprefix("torch."), reference="none")
        models, tokenizer = PolicyModels(config, device=bench.device, num_values=0), load_tokenizer(config)
        speeds: dict[tuple[str, str], float] = {}
        for lengths in ("mixed", "equal"):
            case = f"{MODEL}, {work.sequences} completions of up to {work.new_tokens} tokens, {lengths} lengths"
            for engine in ("continuous", "transformers", "vllm"):  # the last takes memory that it may not give back

                def trial(engine: str = engine, lengths: str = lengths) -> dict:
                    if reason := why_not(engine, bench.device):
                        return {"status": "skipped", "error": reason}
                    found = benchmark.measure(engine, models, tokenizer, work, lengths)
                    right = found["largest_gap"] <= LARGEST_GAP[bench.dtype]
                    fields = {"status": "PASS" if right else "FAIL", "difference": found["largest_gap"]}
                    if not bench.on_gpu:
                        return fields
                    speeds[engine, lengths] = found["tokens_per_second"]
                    return fields | found | {"tokens_per_s": found["tokens_per_second"], "seconds": found["sample_s"]}

                bench.attempt(case, f"{engine}: tokens per second", trial)
            ours, plain = (speeds.get((engine, lengths)) for engine in ("continuous", "transformers"))
            if ours and plain:
                status = {"status": "PASS" if ours >= GOAL * plain else "FAIL"} if lengths == "mixed" else {}
                name = f"continuous batching is {ours / plain:.1f} times as fast as generate()"
                bench.row(case, name, **({"status": "ok"} | status))
