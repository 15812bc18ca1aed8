"""The algorithms on problems of which everything is known: exact gradients, optima, and PPO against plain PyTorch."""

from __future__ import annotations

import dataclasses
import math
import statistics
from functools import partial

import pytest
import torch
from tabular import TabularModels, Tree, fresh_seed, make_config, make_learner, needs_values

from fastppo.algorithms.actor_critic import n_step_advantages
from fastppo.algorithms.lagrangian import LagrangeMultiplier
from fastppo.algorithms.reinforce import reward_to_go, subtract_baseline

# What makes the loss's gradient that of E[R] to the letter: sums over tokens, nothing rescaled.
EXACT = {"loss_agg": "seq-mean-token-sum", "whiten_advantages": False, "kl_coef": 0.0}
NO_REFERENCE = {"kl_coef": 0.0}

# name -> (algorithm, options, what its gradient is of the exact one, for B sequences in groups of 4)
GRADIENTS = {
    "reinforce, none": ("reinforce", {"baseline": "none"}, lambda b: 1),
    "reinforce, batch-mean": ("reinforce", {"baseline": "batch-mean"}, lambda b: 1 - 1 / b),
    "reinforce, rloo": ("reinforce", {"baseline": "rloo"}, lambda b: 1),
    "reinforce, grpo": ("reinforce", {"baseline": "grpo", "scale_rewards": "none"}, lambda b: 1 - 1 / 4),
    "reinforce, learned": ("reinforce", {"baseline": "learned"}, lambda b: 1),
    "actor-critic, all steps": ("actor_critic", {"n_steps": 9}, lambda b: 1),
    "actor-critic, gae": ("actor_critic", {"lam": 1.0}, lambda b: 1),
    "ppo, gae": ("ppo", {"lam": 1.0}, lambda b: 1),
    "ppo, grpo": ("ppo", {"adv_estimator": "grpo", "scale_rewards": "none"}, lambda b: 1 - 1 / 4),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradient_estimates_converge_to_the_exact_gradient(name):
    """The mean of many is within 7 standard errors in every coordinate: a chance of 1e-10 to fail, on any seed."""
    algorithm_name, options, factor = GRADIENTS[name]
    kl_coef = 0.3 if algorithm_name == "reinforce" else 0.0  # the KL penalty's own gradient with it
    size, repeats = 64, 250
    tree = Tree(depth=2, eos=True, seed=3)
    tree.rewards *= 4
    config = make_config(algorithm_name, size, 2, groups_of=4, **(EXACT | options | {"kl_coef": kl_coef}))
    models = TabularModels(tree, with_values=needs_values(config))
    algorithm, learner = make_learner(models, config)
    with torch.no_grad():  # elsewhere than the reference, but where no token is rare: standard errors need many of each
        models.weight.mul_(0.3).add_(0.3 * torch.sin(torch.arange(models.weight.numel())).view(models.weight.shape))
    assert tree.probabilities(models.logits()).min() > 0.02
    tree.generator.manual_seed(fresh_seed())  # the problem is always the same, its samples are fresh
    logits = models.logits()
    objective = tree.objective(logits) - kl_coef * tree.kl(logits, models.reference_logits())
    (exact,) = torch.autograd.grad(factor(size) * objective, models.weight)

    samples = []
    for _ in range(repeats):
        experience = models.experience(tree.sample(logits, size, groups_of=4), groups_of=4)
        algorithm.estimate_advantages(experience)
        models.weight.grad = None
        learner.accumulate(experience, partial(learner.evaluate, algorithm.loss, with_values=True))
        samples.append(-models.weight.grad)
    samples = torch.stack(samples)
    error = (samples.mean(0) - exact).abs()
    deviation = samples.std(0) / repeats**0.5
    assert (error <= 7 * deviation + 1e-12).all()
    assert 7 * deviation.max() < exact.abs().max()  # or else nothing would have been tested


RUNS = {
    **{f"reinforce, {b}": ("reinforce", {"baseline": b}) for b in ("none", "batch-mean", "rloo", "grpo", "learned")},
    "actor-critic, one step": ("actor_critic", {"n_steps": 1}),
    "actor-critic, gae": ("actor_critic", {}),
    "ppo": ("ppo", {}),
    **{f"ppo, {e}": ("ppo", {"adv_estimator": e}) for e in ("grpo", "rloo", "reinforce_plus_plus")},
    "ppo, sequence ratio": ("ppo", {"ratio_level": "sequence-geometric", "loss_agg": "seq-mean-token-mean"}),
}


@pytest.mark.parametrize(
    ("name", "depth"), [*((name, 3) for name in RUNS), ("reinforce, none", 1), ("actor-critic, gae", 1), ("ppo", 1)]
)
def test_the_optimum_is_reached(name, depth):
    """A bandit and a tree, from the uniform policy: nearly all of what is to be gained, by fresh samples each time."""
    algorithm_name, options = RUNS[name]
    tree = Tree(vocab=3, depth=depth, seed=1)
    size = 96
    config = make_config(algorithm_name, size, depth, groups_of=4, **(NO_REFERENCE | options))
    models = TabularModels(tree, with_values=needs_values(config))
    parameters = [*models.policy_parameters().values(), *models.value_parameters().values()]
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    tree.generator.manual_seed(fresh_seed())
    algorithm, learner = make_learner(models, config, torch.optim.Adam(parameters, lr=0.1))
    start, best = tree.objective(models.logits()).item(), tree.best()
    for _ in range(80):
        experience = models.experience(tree.sample(models.logits(), size, groups_of=4), groups_of=4)
        algorithm.estimate_advantages(experience)
        algorithm.update(learner, experience)
    assert tree.objective(models.logits()).item() > start + 0.75 * (best - start)


def test_ppo_is_the_algorithm_of_the_paper():
    """Three whole steps against an implementation that shares nothing with it, float64: the same parameters."""
    tree = Tree(prompts=3, vocab=5, depth=3, eos=True)
    models = TabularModels(tree, features=4)
    size = 24
    config = make_config(
        "ppo", size, 3, groups_of=2, num_ppo_epochs=2, num_mini_batches=3, gradient_accumulation_steps=2,
        gamma=0.9, lam=0.8, kl_coef=0.2, entropy_coef=0.03, dual_clip=1.5, clip_low=0.1, clip_high=0.3, vf_coef=0.7,
        missing_eos_penalty=0.3,
    )  # fmt: skip
    config.optim.max_grad_norm = 0.5
    own = [models.features, models.weight, models.value]
    algorithm, learner = make_learner(models, config, torch.optim.SGD(own, lr=0.5, momentum=0.9))
    plain = [p.detach().clone().requires_grad_() for p in own]
    reference = plain[0].detach() @ plain[1].detach().T
    # Not Adam, which turns the rounding of a vanishing gradient into a step.
    optimizer = torch.optim.SGD(plain, lr=0.5, momentum=0.9)
    for _ in range(3):
        rows = tree.sample(models.logits(), size, groups_of=2)
        seed = int(torch.randint(2**31, ()))
        experience = models.experience(rows, groups_of=2)
        algorithm.estimate_advantages(experience)
        torch.manual_seed(seed)
        algorithm.update(learner, experience)
        torch.manual_seed(seed)
        plain_ppo_step(tree, plain, optimizer, reference, tree.sequences[rows], tree.mask[rows])
        for ours, theirs in zip(own, plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(plain[1], models.reference["head"], atol=1e-2)  # they moved


def plain_ppo_step(tree, parameters, optimizer, reference, sequences, mask):
    """PPO as one would write it down, with the numbers of the test above."""
    features, head, table = parameters
    states, count = tree.states(sequences), len(sequences)
    tokens = sequences[:, 1:]

    def look(rows):
        logits = features[states[rows]] @ head.T
        log_p = logits - logits.exp().sum(-1, keepdim=True).log()
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, tokens[rows][..., None])[..., 0], entropy, table[states[rows]]

    with torch.no_grad():
        old, _, old_values = look(torch.arange(count))
        ref = reference[states].log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        score = tree_reward(tree, sequences) - 0.3 * (~((tokens == 0) & mask).any(1)).double()
        advantages, returns = torch.zeros_like(old), torch.zeros_like(old)
        for i in range(count):
            length = int(mask[i].sum())
            following_value = following = 0.0
            for t in reversed(range(length)):
                reward = -0.2 * (old[i, t] - ref[i, t]) + (score[i] if t == length - 1 else 0.0)
                delta = reward + 0.9 * following_value - old_values[i, t]
                following = delta + 0.9 * 0.8 * following
                following_value = old_values[i, t]
                advantages[i, t], returns[i, t] = following, following + old_values[i, t]
        real = advantages[mask]
        advantages = (advantages - real.mean()) / (real.var() + 1e-8).sqrt()

    for _ in range(2):
        for rows in torch.randperm(count).tensor_split(3):
            m = mask[rows].double()
            log_p, entropy, values = look(rows)
            ratio = (log_p - old[rows]).exp()
            a = advantages[rows]
            gain = torch.min(ratio * a, ratio.clamp(0.9, 1.3) * a)
            gain = torch.where(a < 0, torch.max(gain, 1.5 * a), gain)
            near = old_values[rows] + (values - old_values[rows]).clamp(-0.2, 0.2)
            critic = torch.max((values - returns[rows]) ** 2, (near - returns[rows]) ** 2) / 2
            loss = ((-gain - 0.03 * entropy + 0.7 * critic) * m).sum() / m.sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()


def tree_reward(tree, sequences):
    matches = (tree.sequences[None] == sequences[:, None]).all(-1)  # [B, M]
    return tree.rewards[matches.int().argmax(1)]


@pytest.mark.parametrize("ratio_level", ["token", "sequence", "sequence-geometric"])
@pytest.mark.parametrize("dual_clip", [None, 1.3])
def test_importance_weights_weigh_the_surrogate(ratio_level, dual_clip):
    """Against weighted terms of the loss, with the clips active, and KL and entropy left alone; some weights are 0."""
    tree = Tree(prompts=4, vocab=5, depth=4)
    models = TabularModels(tree, with_values=False)
    rows = torch.randint(len(tree.sequences), (40,))
    options = {
        "adv_estimator": "rloo", "ratio_level": ratio_level, "dual_clip": dual_clip,
        "kl_coef": 0.3, "kl_in": "loss", "kl_estimator": "k3", "entropy_coef": 0.1,
    }  # fmt: skip
    config = make_config("ppo", 40, 4, groups_of=2, **options)
    algorithm, learner = make_learner(models, config)
    experience = models.experience(rows, groups_of=2)
    algorithm.estimate_advantages(experience)
    experience.old_logprobs = experience.old_logprobs + 0.3 * torch.randn(40, 4, dtype=torch.float64)
    weight = experience.importance_weights = torch.rand(40, 4, dtype=torch.float64).mul(2).sub(0.5).clamp(min=0)
    metrics = learner.accumulate(experience, partial(learner.evaluate, algorithm.loss, with_values=True))
    ours, models.weight.grad = models.weight.grad, None

    log_p = models.logits().log_softmax(-1)[tree.states(experience.sequences)]
    new = log_p.gather(-1, experience.targets[..., None])[..., 0]
    log_ratio = new - experience.old_logprobs
    if ratio_level != "token":
        total = log_ratio.sum(1, keepdim=True)
        log_ratio = (total / 4 if ratio_level == "sequence-geometric" else total).expand(-1, 4)
    ratio, a = log_ratio.exp(), experience.advantages
    surrogate = torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    if dual_clip is not None:
        surrogate = torch.where(a < 0, torch.max(surrogate, dual_clip * a), surrogate)
    to_ref = experience.ref_logprobs - new
    per_token = -weight * surrogate + 0.3 * (to_ref.exp() - 1 - to_ref) + 0.1 * (log_p.exp() * log_p).sum(-1)
    per_token.mean().backward()
    torch.testing.assert_close(ours, models.weight.grad, atol=1e-12, rtol=1e-9)
    clipped = ((ratio > 1.2) & (a > 0)) | ((ratio < 0.8) & (a < 0))
    assert metrics["policy/clip_fraction"] == pytest.approx(clipped.double().mean().item())
    assert (clipped & (weight == 0)).any()


def inputs(experience):
    return experience.sequences, experience.attention_mask, experience.mask.shape[1]


def test_the_critic_can_be_trained_alone():
    tree = Tree(depth=3, eos=True)
    models = TabularModels(tree, features=4)
    algorithm, learner = make_learner(
        models, make_config("ppo", 16, 3, cliprange_value=None, num_mini_batches=2), lr=2.0
    )
    policy = {name: p.detach().clone() for name, p in models.policy_parameters().items()}
    experience = models.experience(tree.sample(models.logits(), 16))
    algorithm.estimate_advantages(experience)
    losses = [learner.descend_values(experience, algorithm.value_loss, num_epochs=10)["loss/value"] for _ in range(2)]
    assert losses[1] < losses[0]
    assert all(torch.equal(p, policy[name]) for name, p in models.policy_parameters().items())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({}, "old_values"),
        ({"missing_eos_penalty": 1.0}, "ended"),
        ({"adv_estimator": "rloo"}, "groups"),
        ({"multi_objective_aggregation": "normalize_then_sum", "kl_coef": 0.0}, "objective_scores"),
    ],
)
def test_what_an_experience_lacks_is_named(options, field):
    tree = Tree()
    models = TabularModels(tree)
    algorithm, _ = make_learner(models, make_config("ppo", 8, 2, groups_of=2, **options))
    experience = models.experience(tree.sample(models.logits(), 8, groups_of=2), groups_of=2)
    with pytest.raises(ValueError, match=rf"{field}: needed"):
        algorithm.estimate_advantages(dataclasses.replace(experience, **{field: None}))


