"""Conservative policy iteration: its step sizes against enumeration, and the mixture it distills."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tabular import TabularModels, Tree, make_config, make_learner, rollout, rollout_without_luck

from fastppo.algorithms.cpi import bound_step_size, held_out_step_size, policy_advantage


def world(*, tree=None, features=None, sequences=64, lr=0.2, **options):
    tree = tree or Tree()
    models = TabularModels(tree, features=features)
    parameters = [*models.policy_parameters().values(), models.value]
    config = make_config("cpi", sequences, tree.depth, **{"kl_coef": 0.0, "lam": 1.0} | options)
    algorithm, learner = make_learner(models, config, torch.optim.Adam(parameters, lr=lr))
    return tree, models, algorithm, learner


@pytest.mark.parametrize("step_size", ["held_out", "bound"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_optimum_is_approached(step_size, depth):
    """From true advantages and a sample without luck, so that where it ends is the algorithm's doing."""
    options = {"num_greedy_epochs": 3, "num_distill_epochs": 3, "num_value_epochs": 1}
    tree, models, algorithm, learner = world(tree=Tree(depth=depth), sequences=128, step_size=step_size, **options)
    gaps = [tree.best() - tree.objective(models.logits()).item()]
    for _ in range(30):
        algorithm.update(learner, rollout_without_luck(tree, models, algorithm, 128))
        gaps.append(tree.best() - tree.objective(models.logits()).item())
    if step_size == "bound" and depth > 1:
        # Its steps are safe against the worst state: they never lose, and they are small.
        assert gaps[-1] < 0.9 * gaps[0]
        assert all(later < earlier + 0.01 for earlier, later in itertools.pairwise(gaps))
    else:
        assert gaps[-1] < 0.05


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_the_distilled_policy_is_the_mixture_at_every_state(alpha):
    tree, models, algorithm, learner = world(num_distill_epochs=200, lr=0.05)
    experience = models.experience(torch.arange(len(tree.sequences)))  # every state
    old = {"head": models.weight.detach().clone()}
    greedy = {"head": torch.randn_like(models.weight)}
    metrics = algorithm._distill(learner, experience, old, greedy, alpha)
    p, q = (models.logits(parameters).softmax(-1) for parameters in (old, greedy))
    mixture = (1 - alpha) * p + alpha * q
    torch.testing.assert_close(models.logits().softmax(-1).detach(), mixture, atol=2e-3, rtol=0)
    states = tree.states(experience.sequences)
    new = models.logits().log_softmax(-1)
    for name, source in (("policy/kl", p), ("cpi/kl_from_greedy", q)):
        kl = (source * (source.log() - new)).sum(-1)[states].mean().item()
        assert metrics[name] == pytest.approx(kl, rel=1e-6)


@pytest.mark.parametrize(
    "loss_agg", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
)
def test_the_distillation_gradient_is_that_of_the_kl_from_the_mixture(loss_agg):
    """(1 − α) KL(π ‖ π_θ) + α KL(π′ ‖ π_θ) = KL((1 − α) π + α π′ ‖ π_θ) + a constant, weighted as `loss_agg` says.

    Of completions of different lengths, and summed up over micro-batches.
    """
    tree, models, algorithm, learner = world(tree=Tree(depth=3, eos=True), features=3, loss_agg=loss_agg)
    learner.micro_batch_size = 4
    experience = models.experience(torch.arange(len(tree.sequences)))
    old = {name: torch.randn_like(p) for name, p in models.policy_parameters().items()}
    greedy = {name: torch.randn_like(p) for name, p in models.policy_parameters().items()}
    experience.old_hidden, old_head = learner.snapshot(experience, old)
    experience.target_hidden, greedy_head = learner.snapshot(experience, greedy)
    gradient, _ = learner.gradient(experience, algorithm.distillation_loss(old_head, greedy_head, 0.3))
    mixture = 0.7 * models.logits(old).softmax(-1) + 0.3 * models.logits(greedy).softmax(-1)
    kl = (mixture * (mixture.log() - models.logits().log_softmax(-1))).sum(-1)
    terms = [row[real] for row, real in zip(kl[tree.states(experience.sequences)], experience.mask, strict=True)]
    assert len({len(row) for row in terms}) > 1
    if loss_agg == "token-mean":
        loss = torch.cat(terms).mean()
    elif loss_agg == "seq-mean-token-mean":
        loss = torch.stack([row.mean() for row in terms]).mean()
    else:
        loss = torch.stack([row.sum() for row in terms]).mean() / (3 if loss_agg.endswith("norm") else 1)
    expected = torch.autograd.grad(loss, list(models.policy_parameters().values()))
    for ours, exact in zip(gradient.values(), expected, strict=True):
        torch.testing.assert_close(ours, exact)


