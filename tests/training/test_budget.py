"""A budget of tokens a pass changes no result: losses, gradients and metrics are those of counted sequences."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from tiny import build_changed_config, make_tiny_model

from fastppo.algorithms import ALGORITHMS
from fastppo.algorithms.learner import Learner, StepOutput
from fastppo.models import load_tokenizer
from fastppo.models.config import ModelConfig
from fastppo.models.policy_models import PolicyModels
from fastppo.rollout.sample import Rollout
from fastppo.training.config import ConfigError
from fastppo.training.inputs import Inputs
from fastppo.training.rewards import RewardOutput
from fastppo.training.scoring import Scorer

pytestmark = pytest.mark.slow  # half a minute together

BUDGETS = (256, 1000, 100_000)
LOSS_AGGS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def rollout():
    """Ragged sequences of up to 115 tokens, five to a prompt, 1,400 in all; one of them is masked as a whole."""
    generator = torch.Generator().manual_seed(3)
    widths = torch.tensor([30, 2, 55, 9]).repeat_interleave(5)
    lengths = torch.randint(1, 60, (20,), generator=generator)
    width, length = int(widths.max()), int(lengths.max())
    columns = torch.arange(width + length)
    real = (columns >= (width - widths)[:, None]) & (columns < (width + lengths)[:, None])
    prompts = torch.randint(3, 300, (4, width), generator=generator).repeat_interleave(5, 0)
    tokens = torch.cat([prompts, torch.randint(3, 300, (20, length), generator=generator)], 1).masked_fill(~real, 0)
    mask = real[:, width:].clone()
    mask[7] = False
    order = torch.randperm(20, generator=generator)
    ended = torch.ones(20, dtype=torch.bool)
    groups = torch.arange(4).repeat_interleave(5)
    return Rollout(
        tokens[order], real.long()[order], mask[order], [""] * 20, ended, groups[order], torch.zeros(mask.shape)
    )


def build(model, **changes):
    """The parts of a trainer that score and update, and the shapes of all inputs of the models."""
    tree = {
        "model": {"name_or_path": str(model)},
        "data": {"train": "unused.txt"},
        "rollout": {"num_prompts": 4, "num_generations": 5, "max_new_tokens": 64, "temperature": 0.8},
        "optim": {"max_grad_norm": None},
    }
    config = build_changed_config(tree, changes)
    algorithm = ALGORITHMS[config.algorithm](config.algorithm_config, temperature=0.8)
    torch.manual_seed(5)
    models = PolicyModels(config.model, device=torch.device("cpu"), num_values=None if algorithm.needs_values else 0)
    with torch.no_grad():
        for parameter in [*models.policy_parameters().values(), *models.value_parameters().values()]:
            parameter += 0.02 * torch.randn_like(parameter)  # away from the reference, and from a value of 0
    shapes = []
    for module in (models.policy, getattr(models.value, "backbone", None)):
        if module is not None:
            backbone = getattr(module, "base_model", module)
            backbone.register_forward_pre_hook(
                lambda _, args, given: shapes.append(given["input_ids"]), with_kwargs=True
            )
    scorer = Scorer(config, None, models, None, algorithm)  # which scoring does not use
    optimizer = torch.optim.SGD([*models.policy_parameters().values(), *models.value_parameters().values()], lr=1e-3)
    learner = Learner(
        models,
        optimizer,
        partial(algorithm.part_weight, max_new_tokens=64),
        num_mini_batches=config.algorithm_config.num_mini_batches,
        micro_batch_size=scorer.micro_batch_size,
        max_tokens=scorer.max_tokens,
    )
    return algorithm, learner, scorer, shapes


def score(algorithm, scorer, rollout):
    scores = torch.randn(20, generator=torch.Generator().manual_seed(1))
    experience = scorer.score(rollout, RewardOutput(scores, scores[:, None], {"x": 1.0}, {"x": scores}))
    scorer.models.drop_kept_pass()
    algorithm.estimate_advantages(experience)
    return experience


def gradients(model, rollout, **changes):
    """The experience, the metrics of a joint loss, and the gradients of all parameters, before the first step."""
    algorithm, learner, scorer, shapes = build(model, **changes)
    experience = score(algorithm, scorer, rollout)
    losses = [partial(learner.evaluate, algorithm.loss, with_values=True)]
    if scorer.models.critic_apart:
        losses = [partial(learner.evaluate, algorithm.loss), partial(learner._evaluate_critic, algorithm.loss)]
    metrics = learner.accumulate(experience, *losses)
    return experience, metrics, {name: p.grad for name, p in learner.parameters().items()}, shapes


def check_equal(given, expected):
    experience, metrics, grads, _ = given
    for field in dataclasses.fields(experience):
        ours, theirs = (getattr(one[0], field.name) for one in (given, expected))
        if isinstance(ours, torch.Tensor):
            if field.name == "ref_hidden":  # any numbers at padding
                ours, theirs = ours[experience.mask], theirs[experience.mask]
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda x, f=field: f"{f.name}: {x}")
    assert metrics.keys() == expected[1].keys()
    assert metrics == pytest.approx(expected[1], rel=1e-4, abs=1e-5)
    for name, gradient in expected[2].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("loss_agg", LOSS_AGGS)
@pytest.mark.parametrize("value_model", ["shared", "separate", "adapter"])
def test_losses_gradients_and_metrics_do_not_depend_on_the_budget(model, rollout, loss_agg, value_model):
    given = {"model__value_model": value_model, "ppo__loss_agg": loss_agg, "ppo__entropy_coef": 0.1}
    given |= {"ppo__kl_in": "loss", "ppo__kl_estimator": "exact", "ppo__kl_coef": 0.1}
    if value_model == "adapter":
        given["model__lora"] = {"r": 3}
    expected = gradients(model, rollout, **given)
    check_equal(gradients(model, rollout, **given, ppo__gradient_accumulation_steps=3), expected)
    passes = []
    for budget in BUDGETS:
        found = gradients(model, rollout, **given, batch__max_tokens=budget)
        check_equal(found, expected)
        assert found[1]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-6)
        assert found[1]["policy/ratio_min"] == pytest.approx(1.0, abs=1e-6)
        passes.append(len(found[3]))
    assert passes[0] >= 2.5 * passes[1] >= 2.5 * passes[2]


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_first_update_starts_at_a_ratio_of_one(model, rollout, budget):
    """Also of sequences that are equally long, of which a shuffled batch would make other passes."""
    algorithm, learner, scorer, _ = build(model, batch__max_tokens=budget, ppo__num_ppo_epochs=1)
    sequences = rollout.sequences[rollout.groups.argsort(), :75]  # completions of 20 tokens, which share their prompts
    mask = torch.ones(20, 20, dtype=torch.bool)
    whole = {"mask": mask, "attention_mask": torch.ones_like(sequences), "logprobs": torch.zeros(mask.shape)}
    experience = score(algorithm, scorer, rollout._replace(sequences=sequences, **whole))
    metrics = algorithm.update(learner, experience)
    assert metrics["policy/ratio_max"] == metrics["policy/ratio_min"] == 1.0


def test_where_padding_is_computed_it_counts(model, rollout):
    """With attention that takes no packed sequences."""
    expected = gradients(model, rollout)
    found = gradients(model, rollout, batch__max_tokens=256, model__attn_implementation="eager")
    check_equal(found, expected)
    assert max(shape.numel() for shape in found[3]) <= 256


def test_a_micro_batch_is_as_wide_as_its_longest_prompt_and_completion(model, rollout):
    """Also without a budget; the longest is computed first."""
    algorithm, learner, scorer, _ = build(model, ppo__gradient_accumulation_steps=20)
    experience = score(algorithm, scorer, rollout)
    parts = list(learner.micro_batches(experience))
    assert [part.sequences.shape[1] for part in parts] == sorted(rollout.attention_mask.sum(1).tolist(), reverse=True)
    for part in parts:
        assert part.attention_mask.all()
        assert part.old_values.shape == part.advantages.shape == part.mask.shape
        assert part.objective_scores.shape == (1, 1)


def test_no_pass_waits_for_the_one_before_it(model, rollout, monkeypatch):
    """On a GPU, the numbers of all passes are read once the last one is launched."""
    algorithm, learner, scorer, _ = build(model, batch__max_tokens=256)
    experience, weight, happened = score(algorithm, scorer, rollout), torch.ones((), requires_grad=True), []

    def evaluate(batch):
        happened.append("pass")
        return StepOutput(weight * batch.mask.sum(), {"loss/x": weight.detach(), "y_max": batch.advantages.max()})

    for name in ("item", "tolist"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, own=own: (happened.append("wait"), own(tensor))[1])
    metrics = learner.accumulate(experience, evaluate, evaluate)
    first, last = happened.index("pass"), len(happened) - happened[::-1].index("pass")
    assert last - first == happened.count("pass") > 4
    assert metrics["loss/x"] == pytest.approx(2.0)  # two passes of weight 1
    assert metrics["y_max"] == experience.advantages.max()


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "trpo", "trpo__cg_iterations": 3},
        {"algorithm": "npg", "npg__cg_iterations": 2, "npg__fisher_fraction": 0.5},
        {"algorithm": "cpi", "cpi__step_size": "bound", "cpi__num_greedy_epochs": 1},
        {"algorithm": "ppo", "ppo__num_mini_batches": 3, "model__value_model": "separate"},
    ],
    ids=lambda changes: changes["algorithm"],
)
def test_updates_do_not_depend_on_the_budget(model, rollout, changes):
    results = []
    for given in ({}, {"batch__max_tokens": 256}):
        algorithm, learner, scorer, _ = build(model, **changes, **given)
        experience = score(algorithm, scorer, rollout)
        before = {name: p.detach().clone() for name, p in learner.parameters().items()}
        torch.manual_seed(2)
        metrics = algorithm.update(learner, experience)
        results.append((metrics, {name: p.detach() - before[name] for name, p in learner.parameters().items()}))
    (metrics, expected), (others, found) = results
    assert metrics.keys() == others.keys()
    for name, value in metrics.items():
        assert others[name] == pytest.approx(value, rel=5e-3, abs=1e-5), name
    largest = max(change.abs().max().item() for change in expected.values())
    assert largest > 0
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-2, atol=2e-3 * largest, msg=name)


def test_a_budget_and_accumulation_exclude_each_other():
    given = {"model": {"name_or_path": "x"}, "data": {"train": "x"}, "ppo": {"gradient_accumulation_steps": 2}}
    with pytest.raises(
        ConfigError, match=r"^ppo\.gradient_accumulation_steps: must be 1 with batch\.max_tokens, which"
    ):
        build_changed_config(given, {"batch__max_tokens": 100})


@pytest.mark.parametrize(("budget", "texts"), [(13, False), (14, False), (20, True), (21, True)])
def test_a_sequence_that_cannot_fit_is_refused_before_models_are_loaded(model, tmp_path, budget, texts):
    """The prompts that there are decide, not the longest that would be allowed."""
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(model)))
    words = {length: "x" * length for length in (6, 21)}
    assert [len(tokenizer(text)["input_ids"]) for text in words.values()] == [6, 21]
    (tmp_path / "prompts.txt").write_text(f"x\n{words[6]}\nxxx\n")
    (tmp_path / "texts.txt").write_text(f"xx\n{words[21]}\n")
    given = {
        "model": {"name_or_path": str(model)},
        "data": {"train": str(tmp_path / "prompts.txt"), "eval_size": 1},
        "eval": {"perplexity": str(tmp_path / "texts.txt") if texts else None},
        "rollout": {"max_new_tokens": 8},
    }
    load = partial(Inputs, build_changed_config(given, {"batch__max_tokens": budget}), device=torch.device("cpu"))
    if budget in (14, 21):
        load(rewards=[lambda prompts, completions: [0.0] * len(prompts)])
    else:
        why = "the longest text of eval.perplexity" if texts else "a prompt of 6 tokens and rollout.max_new_tokens 8"
        with pytest.raises(ConfigError) as caught:
            load(rewards=[lambda prompts, completions: [0.0] * len(prompts)])
        assert str(caught.value) == (
            f"batch.max_tokens: {budget} tokens are less than one sequence can have, {budget + 1} ({why}); set it to "
            f"{budget + 1} or more"
        )
