"""The same run on 1, 2 and 4 processes: the same parameters and metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import config, make_world, start
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]

LORA = {"r": 4, "target_modules": "all-linear"}
CASES: dict[str, dict[str, Any]] = {
    # Fewer rows in a mini-batch than 4 processes, so some have none.
    "ppo with a critic": {
        "model__value_model": "separate",
        "ppo__num_mini_batches": 3,
        "ppo__gradient_accumulation_steps": 2,
    },
    "ppo, untied, values on the policy's states, exact kl in the loss, evaluated": {
        "model__name_or_path": "WORLD/untied",
        "data__eval_size": 5,
        "eval__perplexity": "WORLD/texts.txt",
        "ppo__kl_in": "loss",
        "ppo__kl_estimator": "exact",
        "ppo__entropy_coef": 0.01,
        "ppo__target_kl": 0.001,
    },
    "grpo": {
        "data__eval_size": 3,  # so of 4 processes, one has nothing to sample
        "ppo__adv_estimator": "grpo",
        "ppo__kl_in": "loss",
        "ppo__kl_estimator": "k3",
        "ppo__entropy_coef": 0.01,
        "ppo__loss_agg": "seq-mean-token-mean",
        "ppo__num_mini_batches": 2,
        "rollout__correction": "sequence_ratio",
        "ppo__reference_refresh_steps": 2,
        "model__gradient_checkpointing": True,
    },
    "several rewards": {
        "rewards": [
            {"name": "vowels", "function": "WORLD/reward.py:vowels", "normalize": True},
            {"name": "early", "function": "WORLD/reward.py:early", "weight": 0.1, "threshold": 1.0},
        ],
        "ppo__kl_controller": "adaptive",
        "ppo__whiten_rewards": True,
        "distributed__cpu_offload": True,
    },
    "ppo by tokens": {
        "model__value_model": "separate",
        "data__eval_size": 3,
        "eval__perplexity": "WORLD/texts.txt",
        "batch__max_tokens": 60,
        "ppo__num_mini_batches": 2,
        "ppo__kl_in": "loss",
        "ppo__kl_estimator": "exact",
    },
    "reinforce": {
        "algorithm": "reinforce",
        "reinforce__kl_estimator": "k2",
        "reinforce__loss_agg": "seq-mean-token-sum",
    },
    "actor-critic": {"algorithm": "actor_critic", "actor_critic__n_steps": 2},
    "ppo with adapters": {"model__lora": LORA, "ppo__num_mini_batches": 2, "ppo__kl_estimator": "exact"},
    "ppo with adapters, by tokens": {
        "model__lora": LORA,
        "model__attn_implementation": "eager",  # which computes padding
        "batch__max_tokens": 60,
    },
    "ppo with adapters, sharded": {
        "model__lora": LORA,
        "model__value_model": "separate",
        "distributed__strategy": "fsdp2",
    },
    "ppo in 4 bits with a critic of adapters": {
        "model__quantization": "nf4",
        "model__lora": LORA | {"merge": True},
        "model__value_model": "adapter",
        "model__gradient_checkpointing": True,
        "ppo__num_mini_batches": 2,
        "ppo__gradient_accumulation_steps": 2,
    },
    # Few iterations: each multiplies the rounding of the one before it.
    "trpo": {
        "algorithm": "trpo",
        "model__lora": LORA,
        "trpo__cg_iterations": 4,
        "trpo__gradient_accumulation_steps": 2,
    },
    "npg": {
        "algorithm": "npg",
        "model__lora": LORA,
        "npg__cg_iterations": 2,
        "npg__fisher_method": "finite_difference",
        "npg__fisher_fraction": 0.6,
    },
    "cpi": {"algorithm": "cpi", "model__lora": LORA, "optim__learning_rate": 1e-3, "cpi__step_size": "bound"},
}
ON_FOUR = ["ppo with a critic", "grpo", "trpo"]
NOT_EQUAL = ("time", "tokens_per_second")


def train(names: list[str], world: Path, out: Path) -> None:
    from fastppo.training.trainer import Trainer

    for name in names:
        changes = json.loads(json.dumps(CASES[name]).replace("WORLD", str(world)))
        Trainer(config(world, out / name, **changes)).train()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, no_report):
    """A folder with each case's runs on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("runs")
    make_world(folder)
    train(list(CASES), folder, folder / "1")
    start(train, 2, list(CASES), folder, folder / "2")
    start(train, 4, ON_FOUR, folder, folder / "4")
    return folder


@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in CASES), *((name, 4) for name in ON_FOUR)])
def test_equal_to_one_process(runs, name, size):
    one, several = (runs / str(n) / name for n in (1, size))
    files = sorted(path.relative_to(one) for path in one.glob("final*/**/*.safetensors"))
    assert files
    start = load_file(runs / ("untied" if "untied" in name else "model") / "model.safetensors")
    end = load_file(one / "final" / "model.safetensors")
    assert max((end[key] - start[key]).abs().max() for key in start) > 1e-4
    assert files == sorted(path.relative_to(several) for path in several.glob("final*/**/*.safetensors"))
    for file in files:
        expected, given = load_file(one / file), load_file(several / file)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, several)]
    assert len(rows[0]) >= 3
    for expected, given in zip(*rows, strict=True):
        assert given.keys() == expected.keys()
        for metric, value in expected.items():
            if not metric.startswith(NOT_EQUAL):
                assert math.isclose(given[metric], value, rel_tol=2e-3, abs_tol=2e-5), metric
