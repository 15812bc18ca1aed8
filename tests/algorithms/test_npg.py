"""TRPO and the natural policy gradient on problems small enough for the dense solution, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tabular import TabularModels, Tree, make_config, make_learner, rollout, rollout_without_luck

from fastppo.algorithms.learner import NonFiniteError

ALGORITHMS = ("npg", "trpo")


def world(name, *, features=None, tree=None, sequences=64, lr=0.1, **options):
    tree = tree or Tree()
    models = TabularModels(tree, features=features)
    defaults = {"kl_coef": 0.0, "lam": 1.0, "cg_tolerance": 0.0}
    algorithm, learner = make_learner(models, make_config(name, sequences, tree.depth, **defaults | options), lr=lr)
    return tree, models, algorithm, learner


def flat(parameters):
    return torch.cat([p.flatten() for p in parameters.values()])


def mean_kl(tree, models, experience, parameters):
    """KL(π_old ‖ π) a token over the states of an experience, from whole rows of logits."""
    old, new = models.logits().log_softmax(-1), models.logits(parameters).log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1)[tree.states(experience.sequences)][experience.mask].mean()


def dense_step(tree, models, experience, *, damping, max_kl):
    """θ_old + sqrt(2δ / xᵀF x) x with x = (F + λI)⁻¹ g: F and g by autograd from the enumerated table of logits."""
    names, start = list(models.policy_parameters()), flat(models.policy_parameters()).detach()

    def unflatten(theta):
        shapes = [p.shape for p in models.policy_parameters().values()]
        parts = theta.split([s.numel() for s in shapes])
        return {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}

    def surrogate(theta):
        logprobs = tree.token_logprobs(models.logits(unflatten(theta)), experience.sequences)
        ratio = (logprobs - experience.old_logprobs).exp()
        return (ratio * experience.advantages)[experience.mask].mean()

    g = torch.autograd.functional.jacobian(surrogate, start)
    fisher = torch.autograd.functional.hessian(lambda t: mean_kl(tree, models, experience, unflatten(t)), start)
    x = torch.linalg.solve(fisher + damping * torch.eye(len(start)).double(), g)
    return start + (2 * max_kl / (x @ fisher @ x)).sqrt() * x


@pytest.mark.parametrize("features", [None, 3])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"fisher_method": "finite_difference"}, {"gradient_accumulation_steps": 3}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_the_step_is_that_of_the_dense_solution(features, depth, options):
    for name in ALGORITHMS:
        given = {"max_kl": 1e-8, "damping": 0.01, "cg_iterations": 300, "cg_tolerance": 1e-9} | options
        tree, models, algorithm, learner = world(name, features=features, tree=Tree(depth=depth), **given)
        experience = rollout(tree, models, algorithm, 64)
        start = flat(models.policy_parameters()).detach().clone()
        expected = dense_step(tree, models, experience, damping=0.01, max_kl=1e-8) - start
        metrics = algorithm.update(learner, experience)
        step = flat(models.policy_parameters()).detach() - start
        # The whole step's KL may be a little above the bound; then TRPO's line search makes it shorter.
        assert metrics["policy/step_fraction"] == 1.0 or name == "trpo"
        expected *= metrics["policy/step_fraction"]
        assert (step - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_small_step_uses_the_whole_budget(name):
    tree, models, algorithm, learner = world(name, features=4, max_kl=1e-6, cg_iterations=40)
    metrics = algorithm.update(learner, rollout(tree, models, algorithm, 64))
    assert metrics["policy/kl"] == pytest.approx(1e-6, rel=0.02 if name == "npg" else 0.15)
    assert metrics["policy/improvement"] > 0


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("depth", [1, 2])
def test_the_optimum_is_reached(name, depth):
    """From true advantages and a sample without luck, so that where it ends is the algorithm's doing."""
    options = {"max_kl": 0.1, "damping": 1e-4, "cg_iterations": 6, "num_value_epochs": 1}
    tree, models, algorithm, learner = world(name, tree=Tree(depth=depth), sequences=128, **options)
    for _ in range(30):
        algorithm.update(learner, rollout_without_luck(tree, models, algorithm, 128))
    assert tree.objective(models.logits()).item() > tree.best() - 0.05


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.integers(1, 3),
    vocab=st.integers(2, 5),
    depth=st.integers(1, 3),
    eos=st.booleans(),
    features=st.sampled_from([None, 1, 3]),
    max_kl=st.sampled_from([1e-4, 1e-2, 0.3, 3.0]),
    damping=st.sampled_from([1e-8, 1e-3, 1.0]),
    iterations=st.integers(1, 12),
    fraction=st.sampled_from([1.0, 0.3]),
    scale=st.sampled_from([1.0, 30.0]),
    whiten=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_no_accepted_step_is_longer_than_allowed(
    prompts, vocab, depth, eos, features, max_kl, damping, iterations, fraction, scale, whiten, seed
):
    """Over random problems, from policies that are nearly uniform to ones that are nearly deterministic."""
    torch.manual_seed(seed)
    tree, models, algorithm, learner = world(
        "trpo",
        tree=Tree(prompts=prompts, vocab=vocab, depth=depth, eos=eos),
        features=features,
        sequences=16,
        max_kl=max_kl,
        damping=damping,
        cg_iterations=iterations,
        fisher_fraction=fraction,
        whiten_advantages=whiten,
    )
    with torch.no_grad():
        models.weight.mul_(scale)
    for _ in range(3):
        experience = rollout(tree, models, algorithm, 16)
        before = {name: p.detach().clone() for name, p in models.policy_parameters().items()}
        metrics = algorithm.update(learner, experience)
        after = {name: p.detach().clone() for name, p in models.policy_parameters().items()}
        learner.load_policy(before)
        kl = mean_kl(tree, models, experience, after).item()
        if metrics["policy/step_fraction"]:
            assert kl <= max_kl * (1 + 1e-9)
            assert metrics["policy/kl"] == pytest.approx(kl, rel=1e-6, abs=1e-12)
            assert metrics["policy/improvement"] > 0
        else:
            assert all(torch.equal(before[name], after[name]) for name in before)
        learner.load_policy(after)


