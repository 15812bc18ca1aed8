"""Activations kept in the host's memory: which tensors are moved, and that gradients do not change."""

from __future__ import annotations

import pytest
import torch
from tiny import make_tiny_model

from fastppo.models import activations
from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.models.policy_models import PolicyModels
from fastppo.ops.linear_ppo_loss import linear_ppo_loss

BATCH, LENGTH, COMPLETION, WIDTH, LAYERS = 5, 23, 9, 64, 3
CONFIGS = {
    "float32": {},
    "autocast": {"autocast": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
    "eager attention": {"attn_implementation": "eager"},
    "sdpa": {"attn_implementation": "sdpa", "autocast": "bfloat16"},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"lora": LoraConfig(r=4), "autocast": "bfloat16"},
    "lora, checkpointing": {"lora": LoraConfig(r=4), "gradient_checkpointing": True},
    "4 bits": {"lora": LoraConfig(r=4), "quantization": "nf4", "value_model": "adapter", "dtype": "bfloat16"},
    "4 bits, checkpointing": {
        "lora": LoraConfig(r=4),
        "quantization": "nf4",
        "value_model": "adapter",
        "gradient_checkpointing": True,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=WIDTH, layers=LAYERS)


@pytest.fixture
def moved(monkeypatch):
    """Copies what would be moved off a GPU, and lists it."""
    found = []

    def to_host(tensor):
        found.append(tensor)
        return tensor.detach().clone(memory_format=torch.preserve_format)

    monkeypatch.setattr(activations, "_to_host", to_host)
    return found


def build(folder, **options):
    config = ModelConfig(**{"name_or_path": str(folder), "value_model": "separate"} | options)
    models = PolicyModels(config, device=torch.device("cpu"))
    torch.manual_seed(1)
    with torch.no_grad():  # a new adapter's B, and a new value head, are zero, and so would half of the gradients be
        for parameters in (models.policy_parameters(), models.value_parameters()):
            for parameter in parameters.values():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return models


def gradients(models, config, *, keep=False):
    """Of the fused loss and of the critic's, whose backward passes come after both forward passes."""
    torch.manual_seed(2)
    ids, mask = torch.randint(3, 300, (BATCH, LENGTH)), torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :4] = 0
    models.config.activation_offloading = config
    batch = (ids, mask, COMPLETION)
    with models.training(), models.autocast():
        hidden, head = models.hidden_before_update(*batch) if keep else (None, None)
        hidden, head = models.hidden(*batch)
        arguments = {
            "targets": ids[:, -COMPLETION:],
            "old_logprobs": -torch.ones(BATCH, COMPLETION),
            "entropy_coef": 0.1,
        }
        loss = linear_ppo_loss(
            hidden, head.weight, advantages=torch.randn(BATCH, COMPLETION), clip_high=9.0, **arguments
        ).loss
        values = models.values(None, *batch)
        (values.square().mean() + loss).backward()
    named = models.policy_parameters() | {f"value.{name}": p for name, p in models.value_parameters().items()}
    found = {name: parameter.grad for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = None
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_same_bits_and_weights_stay(folder, moved, monkeypatch, name):
    monkeypatch.setattr(activations, "_MIN_BYTES", 1)  # so that it is not their size that keeps weights from moving
    models = build(folder, **CONFIGS[name])
    expected = gradients(models, False)
    assert not moved
    found = gradients(models, True)
    assert all(gradient is not None and gradient.any() for gradient in found.values())
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    weights = [p for model in (models.policy, models.value) for p in model.parameters()]
    # Those of quantized layers, which are packed, are told by their layers.
    layers = [m for model in (models.policy, models.value) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    pairs = [p.shape for p in weights if p.ndim == 2] + [(m.out_features, m.in_features) for m in layers]
    shapes = {tuple(shape) for pair in pairs for shape in (pair, pair[::-1])}
    storages = {p.untyped_storage().data_ptr() for p in weights}
    assert moved
    assert not [tensor.shape for tensor in moved if tensor.shape in shapes]  # copies in bfloat16 included
    assert not [tensor.shape for tensor in moved if tensor.untyped_storage().data_ptr() in storages]
    with torch.no_grad():
        count = len(moved)
        models.hidden(torch.randint(3, 300, (2, 7)), torch.ones(2, 7, dtype=torch.long), 3)
    assert len(moved) == count


def test_with_checkpointing_only_the_checkpoints_move(folder, moved):
    models = build(folder, gradient_checkpointing=True)
    gradients(models, True)
    state, completions = BATCH * LENGTH * WIDTH * 4, BATCH * COMPLETION * WIDTH * 4
    large = [tensor.nbytes for tensor in moved]
    # Of policy and critic each: one for every layer, and those of the last norm; and that of the value head.
    assert set(large) == {state, completions}
    assert 2 * LAYERS <= large.count(state) <= 2 * (LAYERS + 3)
    assert large.count(completions) == 1
    moved.clear()
    gradients(build(folder), True)
    assert sum(tensor.nbytes for tensor in moved) > 3 * sum(large)


def test_most_of_what_is_saved_is_moved(folder, moved):
    """Counted by torch's own hooks, which see all that is saved."""
    models, saved = build(folder), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        gradients(models, False)
    weights = {p.untyped_storage().data_ptr() for model in (models.policy, models.value) for p in model.parameters()}
    needed = sum(tensor.nbytes for tensor in saved if tensor.untyped_storage().data_ptr() not in weights)
    gradients(models, True)
    assert sum(tensor.nbytes for tensor in moved) > 0.9 * needed


def test_a_kept_pass_is_offloaded_too(folder, moved):
    models = build(folder)
    expected = gradients(models, False, keep=True)
    count = len(moved)
    found = gradients(models, True, keep=True)
    assert len(moved) > count
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_derivatives_with_respect_to_other_parameters_are_not_offloaded(folder, moved):
    """Of which TRPO takes forward-mode ones."""
    models = build(folder)
    models.config.activation_offloading = True
    ids = torch.randint(3, 300, (2, 7))
    parameters = {name: p.detach().clone().requires_grad_() for name, p in models.policy_parameters().items()}
    hidden, _ = models.hidden(ids, torch.ones_like(ids), 3, parameters)
    hidden.sum().backward()
    assert not moved


def test_on_a_cpu_nothing_is_copied():
    tensor = torch.randn(64, 64).t()
    assert activations._to_host(tensor) is tensor
