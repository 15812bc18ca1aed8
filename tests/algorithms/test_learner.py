"""The learner: gradient accumulation, optimizer steps, early stops, and what a NaN may touch."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tabular import TabularModels, Tree, make_config, make_learner

from fastppo.algorithms.learner import Learner, NonFiniteError, StepOutput

LOSS_AGGS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


class SharedBackbone(TabularModels):
    """A critic that is linear in the policy's features, as a value head on the policy's backbone is."""

    def values(self, hidden, sequences, attention_mask, num_completion):
        return hidden @ self.value[: hidden.shape[-1]]


def world(name="ppo", *, cls=TabularModels, sequences=12, optimizer=None, lr=0.1, **options):
    """Models with trained features, the algorithm, a learner, and an experience of distinct sequences; float64."""
    tree = Tree(prompts=3, vocab=4, depth=3, eos=True)
    models = cls(tree, features=4)
    parameters = [*models.policy_parameters().values(), *models.value_parameters().values()]
    optimizer = optimizer(parameters, lr=lr) if optimizer else None
    algorithm, learner = make_learner(models, make_config(name, sequences, 3, **options), optimizer, lr=lr)
    experience = models.experience(torch.randperm(len(tree.sequences))[:sequences])
    algorithm.estimate_advantages(experience)
    return models, algorithm, learner, experience


def copies(learner):
    return {name: p.detach().clone() for name, p in learner.parameters().items()}


def state_of(optimizer):
    """Every number an optimizer holds, in order."""
    return [torch.as_tensor(x).clone() for state in optimizer.state.values() for x in state.values()]


def unchanged(before, learner):
    return all(torch.equal(before[name], p) for name, p in learner.parameters().items())


# Accumulation


@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
@pytest.mark.parametrize("size", [1, 5])
def test_micro_batches_add_up_to_the_gradient_of_one_batch(loss_agg, size):
    """Completions of different lengths, one of them without a token, in parts that do not divide the batch."""
    _, algorithm, learner, experience = world(loss_agg=loss_agg, entropy_coef=0.1, kl_coef=0.2, kl_in="loss")
    experience.old_logprobs = experience.old_logprobs + 0.2 * torch.randn_like(experience.old_logprobs)
    experience.mask[4] = False
    learner.micro_batch_size = len(experience)
    evaluate = partial(learner.evaluate, algorithm.loss, with_values=True)
    loss, whole = evaluate(experience)
    expected = torch.autograd.grad(loss, list(learner.parameters().values()))

    learner.micro_batch_size = size
    metrics = learner.accumulate(experience, evaluate)
    for (name, parameter), gradient in zip(learner.parameters().items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14, msg=name)
        assert gradient.abs().max() > 0
    for name in ("loss/policy", "loss/value", "policy/entropy", "policy/clip_fraction", "policy/ratio_max"):
        assert metrics[name] == pytest.approx(whole[name].item()), name


def test_a_critic_apart_has_passes_of_its_own():
    """One epoch by turns moves policy and critic as a joint loss does, with the same metrics."""
    results, given = [], []
    for apart in (False, True):
        torch.manual_seed(0)
        models, algorithm, learner, experience = world(entropy_coef=0.1, num_mini_batches=2, vf_coef=0.3)
        models.critic_apart, learner.micro_batch_size = apart, 4
        loss = algorithm.loss
        algorithm.loss = lambda *x, loss=loss: given.append((x[1] is not None, x[3] is not None)) or loss(*x)
        metrics = algorithm.update(learner, experience)
        results.append((copies(learner), metrics))
    (joint, metrics), (turns, others) = results
    assert set(given[: len(given) // 3]) == {(True, True)}
    assert set(given[len(given) // 3 :]) == {(True, False), (False, True)}
    assert metrics.keys() == others.keys()
    assert metrics == pytest.approx(others)
    for name, parameter in joint.items():
        torch.testing.assert_close(turns[name], parameter, rtol=1e-12, atol=1e-14, msg=name)


def test_what_stands_on_padding_is_no_target():
    """A pad token that was added to the tokenizer has no logit."""
    experience = world()[3]
    experience.mask = torch.arange(3) < torch.randint(4, (len(experience), 1))
    tokens = experience.sequences[:, 1:]
    expected = tokens.masked_fill(~experience.mask, -100)
    tokens[~experience.mask] = 10**6
    assert experience.targets.equal(expected)


def test_the_norm_is_the_longest_completion_that_is_allowed():
    """A batch whose longest completion is shorter than max_new_tokens: token sums over max_new_tokens."""
    gradients = {}
    models, _, learner, experience = world()
    for loss_agg in ("seq-mean-token-sum", "seq-mean-token-sum-norm"):
        algorithm, _ = make_learner(models, make_config("ppo", 12, 3, loss_agg=loss_agg))
        part_weight = partial(algorithm.part_weight, max_new_tokens=7)
        again = Learner(models, learner.optimizer, part_weight, num_mini_batches=1, micro_batch_size=5)
        gradients[loss_agg], _ = again.gradient(
            experience, lambda *given, a=algorithm: StepOutput(a.loss(*given)[0], {})
        )
    for name, summed in gradients["seq-mean-token-sum"].items():
        torch.testing.assert_close(gradients["seq-mean-token-sum-norm"][name], summed / 7)
        assert summed.abs().max() > 0


@pytest.mark.parametrize(
    ("loss_agg", "weights"),
    [
        ("token-mean", (4 / 6, 2 / 6, 0.0)),
        ("seq-mean-token-mean", (2 / 3, 1 / 3, 0.0)),
        ("seq-mean-token-sum", (2 / 3, 1 / 3, 0.0)),
        ("seq-mean-token-sum-norm", (2 / 3 * 3 / 5, 1 / 3 * 3 / 5, 0.0)),
    ],
)
def test_a_part_weighs_its_tokens_or_its_sequences(loss_agg, weights):
    _, algorithm, _, whole = world(loss_agg=loss_agg, sequences=4)
    whole.mask = torch.arange(3) < torch.tensor([[3], [1], [2], [0]])
    parts = [whole.select(torch.tensor(rows)) for rows in ([0, 1], [2], [3])]
    assert [algorithm.part_weight(part, whole, 5) for part in parts] == pytest.approx(weights)


def test_metrics_are_folded_over_parts_and_steps():
    """Weighted means by tokens, losses by their own weight, extremes of extremes."""
    _, _, learner, experience = world(sequences=8)
    learner.num_mini_batches, learner.micro_batch_size = 2, 2
    seen = []

    def loss(batch, hidden, head, values, ref_head):
        x = torch.randn(4, dtype=torch.float64)
        seen.append((len(batch), int(batch.mask.sum()), x))
        named = dict(zip(("loss/x", "x", "x_min", "x_max"), x, strict=True))
        return StepOutput(0.0 * head.weight.sum(), named)

    learner._part_weight = lambda part, whole: len(part) / len(whole)  # unlike a share of tokens
    metrics = learner.descend(experience, loss, num_epochs=1)
    assert len(seen) == 4
    steps = [seen[:2], seen[2:]]
    means = [sum(n * x[0] for n, _, x in step) / 4 for step in steps]
    assert metrics["loss/x"] == pytest.approx(sum(means).item() / 2)
    means = [sum(t * x[1] for _, t, x in step) / sum(t for _, t, _ in step) for step in steps]
    assert metrics["x"] == pytest.approx(sum(means).item() / 2)
    assert metrics["x_min"] == min(x[2].item() for *_, x in seen)
    assert metrics["x_max"] == max(x[3].item() for *_, x in seen)
    assert metrics["grad_norm"] == 0.0


def test_gradient_and_measure_move_nothing():
    models, algorithm, learner, experience = world("npg")
    learner.micro_batch_size = 5
    before = copies(learner)
    gradient, metrics = learner.gradient(experience, algorithm.loss)
    hidden, head = models.hidden(experience.sequences, experience.attention_mask, 3)
    loss = algorithm.loss(experience, hidden, head, None, None).loss
    expected = torch.autograd.grad(loss, list(models.policy_parameters().values()))
    for ours, exact in zip(gradient.values(), expected, strict=True):
        torch.testing.assert_close(ours, exact)
    assert metrics["loss/surrogate"] == pytest.approx(loss.item())
    other = {"head": torch.randn_like(models.weight)}
    measured = learner.measure(experience, algorithm.loss, other)
    with torch.no_grad():
        hidden, head = models.hidden(experience.sequences, experience.attention_mask, 3, other)
        there = algorithm.loss(experience, hidden, head, None, None).loss.item()
    assert measured["loss/surrogate"] == pytest.approx(there)
    assert abs(there - loss.item()) > 1e-6
    assert unchanged(before, learner)
    assert not learner.changed
    assert all(p.grad is None for p in learner.parameters().values())


# Optimizer steps


@pytest.mark.parametrize("target_kl", [None, 0.1, 0.9])
def test_the_epochs_end_before_a_step_that_is_too_far(target_kl):
    models, _, learner, experience = world(lr=0.1)
    learner.num_mini_batches = 2
    given = iter([0.0, 0.05, 0.5, 0.0, 0.0, 0.0])

    def loss(batch, hidden, head, values, ref_head):
        return StepOutput(head.weight.sum(), {"policy/approx_kl": torch.tensor(next(given))})

    start = models.weight.detach().clone()
    metrics = learner.descend(experience, loss, num_epochs=3, target_kl=target_kl)
    steps = 2 if target_kl == 0.1 else 6
    torch.testing.assert_close(models.weight.detach(), start - 0.1 * steps)
    assert len(list(given)) == (3 if steps == 2 else 0)
    assert metrics.get("policy/stopped_early") == {None: None, 0.1: 1.0, 0.9: 0.0}[target_kl]
    assert metrics["policy/approx_kl"] == pytest.approx(0.55 / (3 if steps == 2 else 6))
    assert all(p.grad is None for p in learner.parameters().values())


@pytest.mark.parametrize("loss_value", [1.0, math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_no_early_stop(loss_value):
    _, _, learner, experience = world()

    def loss(batch, hidden, head, values, ref_head):
        metrics = {"policy/approx_kl": torch.tensor(9.0), "loss/policy": torch.tensor(loss_value)}
        return StepOutput(head.weight.sum(), metrics)

    descend = partial(learner.descend, experience, loss, num_epochs=2, target_kl=0.1)
    if math.isfinite(loss_value):
        assert descend()["policy/stopped_early"] == 1.0
    else:
        with pytest.raises(NonFiniteError, match=rf"epoch 1: not finite \(loss/policy {loss_value}, gradient norm"):
            descend()
    assert not learner.changed


def test_a_mini_batch_without_a_token_moves_nothing():
    """Also where the one before it was skipped for a NaN, and with a bound on the KL, of which it has none."""
    _, algorithm, learner, experience = world(sequences=2)
    learner.num_mini_batches, learner.on_nonfinite = 2, "skip"
    torch.manual_seed(0)
    first, last = torch.randperm(2).tolist()
    experience.mask[last] = False
    for loss, skipped in ((algorithm.loss, None), (spoilt(algorithm, experience, first, "nan"), 1)):
        torch.manual_seed(0)
        metrics = learner.descend(experience, loss, num_epochs=1, target_kl=1e9)
        assert metrics.get("policy/skipped_steps") == skipped
        assert metrics["policy/stopped_early"] == 0.0


@pytest.mark.parametrize("max_grad_norm", [None, 0.25])
def test_the_gradient_is_clipped_to_its_norm(max_grad_norm):
    models, _, learner, experience = world(lr=1.0)
    learner.max_grad_norm = max_grad_norm
    start = models.weight.detach().clone()

    def loss(batch, hidden, head, values, ref_head):
        return StepOutput(3.0 * head.weight.sum(), {})

    metrics = learner.descend(experience, loss, num_epochs=1)
    norm = 3.0 * models.weight.numel() ** 0.5
    assert metrics["grad_norm"] == pytest.approx(norm)
    assert (models.weight - start).norm().item() == pytest.approx(max_grad_norm or norm, rel=1e-4)
    assert learner.changed


class _NaNGradient(torch.autograd.Function):
    """Nothing is wrong with the value; its gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * math.nan