def test_baselines_against_loops():
    groups = torch.tensor([7, 2, 2, 7, 7, 2, 5, 5])
    returns = torch.randn(8, 3, dtype=torch.float64) * 10 ** torch.randint(-3, 4, (8, 1))
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 3, 3, 2, 1, 3])[:, None]
    whole = returns[:, 0].tolist()

    def advantages(baseline, scale="group", groups=groups):
        return subtract_baseline(returns, mask, groups, baseline, scale)

    for i in range(8):
        mine = [whole[j] for j in range(8) if groups[j] == groups[i]]
        others = [whole[j] for j in range(8) if groups[j] == groups[i] and j != i]
        from_mean, real = returns[i] - statistics.mean(mine), mask[i]
        for given, expected in (
            (advantages("none"), returns[i]),
            (advantages("batch-mean"), (returns[i] - statistics.mean(whole)) * real),
            (advantages("rloo"), (returns[i] - statistics.mean(others)) * real),
            (advantages("grpo", "none"), from_mean * real),
            (advantages("grpo", "group"), from_mean * real / (statistics.stdev(mine) + 1e-6)),
            (advantages("grpo", "batch"), from_mean * real / (statistics.stdev(whole) + 1e-6)),
        ):
            torch.testing.assert_close(given[i], expected)
    assert (advantages("grpo", groups=torch.arange(8))[:, 0] == 0).all()  # a group of one has no deviation
    with pytest.raises(ValueError, match="at least two completions"):
        advantages("rloo", groups=torch.arange(8))


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_a_group_that_all_got_the_same_learns_nothing(estimator):
    tree = Tree()
    tree.rewards.fill_(float(torch.randn(()) * 1000 + 0.1))
    models = TabularModels(tree, with_values=False)
    algorithm, _ = make_learner(models, make_config("ppo", 12, 2, groups_of=3, adv_estimator=estimator, kl_coef=0.0))
    experience = models.experience(tree.sample(models.logits(), 12, groups_of=3), groups_of=3)
    experience.scores = experience.scores.float()
    algorithm.estimate_advantages(experience)
    assert experience.advantages.abs().max() < 1e-6