@pytest.mark.parametrize("spoil", ["kl", "improvement", "nan"])
def test_a_failed_line_search_leaves_every_bit(spoil, monkeypatch):
    tree, models, algorithm, learner = world("trpo", features=3, line_search_steps=4)
    measure, calls = learner.measure, []

    def spoiled(*args):
        metrics = measure(*args)
        calls.append(metrics)
        wrong = {"kl": ("policy/kl", 1.0), "improvement": ("loss/surrogate", 9.0), "nan": ("policy/kl", math.nan)}
        name, value = wrong[spoil]
        return metrics | {name: value}

    monkeypatch.setattr(learner, "measure", spoiled)
    before = {name: p.detach().clone() for name, p in models.policy_parameters().items()}
    values = models.value.detach().clone()
    metrics = algorithm.update(learner, rollout(tree, models, algorithm, 32))
    assert metrics["policy/step_fraction"] == 0.0
    assert len(calls) == 4
    assert all(torch.equal(before[name], p) for name, p in models.policy_parameters().items())
    assert not torch.equal(values, models.value)  # the critic learns all the same


@pytest.mark.parametrize("on_nonfinite", ["skip", "stop"])
@pytest.mark.parametrize(("name", "where"), [("npg", "start"), ("npg", "step"), ("trpo", "start")])
def test_a_surrogate_that_is_not_finite_skips_the_step(name, where, on_nonfinite, monkeypatch):
    tree, models, algorithm, learner = world(name, features=3)
    learner.on_nonfinite = on_nonfinite
    gradient, measure = learner.gradient, learner.measure
    nan = {"loss/surrogate": math.nan}
    if where == "start":
        monkeypatch.setattr(learner, "gradient", lambda *args: (gradient(*args)[0], gradient(*args)[1] | nan))
    else:
        monkeypatch.setattr(learner, "measure", lambda *args: measure(*args) | nan)
    before = {name: p.detach().clone() for name, p in models.policy_parameters().items()}
    experience = rollout(tree, models, algorithm, 32)
    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteError, match="surrogate"):
            algorithm.update(learner, experience)
    else:
        metrics = algorithm.update(learner, experience)
        assert metrics["policy/skipped_steps"] == 1.0
        assert "policy/step_fraction" not in metrics
    assert all(torch.equal(before[name], p) for name, p in models.policy_parameters().items())