def spoilt(algorithm, experience, row, where):
    """The algorithm's loss, whose value, reported loss or gradient is not finite where sequence `row` is."""
    worst = experience.sequences[row]

    def loss(batch, *given):
        value, metrics = algorithm.loss(batch, *given)
        tokens = F.pad(batch.sequences, (0, len(worst) - batch.sequences.shape[1]))  # after its end, they are 0
        if (tokens == worst).all(1).any():
            if where == "gradient":
                value = _NaNGradient.apply(value)
            elif where == "loss":
                metrics = metrics | {"loss/policy": torch.tensor(math.nan)}
            else:
                value = value * (math.nan if where == "nan" else math.inf)
                metrics = metrics | {"loss/policy": value.detach()}
        return StepOutput(value, metrics)

    return loss


@pytest.mark.parametrize("where", ["nan", "inf", "loss", "gradient"])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_one_bad_micro_batch_touches_neither_parameters_nor_optimizer(where, on_nonfinite):
    _, algorithm, learner, experience = world(optimizer=torch.optim.Adam)
    learner.descend(experience, algorithm.loss, num_epochs=1)  # the optimizer now has a state
    learner.changed, learner.on_nonfinite, learner.where, learner.micro_batch_size = False, on_nonfinite, "step 8", 1
    told = []
    learner._warn = told.append
    before, state = copies(learner), state_of(learner.optimizer)
    assert len(state) > 0
    descend = partial(learner.descend, experience, spoilt(algorithm, experience, 3, where))
    if on_nonfinite == "stop":
        with pytest.raises(NonFiniteError, match=r"step 8, epoch 1: not finite \(loss/policy"):
            descend(num_epochs=2)
    else:
        metrics = descend(num_epochs=2)
        assert metrics["policy/skipped_steps"] == 2
        assert "grad_norm" not in metrics
        assert len(told) == 2
        assert "step 8, epoch 2: not finite" in told[1]
        assert "this optimizer step is skipped" in told[1]
        assert ("first non-finite gradient in " in told[1]) == (where != "loss")
    assert unchanged(before, learner)
    assert not learner.changed
    assert all(torch.equal(a, b) for a, b in zip(state, state_of(learner.optimizer), strict=True))