def test_reward_to_go_and_n_steps_against_loops():
    mask = torch.arange(7) < torch.tensor([[7], [3], [1]])
    rewards, values = (torch.randn(3, 7, dtype=torch.float64) * mask for _ in range(2))
    to_go = reward_to_go(rewards, mask, 0.9)
    for n in (1, 2, 4, 7, 20):
        advantages = n_step_advantages(rewards, values, mask, 0.9, n)
        for i, length in enumerate((7, 3, 1)):
            for t in range(7):
                expected = 0.0
                if t < length:
                    expected = sum(0.9**k * rewards[i, t + k] for k in range(min(n, length - t))) - values[i, t]
                    expected += 0.9**n * values[i, t + n] if t + n < length else 0.0
                    whole = sum(0.9**k * rewards[i, t + k] for k in range(length - t))
                    assert to_go[i, t].item() == pytest.approx(whole.item(), abs=1e-9)
                assert advantages[i, t].item() == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("estimator", ["gae", "grpo", "rloo"])
def test_normalized_objectives_do_not_drown_each_other(estimator):
    """One reward a thousand times as large: by normalize_then_sum nothing changes, by sum_then_normalize it rules."""
    tree = Tree(depth=3)
    models = TabularModels(tree, with_values=2 if estimator == "gae" else False)
    with torch.no_grad():
        if estimator == "gae":
            models.value.zero_()
    rows = tree.sample(models.logits(), 24, groups_of=4)
    scores, by_token = torch.randn(24, 2, dtype=torch.float64), torch.zeros(24, 3, 2, dtype=torch.float64)
    by_token[..., 1] = torch.randn(24, 3, dtype=torch.float64)

    def advantages(scale, aggregation):
        options = {"adv_estimator": estimator, "multi_objective_aggregation": aggregation, "kl_coef": 0.0}
        algorithm, _ = make_learner(models, make_config("ppo", 24, 3, groups_of=4, **options))
        experience = models.experience(rows, groups_of=4)
        if estimator == "gae" and aggregation == "sum_then_normalize":
            experience.old_values = experience.old_values[..., 0]
        factors = torch.tensor([scale, 1.0], dtype=torch.float64)
        experience.objective_scores, experience.objective_token_scores = scores * factors, by_token * factors
        experience.objectives = {"a": 0.7, "b": 1.5}
        experience.scores = experience.objective_scores @ torch.tensor([0.7, 1.5], dtype=torch.float64)
        metrics = algorithm.estimate_advantages(experience)
        if aggregation == "normalize_then_sum":
            assert {"advantage/std/a", "advantage/std/b"} <= metrics.keys()
            if estimator == "gae":
                assert experience.returns.shape == (24, 3, 2)
                assert {"value/explained_variance/a", "value/explained_variance/b"} <= metrics.keys()
        return experience.advantages

    same = [advantages(scale, "normalize_then_sum") for scale in (1.0, 1000.0)]
    torch.testing.assert_close(*same, atol=1e-3, rtol=1e-3)
    drowned = [advantages(scale, "sum_then_normalize") for scale in (1.0, 1000.0)]
    assert not torch.allclose(*drowned, atol=1e-2)


