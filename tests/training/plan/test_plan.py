"""`fastppo plan`: arithmetic and tracing, on tiny models and on those of 8B."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import build_changed_config, make_tiny_model
from torch import nn

from fastppo.algorithms import ALGORITHMS
from fastppo.cli import main
from fastppo.training.plan import Machine, page, plan
from fastppo.training.plan.live import LiveBytes
from fastppo.training.plan.phases import memory_of, shape_of
from fastppo.training.plan.report import out_of_memory
from fastppo.training.plan.skeleton import Quantized
from fastppo.training.plan.trace import trace

ROOT = Path(__file__).parents[3]
GPU = Machine("cuda", 24 * 2**30)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Only its configuration is left."""
    folder = make_tiny_model(tmp_path_factory.mktemp("model"), layers=6, vocab_size=331)
    (folder / "model.safetensors").unlink()
    return folder


def config(model: Path, **changes):
    tree = {
        "model": {"name_or_path": str(model)},
        "data": {"train": "nowhere.jsonl", "max_prompt_length": 20},
        "rewards": [{"name": "r", "function": "nowhere:r"}],
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_new_tokens": 12},
    }
    return build_changed_config(tree, changes)


def test_live_bytes_are_those_of_storages_that_are_still_there():
    kept = torch.zeros(10)
    with LiveBytes([kept]) as live:
        live.mark("a")
        x = kept + 1  # 40 bytes
        y = (kept * 2).view(5, 2)  # 40 bytes, once
        del x
        live.mark("b")
        kept.add_(y.view(10))
        del y
        live.mark("c")
    assert [live.peaks[name].first.total for name in "abc"] == [80, 40, 0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__autocast": "bfloat16", "model__value_model": "separate"},
        {"model__lora": {"r": 3}, "model__gradient_checkpointing": True},
        {"model__lora": {"r": 3}, "model__quantization": "nf4", "model__value_model": "adapter"},
    ],
    ids=["all parameters", "separate critic", "adapters", "nf4"],
)
def test_two_depths_tell_of_any(model, changes):
    given = config(model, **changes)
    algorithm = ALGORITHMS["ppo"](given.ppo)
    shape = shape_of(given, 1)
    two, three, six = (trace(given, algorithm, shape, depth, "cpu", sharded=False) for depth in (2, 3, None))
    told = two.at(2, three, 6)
    assert told.sizes == six.sizes
    assert told.cache == six.cache
    for phase, moments in told.moments.items():
        for moment, peak in moments.items():
            assert peak.first.total == pytest.approx(six.moments[phase][moment].first.total, rel=0.01), (phase, moment)
        largest = max(peak.first.total for peak in six.moments[phase].values())
        assert max(peak.first.total for peak in moments.values()) == pytest.approx(largest, rel=0.01)


def test_a_quantized_layer_takes_what_that_of_bitsandbytes_takes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from fastppo.models.quantize import quantize_

    dense = nn.Linear(96, 64 * 11, bias=False)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(96, 64 * 11, bias=False)

        def get_output_embeddings(self):
            return None

    real = Model()
    quantize_(real, device=torch.device("cpu"), compute_dtype=torch.float32)
    weight = real.layer.weight
    assert isinstance(real.layer, bitsandbytes.nn.Linear4bit)
    state = weight.quant_state
    tensors = [weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    taken = sum(t.numel() * t.element_size() for t in tensors)
    planned = Quantized(dense.to("meta"), torch.float32)
    assert sum(t.numel() * t.element_size() for t in (planned.weight, planned.scales)) == taken


def test_keys_lower_what_they_are_for(model):
    def peaks(**changes):
        return {phase.name: phase for phase in memory_of(config(model, **changes), GPU).phases}

    plain, separate = peaks(), peaks(model__value_model="separate")
    assert peaks(model__gradient_checkpointing=True)["policy update"].total < plain["policy update"].total
    assert peaks(model__activation_offloading=True)["policy update"].total < plain["policy update"].total
    assert peaks(batch__max_tokens=32)["policy update"].total < plain["policy update"].total
    assert peaks(rollout__generation_batch_size=1)["rollout"].total < plain["rollout"].total
    eighth = peaks(optim__name="adamw_8bit")["optimizer step"].kinds["optimizer"]
    assert eighth < plain["optimizer step"].kinds["optimizer"]
    assert peaks(optim__name="paged_adamw_8bit")["optimizer step"].kinds["optimizer"] == 0
    parked = peaks(model__value_model="separate", model__offload_idle=True)
    assert parked["rollout"].kinds["weights"] < separate["rollout"].kinds["weights"]


def test_the_largest_budget_fits_and_a_twentieth_more_does_not(model):
    given = config(model, rollout__num_prompts=4096)
    machine = Machine("cuda", int(1.2 * 2**30))
    most = plan(given, machine).most_tokens
    assert 0 < most < 4096 * 32
    for rows, fits in ((most // 32, True), (most // 32 * 21 // 20 + 1, False)):
        assert (memory_of(given, machine, rows=rows).peak.total <= machine.memory) == fits


def test_the_page_has_the_verdict_first_and_marks_the_peak(model):
    text = page(plan(config(model), Machine("cuda", 2**29)))
    lines = text.splitlines()
    assert lines[0].startswith("does not fit: needs")
    assert sum("<- peak" in line for line in lines) == 1
    assert page(plan(config(model), GPU)).startswith("fits: needs")


def test_out_of_memory_says_what_was_planned(model):
    error = torch.OutOfMemoryError("CUDA out of memory")
    error.phase = "score"
    text = out_of_memory(error, config(model))
    assert text.startswith("out of memory in phase `score` (CUDA out of memory); planned were")


def test_without_a_configuration_there_is_no_plan(model, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        "model: {name_or_path: nobody/nothing}\ndata: {train: x.jsonl}\nrewards: [{name: r, function: f:r}]\n"
    )
    assert main(["plan", str(tmp_path / "run.yaml"), "--gpu-memory", "24"]) == 1
    error = capsys.readouterr().err
    assert "nobody/nothing: neither a folder here nor a model" in error
    assert error.count("\n") == 1
    assert main(["plan", str(tmp_path / "run.yaml"), "--model.name_or_path", str(model)]) == 0
    assert capsys.readouterr().out.startswith("fits: needs")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3-8B", "Llama-3.1-8B"])
def test_8b_is_planned_in_a_minute_and_2_gb(tmp_path, name):
    """In processor seconds, as other tests run beside it, and in a process of its own for the memory."""
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "model": {
                    "name_or_path": str(ROOT / "tests" / "configurations" / name),
                    "dtype": "bfloat16",
                    "quantization": "nf4",
                    "lora": {"r": 16},
                    "value_model": "adapter",
                    "gradient_checkpointing": True,
                },
                "data": {"train": "nowhere.jsonl"},
                "rewards": [{"name": "r", "function": "nowhere:r"}],
                "rollout": {"max_new_tokens": 512, "generation_batch_size": 16},
                "batch": {"max_tokens": 4096},
            }
        )
    )
    command = [sys.executable, "-m", "fastppo", "plan", str(tmp_path / "run.yaml"), "--gpu-memory", "24"]
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert out.startswith("fits: needs"), out
    assert after.ru_utime - before.ru_utime < 60
    assert time.time() - began < 300
    assert after.ru_maxrss < 2 * 2**20 or after.ru_maxrss == before.ru_maxrss