def test_the_bound_holds_and_is_best_at_its_step():
    """Over random trees and policies: the exact improvement is at least α T 𝔸 − α² ε T (T − 1) at every α."""
    for _ in range(20):
        tree = Tree(depth=int(torch.randint(1, 4, ())))
        models = TabularModels(tree)
        logits, greedy = models.logits().detach(), 2 * torch.randn(tree.num_states, tree.vocab).double()
        advantages = tree.advantages(logits)
        ratios = (tree.token_logprobs(greedy) - tree.token_logprobs(logits)).exp()
        weight = tree.probabilities(logits)[:, None]
        gain = (weight * ratios * advantages).sum()  # T 𝔸: a token is weighted by how often its state is visited
        worst, horizon = advantages.abs().max(), tree.depth
        for alpha in (0.05, 0.3, 1.0):
            mixture = ((1 - alpha) * logits.softmax(-1) + alpha * greedy.softmax(-1)).log()
            improvement = tree.objective(mixture) - tree.objective(logits)
            assert improvement >= alpha * gain - alpha**2 * worst * horizon * (horizon - 1) - 1e-12
    # What the function does with that, on sequences that stand for themselves:
    a = torch.tensor([[1.0, -1.0, 0.5], [0.5, 1.0, 0.0]])
    r = torch.tensor([[1.5, 0.5, 1.2], [0.9, 1.1, 1.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantage = ((r - 1) * a)[mask].mean().item()
    assert bound_step_size(r, a, mask, gamma=1.0) == pytest.approx(advantage / (2 * 1.0 * 2))
    assert bound_step_size(r, a, mask, gamma=0.5) == pytest.approx(advantage / (2 * 1.0 * 1))
    assert bound_step_size(2 - r, a, mask, gamma=1.0) == 0.0  # away from what is good
    assert bound_step_size(r[:, :1], a[:, :1], mask[:, :1], gamma=1.0) == 1.0  # a bandit has nowhere to stray


def test_the_held_out_estimate_is_the_exact_improvement_on_average():
    """Over all completions, each as often as the policy draws it, the weighted sum of advantages is the improvement."""
    tree = Tree(depth=3)
    logits = TabularModels(tree).logits().detach()
    other = 2 * torch.randn(tree.num_states, tree.vocab).double()
    advantages = tree.advantages(logits)
    ratios = (tree.token_logprobs(other) - tree.token_logprobs(logits)).exp()
    for alpha in (0.25, 1.0):
        weights = (1 - alpha + alpha * ratios).cumprod(1)
        estimate = (tree.probabilities(logits)[:, None] * (weights - 1) * advantages).sum()
        mixture = ((1 - alpha) * logits.softmax(-1) + alpha * other.softmax(-1)).log()
        torch.testing.assert_close(estimate, tree.objective(mixture) - tree.objective(logits))


def test_sequences_without_a_token_promise_nothing():
    nothing = torch.zeros(2, 3)
    assert policy_advantage(nothing, nothing, nothing.bool()) == 0.0


def test_the_held_out_search_takes_what_promises_most():
    mask = torch.ones(400, 2, dtype=torch.bool)
    sign = torch.randint(2, (400, 2)) * 2.0 - 1
    good = 1 + 0.5 * sign  # more of what was good, less of what was not
    assert held_out_step_size(good, sign, mask) == 1.0
    assert held_out_step_size(2 - good, sign, mask) == 0.0
    # As good but for one sequence, which the greedy policy overrates: its weight grows with the square of α.
    good[0], sign[0] = torch.tensor([30.0, 30.0]), torch.tensor([1.0, -1.0])
    assert 0.0 < held_out_step_size(good, sign, mask) < 0.5


def test_a_distillation_that_leads_away_is_taken_back():
    """With a learning rate far too high for the small way from π to the mixture."""
    tree, models, algorithm, learner = world(lr=5.0, num_distill_epochs=1)
    experience = models.experience(torch.arange(len(tree.sequences)))
    old = {"head": models.weight.detach().clone()}
    greedy = {"head": old["head"] + 0.1 * torch.randn_like(models.weight)}
    metrics = algorithm._distill(learner, experience, old, greedy, 0.5)
    assert torch.equal(models.weight, old["head"])
    assert metrics["policy/kl"] == 0.0


@pytest.mark.parametrize("where", ["the greedy policy", "the mixture"])
def test_what_is_not_finite_leaves_the_old_policy(where, monkeypatch):
    tree, models, algorithm, learner = world(features=3)
    learner.on_nonfinite = "skip"
    before = {name: p.detach().clone() for name, p in models.policy_parameters().items()}
    if where == "the greedy policy":
        ratios = algorithm._ratios
        monkeypatch.setattr(algorithm, "_ratios", lambda *args: ratios(*args) * math.inf)
    else:
        monkeypatch.setattr("fastppo.algorithms.cpi.held_out_step_size", lambda *_: 0.5)
        monkeypatch.setattr(learner, "measure", lambda *args: {"loss/distillation": math.nan})
    metrics = algorithm.update(learner, rollout(tree, models, algorithm, 32))
    assert metrics["policy/skipped_steps"] == 1.0
    assert all(torch.equal(before[name], p) for name, p in models.policy_parameters().items())


def test_skipped_steps_of_both_its_descents_are_counted(monkeypatch):
    tree, models, algorithm, learner = world(num_greedy_epochs=2, num_distill_epochs=3)
    learner.on_nonfinite = "skip"
    monkeypatch.setattr("fastppo.algorithms.cpi.held_out_step_size", lambda *_: 0.5)
    step = learner._optimizer_step
    monkeypatch.setattr(learner, "_optimizer_step", lambda losses: step(losses | {"loss/x": math.nan}))
    metrics = algorithm.update(learner, rollout(tree, models, algorithm, 32))
    assert metrics["policy/skipped_steps"] == 5.0
    assert metrics["value/skipped_steps"] == 4.0


def test_no_promise_leaves_every_bit(monkeypatch):
    import fastppo.algorithms.cpi as module

    monkeypatch.setattr(module, "held_out_step_size", lambda *_: 0.0)
    tree, models, algorithm, learner = world(features=3)
    before = {name: p.detach().clone() for name, p in models.policy_parameters().items()}
    metrics = algorithm.update(learner, rollout(tree, models, algorithm, 32))
    assert metrics["cpi/step_size"] == 0.0
    assert all(torch.equal(before[name], p) for name, p in models.policy_parameters().items())
    monkeypatch.setattr(module, "held_out_step_size", lambda *_: 1.0)
    algorithm.update(learner, rollout(tree, models, algorithm, 32))
    assert not any(torch.equal(before[name], p) for name, p in models.policy_parameters().items())
