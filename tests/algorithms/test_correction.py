"""Importance weights against loops, and what they do to gradients whose expectation is computed exactly.

Every expectation here is a sum over all pairs of completions of a prompt, so no test draws a sample.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
from tabular import TabularModels, Tree, make_config, make_learner, needs_values

from fastppo.algorithms.correction import BOUNDS, importance_weights
from fastppo.algorithms.cpi import bound_step_size, held_out_step_size, policy_advantage

UNBOUNDED = {"low": 1e-9, "high": 1e9}
EXACT = {"loss_agg": "seq-mean-token-sum", "whiten_advantages": False, "kl_coef": 0.0}


@pytest.mark.parametrize("method", BOUNDS)
@pytest.mark.parametrize("bounds", [(None, None), (0.7, 1.3)])
def test_weights_are_those_of_a_loop(method, bounds):
    g = torch.Generator().manual_seed(5)
    logprobs, sampler = (-2 * torch.rand(7, 5, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(7, 5, generator=g) < 0.7
    mask[3] = False
    logprobs[~mask], sampler[~mask] = math.nan, math.inf
    low, high = (given or default for given, default in zip(bounds, BOUNDS[method], strict=True))
    weights, changed = importance_weights(logprobs, sampler, mask, method, *bounds)
    for b in range(7):
        ratios = {t: math.exp(logprobs[b, t] - sampler[b, t]) for t in range(5) if mask[b, t]}
        for t in range(5):
            ratio = math.prod(ratios.values()) if method.startswith("sequence") else ratios.get(t)
            expected, outside = 0.0, False
            if t in ratios:
                outside = ratio > high or ("mask" in method and ratio < low)
                expected = 0.0 if outside and "mask" in method else min(ratio, high)
            assert weights[b, t].item() == pytest.approx(expected, rel=1e-12)
            assert changed[b, t] == outside
    assert changed.any()
    assert (~changed & mask).any()


def test_hopeless_ratios_stay_finite():
    logprobs, sampler = torch.tensor([[-1.0] * 400, [-1e4] * 400]), torch.tensor([[-1e4] * 400, [-1.0] * 400])
    for method in BOUNDS:
        weights, changed = importance_weights(
            logprobs, sampler, torch.ones(2, 400, dtype=torch.bool), method, high=1e10
        )
        assert weights.isfinite().all()
        assert changed[0].all()
        assert (weights[1] == 0).all()


class Off:
    """A tree, a policy on it, and a sampler with logits of its own, which differ by `gap` times a fixed noise."""

    def __init__(self, algorithm="reinforce", *, depth=2, gap=0.6, **options):
        self.tree = Tree(prompts=2, vocab=3, depth=depth, eos=depth > 1, seed=11)
        config = make_config(algorithm, 8, depth, groups_of=2, **(EXACT | options))
        self.models = TabularModels(self.tree, with_values=needs_values(config))
        self.algorithm, self.learner = make_learner(self.models, config)
        self.logits = self.models.logits()
        shape = self.logits.shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        self.sampler = self.logits.detach() + gap * noise
        # All pairs of completions of a prompt: row 2 i and row 2 i + 1 are one.
        prompts = self.tree.sequences[:, 0]
        first, second = (prompts[:, None] == prompts[None]).nonzero().unbind(1)
        self.rows = torch.stack([first, second], 1).flatten()

    def experience(self, sampler):
        """Every pair once, as if `sampler` had drawn it, with the algorithm's advantages."""
        experience = self.models.experience(self.rows, groups_of=2)
        experience.rollout_logprobs = self.tree.token_logprobs(sampler)[self.rows]
        self.algorithm.estimate_advantages(experience)
        return experience

    def gradient(self, experience, sampler, method, **bounds):
        """The exact expectation over `sampler` of the gradient ascended, [S, V], of `experience`'s pairs."""
        weights = torch.ones_like(experience.old_logprobs)
        if method is not None:
            both = experience.old_logprobs, experience.rollout_logprobs
            weights, _ = importance_weights(*both, experience.mask, method, **bounds)
        pair = self.tree.probabilities(sampler)[self.rows].view(-1, 2).prod(1) * self.tree.prompts
        weights = weights * (pair.repeat_interleave(2) * len(self.rows) / 2)[:, None]
        experience = dataclasses.replace(experience, importance_weights=weights)
        self.models.weight.grad = None
        self.learner.accumulate(experience, partial(self.learner.evaluate, self.algorithm.loss))
        return -self.models.weight.grad

    def expected(self, sampler, method, **bounds):
        return self.gradient(self.experience(sampler), sampler, method, **bounds)

    def exact(self, weights=1.0):
        """∇ of E[R] over the policy, or of Σ π R with a constant weight of each completion."""
        objective = (self.tree.probabilities(self.logits) * self.tree.rewards * weights).sum()
        return torch.autograd.grad(objective, self.models.weight, retain_graph=True)[0]