def test_the_critics_skipped_steps_are_counted_apart(monkeypatch):
    tree, models, algorithm, learner = world("trpo", features=3, num_value_epochs=3)
    learner.on_nonfinite = "skip"
    experience = rollout(tree, models, algorithm, 32)
    before = {name: p.detach().clone() for name, p in learner.parameters().items()}
    loss = algorithm.value_loss
    monkeypatch.setattr(algorithm, "value_loss", lambda *args: loss(*args)._replace(loss=math.nan * models.value.sum()))
    experience.advantages = experience.advantages * math.inf  # which the operator refuses
    metrics = algorithm.update(learner, experience)
    assert metrics["policy/skipped_steps"] == 1.0
    assert metrics["value/skipped_steps"] == 3.0
    assert all(torch.equal(before[name], p) for name, p in learner.parameters().items())
    assert all(p.grad is None for p in learner.parameters().values())

    metrics = algorithm.update(learner, rollout(tree, models, algorithm, 32))
    assert metrics["value/skipped_steps"] == 3.0
    assert "policy/skipped_steps" not in metrics


def test_a_curvature_that_is_not_finite_stops_the_step(monkeypatch):
    import fastppo.algorithms.npg as module

    tree, models, algorithm, learner = world("npg", features=3)
    solve = module.conjugate_gradient

    def overflow(*args, **options):
        solved = solve(*args, **options)
        return solved._replace(x={name: 1e200 * tensor for name, tensor in solved.x.items()})

    monkeypatch.setattr(module, "conjugate_gradient", overflow)
    with pytest.raises(NonFiniteError, match=r"the natural gradient's curvature is not finite \((inf|nan)\)"):
        algorithm.update(learner, rollout(tree, models, algorithm, 32))


def test_a_crash_in_the_line_search_leaves_every_bit(monkeypatch):
    tree, models, algorithm, learner = world("trpo", features=3)
    before = {name: p.detach().clone() for name, p in models.policy_parameters().items()}
    experience = rollout(tree, models, algorithm, 32)

    def broken(*args):
        raise MemoryError

    monkeypatch.setattr(learner, "measure", broken)
    with pytest.raises(MemoryError):
        algorithm.update(learner, experience)
    assert all(torch.equal(before[name], p) for name, p in models.policy_parameters().items())
    assert not learner.changed


@pytest.mark.parametrize("name", ALGORITHMS)
def test_without_advantages_nothing_moves(name):
    tree, models, algorithm, learner = world(name, whiten_advantages=False)
    experience = rollout(tree, models, algorithm, 16)
    experience.advantages.zero_()
    before = models.weight.detach().clone()
    metrics = algorithm.update(learner, experience)
    assert torch.equal(models.weight, before)
    assert metrics["policy/step_fraction"] == 0.0


@pytest.mark.parametrize("name", [*ALGORITHMS, "cpi"])
def test_a_rollout_without_a_token_moves_nothing(name):
    tree, models = Tree(), TabularModels(Tree())
    algorithm, learner = make_learner(models, make_config(name, 8, tree.depth), lr=0.1)
    experience = rollout(tree, models, algorithm, 8)
    experience.mask[:] = False
    before = models.weight.detach().clone()
    algorithm.estimate_advantages(experience)
    assert all(math.isfinite(value) for value in algorithm.update(learner, experience).values())
    assert torch.equal(models.weight, before)


def test_the_fisher_matrix_of_a_part_gives_another_step_within_the_same_bound():
    tree, models, algorithm, learner = world("trpo", features=3, fisher_fraction=0.25, cg_iterations=20)
    metrics = algorithm.update(learner, rollout(tree, models, algorithm, 64))
    assert metrics["policy/kl"] <= 0.01
    assert metrics["policy/step_fraction"] > 0
