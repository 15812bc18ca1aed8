"""The models of a run: the frozen reference under autocast, and a value model of another vocabulary."""

from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model
from torch import nn

from fastppo.models import backbone_and_head
from fastppo.models.config import ModelConfig
from fastppo.models.packing import can_pack
from fastppo.models.policy_models import PolicyModels
from fastppo.models.source import ModelError


@pytest.fixture
def models(tmp_path):
    config = ModelConfig(name_or_path=str(make_tiny_model(tmp_path / "model")), autocast="bfloat16")
    return PolicyModels(config, device=torch.device("cpu"), num_values=0)


def states(models):
    sequences, mask = torch.randint(3, 300, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad(), models.autocast():
        policy, _ = models.hidden(sequences, mask, 4)
        reference, _ = models.reference_hidden(sequences, mask, 4)
    return policy, reference


def test_the_reference_is_the_policy_to_the_bit(models):
    reference = models._reference
    backbone, head = backbone_and_head(reference)
    linear = [m for m in backbone.modules() if type(m) is nn.Linear]
    assert linear
    assert all(m.weight.dtype == torch.bfloat16 for m in linear)
    assert head.weight.dtype == torch.float32
    assert can_pack(backbone)
    assert torch.equal(*states(models))


def test_a_refreshed_reference_follows_the_policy(models):
    with torch.no_grad():
        for parameter in models.policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    policy, reference = states(models)
    assert not torch.equal(policy, reference)
    models.refresh_reference()
    assert torch.equal(*states(models))


def test_a_value_model_that_cannot_read_what_the_policy_writes_is_refused(tmp_path):
    """On a GPU it would end the process at the first token that it lacks."""
    policy, value = (make_tiny_model(tmp_path / str(size), vocab_size=size) for size in (331, 300))
    config = ModelConfig(name_or_path=str(policy), value_model="separate", value_name_or_path=str(value))
    with pytest.raises(ModelError, match=r"^model\.value_name_or_path: it reads 300 tokens, the policy writes 331"):
        PolicyModels(config, device=torch.device("cpu"))