def test_a_multiplier_finds_the_price_of_its_constraint():
    """max E[R] + τ H  s.t. E[C] ≥ d on a bandit: the policy is softmax((R + λ C)/τ), and at the right λ E[C] = d."""
    reward, cost = torch.rand(6, dtype=torch.float64), torch.linspace(0, 1, 6, dtype=torch.float64)[torch.randperm(6)]
    temperature = 0.5

    def mean_cost(multiplier):
        return (((reward + multiplier * cost) / temperature).softmax(0) * cost).sum().item()

    free = mean_cost(0.0)
    for threshold, binds in ((free + 0.3 * (cost.max().item() - free), True), (free - 0.1, False)):
        multiplier = LagrangeMultiplier(0.5, threshold, 1.0)
        for _ in range(4000):
            multiplier.update(mean_cost(multiplier.value))
        assert multiplier.value >= 0
        if binds:
            assert mean_cost(multiplier.value) == pytest.approx(threshold, abs=1e-4)
        else:
            assert multiplier.value == 0.0  # a constraint that holds anyway has no price
    with pytest.raises(ValueError, match="at least 0"):
        LagrangeMultiplier(-1.0, 0.0, 1.0)
    for mean, threshold in ((math.nan, 0.0), (-1e308, 1e308)):
        multiplier = LagrangeMultiplier(0.5, threshold, 1.0)
        with pytest.raises(FloatingPointError, match=r"multiplier: (nan|inf) after 0\.5"):
            multiplier.update(mean)
        assert multiplier.value == 0.5


def test_advantages_of_the_largest_rewards():
    """A group's deviation overflows float32 where its members do not; its advantages are as for small rewards."""
    mask, groups = torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, dtype=torch.int64)
    small = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None].expand(4, 2)
    of_small, of_large = (subtract_baseline(scale * small, mask, groups, "grpo") for scale in (1e3, 3e38))
    torch.testing.assert_close(of_large, of_small, rtol=1e-6, atol=0)
