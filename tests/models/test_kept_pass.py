"""The forward pass that scores a rollout, kept for the update that begins with the same sequences."""

from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model

from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.models.policy_models import PolicyModels


@pytest.fixture
def models(tmp_path):
    config = ModelConfig(name_or_path=str(make_tiny_model(tmp_path / "model")))
    return PolicyModels(config, device=torch.device("cpu"), num_values=0)


def gradients(models, upstream, *batch):
    hidden, head = models.hidden(*batch)
    ((hidden * upstream).sum() + head.weight.square().sum()).backward()
    found = {name: p.grad.clone() for name, p in models.policy_parameters().items()}
    models.policy.zero_grad()
    return hidden.detach(), found


def test_the_kept_pass_is_used_once_and_is_that_of_a_new_one(models):
    """In another order, with two sequences that are the same."""
    sequences, mask = torch.randint(3, 300, (6, 9)), torch.ones(6, 9, dtype=torch.long)
    mask[0, :2], mask[3, 7:] = 0, 0
    sequences[5], mask[5] = sequences[0], mask[0]
    order = torch.randperm(6)
    batch = sequences[order], mask[order], 4
    upstream = torch.randn(6, 4, 32) * mask[order, -4:, None]
    with torch.no_grad():
        models.hidden(*batch)  # tries once whether sequences can be packed
    calls = []
    models.policy.base_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        scored, _ = models.hidden_before_update(sequences, mask, 4)
    assert not scored.requires_grad
    kept = gradients(models, upstream, *batch)
    assert len(calls) == 1
    assert torch.equal(kept[0], scored[order])
    new = gradients(models, upstream, *batch)
    assert len(calls) == 2
    real = mask[order, -4:].bool()
    torch.testing.assert_close(kept[0][real], new[0][real])
    for name, gradient in kept[1].items():
        torch.testing.assert_close(gradient, new[1][name], rtol=1e-3, atol=1e-4 * (1 + gradient.abs().max().item()))


@pytest.mark.parametrize("reason", ["other parameters", "other sequences", "other completions", "the update is over"])
def test_the_kept_pass_is_let_go(models, reason):
    sequences, mask = torch.randint(3, 300, (4, 7)), torch.ones(4, 7, dtype=torch.long)
    length = 3
    models.hidden_before_update(sequences, mask, length)
    if reason == "other parameters":
        with torch.no_grad():
            for parameter in models.policy_parameters().values():
                parameter.copy_(parameter + 0.1 * torch.randn_like(parameter))
    elif reason == "other sequences":
        sequences = sequences.roll(1, dims=1)
    elif reason == "other completions":
        length = 4
    else:
        with models.training():
            pass
        parameters = list(models.policy_parameters().values())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(parameters, lr=0.1, fused=True).step()
    hidden, _ = models.hidden(sequences, mask, length)
    with torch.no_grad():
        expected, _ = models.hidden(sequences, mask, length)
    torch.testing.assert_close(hidden.detach(), expected)


def test_an_adapter_of_the_head_is_added_to_its_weight_once(tmp_path):
    """The update that begins with the scored pass takes its head too; the gradients are those of a new one."""
    pytest.importorskip("peft")
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"])
    config = ModelConfig(name_or_path=str(make_tiny_model(tmp_path / "model", tie=False)), lora=lora)
    models = PolicyModels(config, device=torch.device("cpu"), num_values=0)
    sequences, mask = torch.randint(3, 300, (4, 7)), torch.ones(4, 7, dtype=torch.long)
    with torch.no_grad():
        for parameter in models.policy_parameters().values():
            parameter.normal_(std=0.3)
        _, scored = models.hidden_before_update(sequences, mask, 3)
    _, head = models.hidden(sequences, mask, 3)
    assert head.weight is scored.weight
    models.hidden_before_update(sequences, mask, 3)
    upstream = torch.randn(4, 3, 32)
    kept, new = (gradients(models, upstream, sequences, mask, 3)[1] for _ in range(2))
    assert kept.keys() == new.keys()
    for name, gradient in kept.items():
        torch.testing.assert_close(gradient, new[name])
