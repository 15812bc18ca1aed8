"""The Fisher matrix of a tiny transformer times a vector, against the matrix written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import make_tiny_model

from fastppo.algorithms.experience import Experience
from fastppo.algorithms.learner import Learner
from fastppo.algorithms.second_order.conjugate_gradient import dot, norm
from fastppo.algorithms.second_order.fisher import PolicyFisher
from fastppo.models.config import LoraConfig, ModelConfig
from fastppo.models.policy_models import PolicyModels

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    seed = int(torch.randint(2**31, ()))
    return {
        tie: make_tiny_model(root / f"tie{tie}", vocab_size=262, hidden_size=8, layers=1, tie=tie, seed=seed)
        for tie in (True, False)
    }


def build(folders, *, tie=True, **options):
    models = PolicyModels(ModelConfig(str(folders[tie]), **options), device=torch.device("cpu"), num_values=0)
    with torch.no_grad():
        for name, p in models.policy_parameters().items():
            if "lora_B" in name:  # adapters begin at zero, where half of their Jacobian is
                p.normal_(std=0.3)
    return models, Learner(models, None, None, num_mini_batches=1, micro_batch_size=1)


def rollout():
    """Two sequences: prompts of 2 and 3 tokens, completions of 3 and 1; ids that say nothing of what they are."""
    sequences = torch.randint(3, 262, (2, 6))
    attention = torch.ones(2, 6, dtype=torch.long)
    attention[0, 0] = attention[1, 4] = attention[1, 5] = 0
    mask = torch.tensor([[True, True, True], [True, False, False]])
    zeros = torch.zeros(2, 3)
    return Experience(sequences, attention, mask, zeros, scores=torch.zeros(2))


def explicit_fisher(models, experience):
    """mean_n J_nᵀ (diag p_n − p_n p_nᵀ) J_n, float64, from transformers' own logits, each sequence without padding."""
    policy = copy.deepcopy(models.policy).double()
    parameters = [p for p in policy.parameters() if p.requires_grad]
    total, count = 0, 0
    for ids, real, mask in zip(experience.sequences, experience.attention_mask, experience.mask, strict=True):
        length = int(mask.sum())
        logits = policy(input_ids=ids[real.bool()][None]).logits[0, -length - 1 : -1] / TEMPERATURE
        for z in logits:
            jacobian = torch.autograd.grad(
                z, parameters, torch.eye(len(z)).double(), is_grads_batched=True, retain_graph=True, allow_unused=True
            )
            jacobian = torch.cat(
                [
                    torch.zeros(len(z), p.numel()).double() if j is None else j.flatten(1)
                    for j, p in zip(jacobian, parameters, strict=True)
                ],
                dim=1,
            )
            p = z.detach().softmax(-1)
            total = total + jacobian.T @ (p[:, None] * (jacobian - p @ jacobian))
            count += 1
    return total / count


def flat(vector):
    return torch.cat([tensor.flatten() for tensor in vector.values()]).double()


def random_vector(parameters):
    return {name: torch.randn_like(p) for name, p in parameters.items()}


CASES = {
    "tied head": {},
    "head of its own": {"tie": False},
    "lora": {"lora": LoraConfig(r=2, lora_alpha=4)},
    "lora on the head too": {"tie": False, "lora": LoraConfig(r=2, target_modules=["q_proj", "lm_head"])},
    "eager attention": {"attn_implementation": "eager"},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_both_forms_give_the_explicit_product(folders, case):
    models, learner = build(folders, **CASES[case])
    experience, parameters = rollout(), learner.policy_parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    v = random_vector(parameters)
    expected = explicit_fisher(models, experience) @ flat(v)
    parts = [experience.select(torch.tensor([0])), experience.select(torch.tensor([1]))]
    for method, tolerance in (("gauss_newton", 1e-4), ("finite_difference", 3e-2)):
        for batches in ([experience], parts):
            product = PolicyFisher(learner, batches, method=method, temperature=TEMPERATURE)(v)
            assert product.keys() == parameters.keys()
            error = (flat(product) - expected).norm() / expected.norm()
            assert error < tolerance, (method, len(batches))
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in parameters.items())


def test_it_is_symmetric_and_never_negative(folders):
    _, learner = build(folders)
    fisher = PolicyFisher(learner, [rollout()])
    a, b = (random_vector(learner.policy_parameters()) for _ in range(2))
    f_a, f_b = fisher(a), fisher(b)
    assert dot(a, f_a) > 0
    assert abs(dot(b, f_a) - dot(a, f_b)) <= 1e-4 * norm(b) * norm(f_a)


def test_finite_differences_find_their_step(folders):
    """Directions of any length, one that moves nothing at all, and zero."""
    _, learner = build(folders)
    experience = rollout()
    fisher = PolicyFisher(learner, [experience], method="finite_difference", temperature=TEMPERATURE)
    v = random_vector(learner.policy_parameters())
    expected = flat(fisher(v))
    for scale in (1e-6, 1e5):
        product = flat(fisher({name: scale * tensor for name, tensor in v.items()}))
        assert (product / scale - expected).norm() / expected.norm() < 3e-2
    unseen = {name: torch.zeros_like(p) for name, p in learner.policy_parameters().items()}
    assert norm(fisher(unseen)) == 0.0
    _, learner = build(folders, tie=False)
    fisher = PolicyFisher(learner, [experience], method="finite_difference", temperature=TEMPERATURE)
    unseen = {name: torch.zeros_like(p) for name, p in learner.policy_parameters().items()}
    row = next(i for i in range(262) if i not in experience.sequences)
    unseen["model.embed_tokens.weight"][row] = 1.0
    assert norm(fisher(unseen)) < 1e-6


def test_half_precision_parameters_have_half_precision_products(folders):
    _, exact = build(folders)
    _, rounded = build(folders, dtype="bfloat16")
    experience, v = rollout(), random_vector(rounded.policy_parameters())
    product = PolicyFisher(rounded, [experience])(v)
    assert {tensor.dtype for tensor in product.values()} == {torch.bfloat16}
    expected = flat(PolicyFisher(exact, [experience])({name: tensor.float() for name, tensor in v.items()}))
    assert (flat(product) - expected).norm() < 0.1 * expected.norm()


def test_autocast_costs_precision_and_nothing_else(folders):
    _, exact = build(folders)
    _, rounded = build(folders, autocast="bfloat16")
    experience, v = rollout(), random_vector(exact.policy_parameters())
    expected = flat(PolicyFisher(exact, [experience])(v))
    assert (flat(PolicyFisher(rounded, [experience])(v)) - expected).norm() < 0.1 * expected.norm()


def test_half_precision_parameters_take_no_differences(folders):
    _, learner = build(folders, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"finite_difference.*model\.dtype"):
        PolicyFisher(learner, [rollout()], method="finite_difference")(random_vector(learner.policy_parameters()))


def test_a_model_without_forward_mode_says_what_to_do(folders):
    models, learner = build(folders)

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    norm_layer = models.policy.model.norm
    norm_layer.register_forward_hook(lambda module, args, output: Opaque.apply(output))
    v = random_vector(learner.policy_parameters())
    with pytest.raises(ValueError, match="finite_difference"):
        PolicyFisher(learner, [rollout()])(v)
    assert norm(PolicyFisher(learner, [rollout()], method="finite_difference")(v)) > 0