def test_a_skipped_step_leaves_the_next_one_as_if_it_had_not_been():
    """Of two mini-batches one is bad: the result is that of the other alone."""
    _, algorithm, learner, experience = world(optimizer=partial(torch.optim.SGD, momentum=0.9))
    learner.on_nonfinite, learner.num_mini_batches = "skip", 2
    before, seed = copies(learner), int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    (good,) = (rows for rows in torch.randperm(12).tensor_split(2) if 0 not in rows)
    torch.manual_seed(seed)
    metrics = learner.descend(experience, spoilt(algorithm, experience, 0, "nan"), num_epochs=1)
    assert metrics["policy/skipped_steps"] == 1
    after = copies(learner)
    assert not unchanged(before, learner)

    learner.optimizer.state.clear()
    learner.num_mini_batches = 1
    with torch.no_grad():
        for name, parameter in learner.parameters().items():
            parameter.copy_(before[name])
    learner.descend(experience.select(good), algorithm.loss, num_epochs=1)
    for name, parameter in learner.parameters().items():
        torch.testing.assert_close(parameter.detach(), after[name])


def test_moments_of_the_policy_alone_are_forgotten():
    models, algorithm, learner, experience = world(optimizer=torch.optim.Adam)
    learner.descend(experience, algorithm.loss, num_epochs=4)
    kept = {name: tensor.clone() for name, tensor in learner.optimizer.state[models.value].items()}
    assert all(p in learner.optimizer.state for p in models.policy_parameters().values())
    learner.forget_policy_moments()
    assert not any(p in learner.optimizer.state for p in models.policy_parameters().values())
    assert all(torch.equal(tensor, learner.optimizer.state[models.value][name]) for name, tensor in kept.items())
    learner.descend(experience, algorithm.loss, num_epochs=1)
    assert {int(learner.optimizer.state[p]["step"]) for p in models.policy_parameters().values()} == {1}
    assert int(learner.optimizer.state[models.value]["step"]) == 5


