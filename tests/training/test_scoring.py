"""What the models say of a rollout, against a float64 computation a sequence at a time; and evaluations."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import build_changed_config, make_tiny_model
from transformers import AutoModelForCausalLM

from fastppo.algorithms import ALGORITHMS
from fastppo.models import load_tokenizer
from fastppo.models.policy_models import PolicyModels
from fastppo.rollout.prompt import Prompt
from fastppo.rollout.sample import Rollout
from fastppo.training.rewards import RewardOutput, build_rewards
from fastppo.training.rng import rng_state
from fastppo.training.scoring import Scorer

TEMPERATURE = 0.7
PROMPTS, COMPLETIONS = (1, 5, 3, 5, 2, 4), (6, 1, 4, 6, 3, 2)  # tokens of each of 6 sequences


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model")


def letters(completions, **_):
    return [float(len(text)) for text in completions]


def make_scorer(model, *, num_values=None, algorithm=None, **changes):
    """A scorer whose policy and critic have moved from where they were loaded, unlike the reference."""
    tree = {
        "model": {"name_or_path": str(model)},
        "data": {"train": "unused.txt"},
        "rewards": [
            {"name": "letters", "function": f"{__file__}:letters", "weight": 0.5},
            {"name": "e", "function": f"{__file__}:count_e", "weight": 2.0},
        ],
        "rollout": {"num_prompts": 3, "num_generations": 2, "max_new_tokens": 6, "temperature": TEMPERATURE},
        "ppo": {"num_mini_batches": 1},
    }
    config = build_changed_config(tree, changes)
    models = PolicyModels(config.model, device=torch.device("cpu"), num_values=num_values)
    with torch.no_grad():
        for parameter in [*models.policy_parameters().values(), *models.value_parameters().values()]:
            parameter += 0.02 * torch.randn_like(parameter)
    rewards = build_rewards(config.rewards, device=models.device, model_defaults=config.model)
    return Scorer(config, load_tokenizer(config.model), models, rewards, algorithm)


def count_e(completions, **_):
    return [float(text.count("e")) for text in completions]


def make_rollout():
    """Random tokens, prompts padded on the left and completions on the right."""
    width, length = max(PROMPTS), max(COMPLETIONS)
    columns = torch.arange(width + length)
    before, after = width - torch.tensor(PROMPTS)[:, None], width + torch.tensor(COMPLETIONS)[:, None]
    real = (columns >= before) & (columns < after)
    sequences = torch.randint(3, 300, real.shape).masked_fill(~real, 0)
    count = len(PROMPTS)
    return Rollout(
        sequences,
        real.long(),
        real[:, width:],
        ["text"] * count,
        torch.ones(count).bool(),
        torch.arange(count) // 2,
        torch.zeros(real[:, width:].shape),
    )


def no_rewards(rollout):
    scores = torch.zeros(len(rollout.sequences))
    return RewardOutput(scores, scores[:, None], {"letters": 1.0}, {"letters": scores})


@torch.no_grad()
def by_hand(model, rollout, row):
    """One sequence in float64, without padding: log-probabilities [T, V] and the states [T, D] before the tokens."""
    model = copy.deepcopy(model).double()
    ids = rollout.sequences[row][rollout.attention_mask[row].bool()]
    before = model.model(ids[None]).last_hidden_state[0, PROMPTS[row] - 1 : -1]
    return (model.lm_head(before) / TEMPERATURE).log_softmax(-1), before


def oracle(scorer, rollout, estimator):
    """Every result of scoring, [B, T] in float64, 0 at padding."""
    models, shape = scorer.models, rollout.mask.shape
    reference = AutoModelForCausalLM.from_pretrained(scorer.config.model.name_or_path)
    result = {name: torch.zeros(shape, dtype=torch.float64) for name in ("old_logprobs", "ref_logprobs", "kl")}
    result["old_values"] = torch.zeros(*shape, *models.value.bias.shape, dtype=torch.float64)
    for row, count in enumerate(COMPLETIONS):
        logprobs, states = by_hand(models.policy, rollout, row)
        ref_logprobs, _ = by_hand(reference, rollout, row)
        tokens = rollout.sequences[row, -shape[1] :][:count]
        for t, token in enumerate(tokens.tolist()):
            old, ref = logprobs[t, token].item(), ref_logprobs[t, token].item()
            result["old_logprobs"][row, t], result["ref_logprobs"][row, t] = old, ref
            exact = (logprobs[t].exp() * (logprobs[t] - ref_logprobs[t])).sum().item()
            ratio = old - ref
            kl = {"k1": ratio, "k2": ratio**2 / 2, "k3": math.exp(-ratio) - 1 + ratio, "exact": exact}
            result["kl"][row, t] = kl[estimator]
        weight, bias = models.value.weight.detach().double(), models.value.bias.detach().double()
        result["old_values"][row, :count] = torch.einsum("td,...d->t...", states, weight) + bias
    return result


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "exact"])
@pytest.mark.parametrize("parts", [1, 3, 6])
def test_scores_are_those_of_a_float64_computation(model, estimator, parts):
    """In one part or in several; at padding everything is 0."""
    changes = {"ppo__kl_estimator": estimator, "ppo__gradient_accumulation_steps": parts}
    scorer, rollout = make_scorer(model, **changes), make_rollout()
    experience = scorer.score(rollout, no_rewards(rollout))
    expected = oracle(scorer, rollout, estimator)
    assert expected["kl"].abs().max() > 0.01  # else the policy still is the reference
    for name, values in expected.items():
        found = getattr(experience, name)
        assert found.dtype == torch.float32
        assert not found.requires_grad
        torch.testing.assert_close(
            found.double(), values, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )
        assert (found[~rollout.mask] == 0).all(), name
    assert experience.ref_hidden is None
    assert experience.rollout_logprobs is rollout.logprobs


@pytest.mark.parametrize("method", ["none", "truncate", "sequence_mask"])
def test_what_the_engine_sampled_with_is_compared_with_the_policy(model, method):
    bounds = {"rollout__correction_min": 0.8, "rollout__correction_max": 1.25} if method == "sequence_mask" else {}
    scorer, rollout = make_scorer(model, rollout__correction=method, **bounds), make_rollout()
    policy = oracle(scorer, rollout, "k1")["old_logprobs"]
    gap = (
        torch.linspace(-0.6, 0.9, rollout.mask.numel()).view(rollout.mask.shape).double().masked_fill(~rollout.mask, 0)
    )
    rollout = rollout._replace(logprobs=(policy - gap).float())
    experience = scorer.score(rollout, no_rewards(rollout))
    metrics, real = scorer.rollout_metrics(experience), gap[rollout.mask]
    expected = {"logprob_gap_mean": real.mean(), "logprob_gap_min": real.min(), "logprob_gap_max": real.max()}
    if method == "none":
        assert experience.importance_weights is None
    else:
        ratio, low, high = gap.exp(), 0.0, 2.0
        if method == "sequence_mask":
            ratio, low, high = gap.sum(1, keepdim=True).exp().expand_as(gap), 0.8, 1.25
        outside = (ratio > high) | (ratio < low)
        weights = ratio.clamp(max=high) if method == "truncate" else ratio.masked_fill(outside, 0.0)
        weights = weights.masked_fill(~rollout.mask, 0.0)
        torch.testing.assert_close(experience.importance_weights.double(), weights, rtol=1e-3, atol=1e-3)
        expected["importance_weight"] = weights[rollout.mask].mean()
        expected["corrected_fraction"] = outside[rollout.mask].double().mean()
        assert 0 < expected["corrected_fraction"] < 1
    assert metrics.keys() == {f"rollout/{name}" for name in expected}
    for name, value in expected.items():
        assert metrics[f"rollout/{name}"] == pytest.approx(value.item(), abs=1e-3)


def test_one_value_for_each_of_several_objectives(model):
    scorer, rollout = make_scorer(model, num_values=2), make_rollout()
    values = scorer.score(rollout, no_rewards(rollout)).old_values
    torch.testing.assert_close(values.double(), oracle(scorer, rollout, "k1")["old_values"], rtol=1e-4, atol=1e-4)
    assert (values[~rollout.mask] == 0).all()


def test_what_the_configuration_has_no_use_for_is_none(model):
    rollout = make_rollout()
    in_loss = make_scorer(model, ppo__kl_in="loss", ppo__kl_estimator="exact")
    assert in_loss.score(rollout, no_rewards(rollout)).ref_hidden.shape == (*rollout.mask.shape, 32)
    alone = make_scorer(model, num_values=0, model__reference="none", ppo__kl_coef=0.0)
    experience = alone.score(rollout, no_rewards(rollout))
    assert [experience.old_values, experience.kl, experience.ref_logprobs, experience.ref_hidden] == [None] * 4


@pytest.mark.parametrize(
    ("starts", "changes", "update_follows", "kept"),
    [
        (True, {}, True, 1),
        (False, {}, True, 0),
        (True, {}, False, 0),
        (True, {"ppo__gradient_accumulation_steps": 2}, True, 0),
        (True, {"model__gradient_checkpointing": True}, True, 0),
    ],
    ids=["kept", "another start", "no update", "two parts", "checkpointed"],
)
def test_the_pass_is_kept_for_an_update_that_starts_with_it(model, monkeypatch, starts, changes, update_follows, kept):
    scorer = make_scorer(model, algorithm=SimpleNamespace(update_starts_with_scored_pass=starts), **changes)
    keep, calls, rollout = scorer.models.hidden_before_update, [], make_rollout()
    monkeypatch.setattr(scorer.models, "hidden_before_update", lambda *a: (calls.append(1), keep(*a))[1])
    experience = scorer.score(rollout, no_rewards(rollout), update_follows=update_follows)
    assert len(calls) == kept
    assert (experience.old_values is not None) == update_follows


@pytest.mark.parametrize("name", ALGORITHMS)
def test_only_activations_that_the_update_begins_with_are_kept(model, name):
    """Counted as the tensors that autograd saves while a rollout is scored."""
    scorer, rollout, saved = make_scorer(model), make_rollout(), []
    scorer.config.algorithm = name
    algorithm = ALGORITHMS[name](scorer.config.algorithm_config)
    scorer = Scorer(scorer.config, scorer.tokenizer, scorer.models, scorer.rewards, algorithm)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(1), x)[1], lambda x: x):
        experience = scorer.score(rollout, no_rewards(rollout))
    if name in ("trpo", "npg", "cpi"):
        assert not saved
        return
    assert saved
    forwards = []
    scorer.models.policy.base_model.register_forward_hook(lambda *_: forwards.append(1))
    rows = torch.randperm(len(experience))
    batch = experience.sequences[rows], experience.attention_mask[rows], experience.mask.shape[1]
    scorer.models.hidden(*batch)  # as the update begins
    assert not forwards


def prompts(scorer):
    texts = ["The number 7 is", "My dog", "When I opened the package", "The weather"]
    return [Prompt(text, scorer.tokenizer(text)["input_ids"], {}) for text in texts]


def test_evaluation_leaves_the_generators_alone_and_repeats_itself(model):
    scorer = make_scorer(model)
    before, state = rng_state()
    first = scorer.evaluate(prompts(scorer))
    after, later = rng_state()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert state == later
    torch.rand(3)
    assert scorer.evaluate(prompts(scorer)) == first

    # Also if a reward fails.
    scorer.rewards = lambda *_, **__: 1 / 0
    torch.rand(3)
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        scorer.evaluate(prompts(scorer))
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_reports_weighted_rewards_lengths_and_kl(model, monkeypatch):
    scorer = make_scorer(model)
    seen, sample, score = [], scorer.sample, scorer.score
    monkeypatch.setattr(scorer, "sample", lambda *a: (seen.append(sample(*a)), seen[-1])[1])
    monkeypatch.setattr(scorer, "score", lambda *a, **k: (seen.append(score(*a, **k)), seen[-1])[1])
    phases = []
    metrics, rows = scorer.evaluate(prompts(scorer), phases.append)
    assert phases[0] == "sample 0/4"
    assert phases[-3:] == ["sample 4/4", "reward", "score"]
    rollout, experience = seen
    rewards = [0.5 * len(text) + 2.0 * text.count("e") for text in rollout.completions]
    mean = sum(rewards) / 4
    assert metrics["eval/reward"] == pytest.approx(mean)
    assert metrics["eval/reward_std"] == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in rewards) / 4))
    assert {f"{name}_std" for name in metrics if not name.endswith(("_std", "num_prompts"))} <= metrics.keys()
    lengths = torch.tensor([len(text) for text in rollout.completions], dtype=torch.float64)
    assert metrics["eval/letters_std"] == pytest.approx(lengths.std(correction=0).item())
    assert metrics["eval/letters"] == pytest.approx(sum(map(len, rollout.completions)) / 4)
    assert metrics["eval/length"] == pytest.approx(sum(map(sum, rollout.mask.tolist())) / 4)
    assert metrics["eval/kl"] == pytest.approx(sum(map(sum, experience.kl.tolist())) / 4, rel=1e-5)
    assert [row["reward"] for row in rows] == pytest.approx(rewards)
    assert [row["completion"] for row in rows] == rollout.completions
    assert rows[1]["prompt"] == "My dog"
    assert rows[0]["rewards"]["letters"] == len(rollout.completions[0])
