"""What ranks hold while models are loaded and sharded: one has the weights, the others get their share of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start
from tiny import make_tiny_model
from torch import nn

from fastppo.errors import ConfigError
from fastppo.models import backbone_of, load_causal_lm
from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.models.packing import can_pack
from fastppo.models.policy_models import PolicyModels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"),
]
CASES: list[dict[str, Any]] = [
    {"value_model": "separate", "autocast": "bfloat16", "gradient_checkpointing": True},
    {"name_or_path": "untied", "value_model": "separate", "value_name_or_path": "model"},
    {"value_model": "shared", "dtype": "bfloat16"},
    {"value_model": "separate", "lora": LoraConfig(r=3), "gradient_checkpointing": True},
]


def build(world: Path, case: dict[str, Any], **functions: Any) -> dict[str, nn.Module | None]:
    names = {"name_or_path": "model"} | case
    names = {name: str(world / value) if name.endswith("path") else value for name, value in names.items()}
    torch.manual_seed(3)
    models = PolicyModels(ModelConfig(**names), device=torch.device("cpu"), **functions)
    return {"policy": models.policy, "value": models.value, "reference": models._reference}


def check(world: Path) -> None:
    from fastppo.training.distributed.sharded import ShardedProcesses

    class Watched(ShardedProcesses):
        whole_at_once = 0  # elements that are on the device and not sharded

        def load(self, load):
            model = super().load(load)
            assert all(p.is_meta == (self.rank != 0) for p in model.parameters())
            return model

        def place(self, model):
            if self.rank != 0 and hasattr(model, "config"):  # no head alone
                assert all(p.is_meta for p in model.parameters())
            super().place(model)
            for parameter in model.parameters():
                local, sharded = parameter.to_local(), parameter.placements[0].is_shard()
                assert len(local) <= -(-len(parameter) // self.size) if sharded else local.numel() <= 33

        def _receive(self, module):
            super()._receive(module)
            whole = sum(p.numel() for p in module.parameters() if not hasattr(p, "to_local"))
            self.whole_at_once = max(self.whole_at_once, whole)

    for case in CASES:
        expected = build(world, case)
        ranks = Watched(torch.device("cpu"), autocast=None, cpu_offload=False)
        given = build(world, case, load=ranks.load, place=ranks.place)
        assert 0 < ranks.whole_at_once < sum(p.numel() for p in expected["policy"].parameters()) / 1.3
        for name, model in expected.items():
            if model is None:
                assert given[name] is None
                continue
            for one, other in zip(model.named_buffers(), given[name].named_buffers(), strict=True):
                assert one[0] == other[0]
                assert torch.equal(one[1], other[1]), (name, one[0])
            if name != "value":
                assert can_pack(backbone_of(model)) == can_pack(backbone_of(given[name]))
            wanted = dict(model.named_parameters())
            assert wanted.keys() == dict(given[name].named_parameters()).keys()  # tied ones only once
            for key, parameter in given[name].named_parameters():
                assert parameter.requires_grad == wanted[key].requires_grad
                full = parameter.detach().full_tensor()
                assert full.dtype == wanted[key].dtype
                assert torch.equal(full, wanted[key]), (name, key)


@pytest.mark.parametrize("size", [2, 3])
def test_loaded_parts_are_those_of_one_process(tmp_path, size):
    for name, tie in (("model", True), ("untied", False)):
        make_tiny_model(tmp_path / name, tie=tie, layers=3, vocab_size=301)
    start(check, size, tmp_path)


def check_unsendable(world: Path) -> None:
    from fastppo.training.distributed.sharded import ShardedProcesses

    def load(on: str) -> nn.Module:
        model = nn.Linear(2, 2, device=on)
        model.register_forward_hook(lambda *_: None)
        return model

    with pytest.raises(ConfigError, match=r"^distributed\.strategy: its model cannot be sent .*; replicate reads it"):
        ShardedProcesses(torch.device("cpu"), autocast=None, cpu_offload=False).load(load)


def test_a_model_that_cannot_be_sent_is_refused_by_all(tmp_path):
    start(check_unsendable, 2, tmp_path)


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_on_the_way_to_a_gpu_a_model_waits_in_memory_as_the_gpu_wants_it(tmp_path, attention):
    config = ModelConfig(str(make_tiny_model(tmp_path)), attn_implementation=attention)
    model = load_causal_lm(config, device="cuda", on="cpu")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert model.config._attn_implementation == {"auto": "sdpa", "eager": "eager"}[attention]
    assert not hasattr(backbone_of(model), "fastppo_can_pack")  # the GPU will tell