# Policy and critic


def test_the_critic_alone_leaves_a_shared_backbone_untouched():
    models, algorithm, learner, experience = world(cls=SharedBackbone, cliprange_value=None)
    learner.num_mini_batches = 2
    policy = {name: p.detach().clone() for name, p in models.policy_parameters().items()}
    value = models.value.detach().clone()
    grads = []
    step = learner.optimizer.step
    learner.optimizer.step = lambda: (grads.extend(p.grad for p in models.policy_parameters().values()), step())
    losses = [learner.descend_values(experience, algorithm.value_loss, num_epochs=10)["loss/value"] for _ in range(2)]
    assert losses[1] < losses[0]
    assert grads == [None] * len(grads)
    assert len(grads) == 80
    assert all(torch.equal(p, policy[name]) for name, p in models.policy_parameters().items())
    assert not torch.equal(models.value, value)
    # The joint descent does reach it: there would be nothing to keep out otherwise.
    learner.descend(experience, algorithm.loss, num_epochs=1)
    assert not torch.equal(models.features, policy["features"])


def test_the_policy_alone_does_without_values(monkeypatch):
    models, algorithm, learner, experience = world()
    monkeypatch.setattr(models, "values", None)
    before = copies(learner)
    metrics = learner.descend(experience, algorithm.loss, num_epochs=1, with_values=False)
    assert "loss/value" not in metrics
    assert torch.equal(models.value, before["value.table"])
    assert not torch.equal(models.weight, before["head"])


def test_loading_copies_into_the_same_tensors():
    models, _, learner, _ = world()
    own, features = learner.policy_parameters()["head"], models.features.detach().clone()
    given = torch.randn_like(models.weight)
    learner.load_policy({"head": given})
    assert learner.changed
    assert learner.policy_parameters()["head"] is own
    assert torch.equal(own, given)
    assert torch.equal(models.features, features)
    given.zero_()
    assert own.abs().max() > 0
    assert own.requires_grad
    with pytest.raises(KeyError):
        learner.load_policy({"none": given})


def test_a_snapshot_is_in_the_order_of_the_sequences():
    models, _, learner, experience = world()
    learner.micro_batch_size = 5
    other = {name: torch.randn_like(p) for name, p in models.policy_parameters().items()}
    for parameters in (None, other):
        hidden, head = learner.snapshot(experience, parameters)
        whole, expected = models.hidden(experience.sequences, experience.attention_mask, 3, parameters)
        assert torch.equal(hidden[experience.mask], whole[experience.mask])
        assert torch.equal(head.weight, expected.weight)
        assert not hidden.requires_grad