def assert_far(x, y):
    assert (x - y).norm() > 0.05 * y.norm()


@pytest.mark.parametrize(
    ("algorithm", "options", "factor"),
    [
        ("reinforce", {"baseline": "none"}, 1.0),
        ("reinforce", {"baseline": "rloo"}, 1.0),
        ("reinforce", {"baseline": "grpo", "scale_rewards": "none"}, 0.5),  # in groups of two
        ("ppo", {"adv_estimator": "rloo"}, 1.0),
        ("reinforce", {"baseline": "learned"}, 1.0),
        ("actor_critic", {"lam": 1.0}, 1.0),
        ("ppo", {"lam": 1.0}, 1.0),
        ("npg", {"lam": 1.0}, 1.0),
        ("trpo", {"lam": 1.0}, 1.0),
        ("cpi", {"lam": 1.0}, 1.0),
        ("ppo", {"lam": 0.5}, None),  # biased by its critic, as on the policy's own samples
        ("ppo", {"ratio_level": "sequence", "adv_estimator": "reinforce_plus_plus"}, None),
        ("reinforce", {"baseline": "none", "loss_agg": "seq-mean-token-mean"}, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["sequence_ratio", "sequence_mask"])
def test_the_ratio_of_sequences_gives_the_gradient_of_the_policys_own_samples(algorithm, options, factor, method):
    off = Off(algorithm, **options)
    own = off.expected(off.logits.detach(), None)
    if factor is not None:
        torch.testing.assert_close(own, factor * off.exact(), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(off.expected(off.sampler, method, **UNBOUNDED), own, atol=1e-12, rtol=1e-9)
    assert_far(off.expected(off.sampler, None), own)


@pytest.mark.parametrize("method", ["truncate", "mask"])
@pytest.mark.parametrize("baseline", ["none", "rloo"])
def test_the_ratio_of_tokens_is_exact_on_bandits_within_its_bounds(method, baseline):
    off = Off(depth=1, baseline=baseline)
    ratios = (off.tree.token_logprobs(off.logits.detach()) - off.tree.token_logprobs(off.sampler)).exp()
    bounds = {"low": ratios.min().item() * 0.999, "high": ratios.max().item() * 1.001}
    torch.testing.assert_close(off.expected(off.sampler, method, **bounds), off.exact(), atol=1e-12, rtol=1e-9)
    assert_far(off.expected(off.sampler, None), off.exact())


@pytest.mark.parametrize("method", ["truncate", "mask"])
def test_the_ratio_of_tokens_corrects_the_choice_of_a_token_and_not_its_prefix(method):
    """With the policy's true advantages the gradient is Σ_s d(s) Σ_a ∇π(a|s) A(s, a), with d of the sampler."""
    off = Off(depth=3)
    experience = off.experience(off.sampler)
    experience.advantages = off.tree.advantages(off.logits.detach())[off.rows]
    found = off.gradient(experience, off.sampler, method, **UNBOUNDED)

    tree, states = off.tree, off.tree.states(off.tree.sequences)
    q = torch.zeros(tree.num_states, tree.vocab, dtype=torch.float64)  # A(s, a)
    true = tree.advantages(off.logits.detach())
    for row in range(len(tree.sequences)):
        for t in range(tree.depth):
            if tree.mask[row, t]:
                q[states[row, t], tree.sequences[row, 1 + t]] = true[row, t]
    surrogate = (tree.visits(off.sampler)[:, None] * off.logits.softmax(-1) * q).sum()
    (expected,) = torch.autograd.grad(surrogate, off.models.weight, retain_graph=True)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    assert_far(found, off.exact())


@pytest.mark.parametrize(("method", "depth"), [(m, 1 if m in ("truncate", "mask") else 3) for m in BOUNDS])
def test_bounds_leave_out_what_they_cut_and_no_more(method, depth):
    """The expectation is Σ π (w / ρ) R ∇log π; its bias is at most max |R ∇log π| · E_π[1 − w / ρ]."""
    off, biases = Off(depth=depth, gap=1.2, baseline="none"), []
    tree, (new, old) = off.tree, (off.tree.token_logprobs(x) for x in (off.logits.detach(), off.sampler))
    ratios = (new - old).sum(1).exp()
    probabilities = tree.probabilities(off.logits.detach())
    for low, high in ((0.9, 1.1), (0.6, 1.5), (0.2, 8.0)):
        kept = (ratios.clamp(max=high) / ratios).masked_fill(("mask" in method) & ((ratios < low) | (ratios > high)), 0)
        found = off.expected(off.sampler, method, low=low, high=high)
        torch.testing.assert_close(found, off.exact(kept), atol=1e-12, rtol=1e-9)

        largest = max(
            tree.rewards[row].item() * torch.autograd.grad(logprob, off.models.weight, retain_graph=True)[0].norm()
            for row, logprob in enumerate(tree.token_logprobs(off.logits).sum(1))
        )
        biases.append((found - off.exact()).norm())
        assert biases[-1] <= largest * (probabilities * (1 - kept)).sum() + 1e-12
    assert biases[0] > biases[1] > biases[2]
    assert_far(off.exact() + biases[0], off.exact())


def test_trust_regions_weigh_the_surrogate_and_not_the_kl():
    """What TRPO measures of its own step, against sums over states and completions."""
    off = Off("trpo", max_kl=0.01, loss_agg="token-mean", depth=3)
    experience = off.experience(off.sampler)
    both = experience.old_logprobs, experience.rollout_logprobs
    experience.importance_weights, _ = importance_weights(*both, experience.mask, "sequence_mask", 0.5, 2.0)
    assert not experience.importance_weights.all()
    before = off.logits.detach()
    metrics = off.algorithm.improve_policy(off.learner, experience)
    after = off.models.logits().detach()

    mask = experience.mask
    ratio = (off.tree.token_logprobs(after) - off.tree.token_logprobs(before))[off.rows].exp()
    gain = experience.importance_weights * (ratio - 1.0) * experience.advantages
    assert metrics["policy/improvement"] == pytest.approx(gain[mask].mean().item(), rel=1e-9)
    assert metrics["policy/improvement"] > 0
    kl = (before.softmax(-1) * (before.log_softmax(-1) - after.log_softmax(-1))).sum(-1)
    kl = kl[off.tree.states(off.tree.sequences)][off.rows]
    assert metrics["policy/kl"] == pytest.approx(kl[mask].mean().item(), rel=1e-9)
    assert 0.5 * 0.01 < metrics["policy/kl"] <= 0.01


def test_cpi_judges_its_greedy_policy_by_weighted_advantages():
    """Samples of another distribution with weights, against those of the policy; each completion stands for itself."""
    off = Off("cpi", depth=3)
    tree, policy = off.tree, off.logits.detach()
    greedy = policy + 200 * off.exact().T
    ratios = (tree.token_logprobs(greedy) - tree.token_logprobs(policy)).exp()
    advantages = tree.advantages(policy)
    own, other = (tree.probabilities(x)[:, None].expand_as(ratios) for x in (policy, off.sampler))
    weights, _ = importance_weights(
        tree.token_logprobs(policy), tree.token_logprobs(off.sampler), tree.mask, "sequence_ratio", high=1e9
    )
    scale = len(tree.sequences)
    assert policy_advantage(ratios, advantages, tree.mask, weights * other * scale) == pytest.approx(
        policy_advantage(ratios, advantages, tree.mask, own * scale), rel=1e-9
    )
    for step_size in (partial(bound_step_size, gamma=1.0), held_out_step_size):
        plain = step_size(ratios, advantages, tree.mask)
        assert step_size(ratios, advantages, tree.mask, torch.ones_like(ratios)) == plain > 0
        assert step_size(ratios, advantages, tree.mask, torch.zeros_like(ratios)) == 0
