"""Metrics of a rollout's health, and the perplexity, against independent computations of their definitions."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from tiny import make_tiny_model

from fastppo.algorithms.experience import Experience
from fastppo.models import LMHead, load_tokenizer
from fastppo.models.config import ModelConfig
from fastppo.models.policy_models import PolicyModels
from fastppo.rollout.sample import Rollout
from fastppo.training.data import DataError
from fastppo.training.health import advantage_health, length_health, load_texts, perplexity, text_health


def rollout(completions: list[list[int]]) -> Rollout:
    width, prompt = max(map(len, completions)), [7, 7, 7]
    rows = [prompt + c + [0] * (width - len(c)) for c in completions]
    mask = torch.tensor([[i < len(c) for i in range(width)] for c in completions])
    fields = {"sequences": torch.tensor(rows), "mask": mask, "attention_mask": torch.ones(len(rows), 3 + width)}
    return Rollout(**fields, **dict.fromkeys(set(Rollout._fields) - set(fields)))


def test_variety_and_repetition_of_random_completions():
    completions = [[random.randrange(4) for _ in range(random.randrange(1, 12))] for _ in range(9)]
    completions += [[1] * 9, [2]]
    health = text_health(rollout(completions))
    for n in (1, 2):
        grams = Counter(str(c[i : i + n]) for c in completions for i in range(len(c) - n + 1))
        assert health[f"text/distinct_{n}"] == pytest.approx(len(grams) / grams.total())
    repeated = []
    for c in completions:
        starts = range(len(c) - 3)
        if len(starts) > 1:
            again = [any(c[j : j + 4] == c[i : i + 4] for j in range(i)) for i in starts]
            repeated.append(sum(again) / len(again))
    assert health["text/repetition"] == pytest.approx(sum(repeated) / len(repeated))


def test_too_short_completions_have_no_metric():
    assert text_health(rollout([[3], [3]])) == {"text/distinct_1": 0.5}
    assert text_health(rollout([[1, 1, 1, 1, 1], [2]]))["text/repetition"] == 0.5


def test_lengths():
    health = length_health(rollout([[1], [1, 2, 3]]))
    assert health == {"completion/length_std": 1.0, "completion/length_max": 3.0}


def experience(advantages: torch.Tensor, mask: torch.Tensor) -> Experience:
    shape = mask.shape
    blank = torch.zeros(shape)
    made = Experience(torch.zeros(shape), torch.zeros(shape), mask, old_logprobs=blank, scores=blank[:, 0])
    made.advantages = advantages
    return made


def test_extreme_advantage():
    advantages, mask = torch.randn(5, 7), torch.rand(5, 7) < 0.6
    mask[0, 0] = True
    advantages[0, 0] = 50.0
    values = advantages[mask].double().tolist()
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
    expected = max(abs(v - mean) for v in values) / deviation
    assert advantage_health(experience(advantages, mask))["advantage/extreme"] == pytest.approx(expected)
    same = torch.full((5, 7), 0.1)
    assert advantage_health(experience(same, mask)) == {"advantage/extreme": 0.0}
    assert advantage_health(experience(same, torch.zeros_like(mask))) == {}


@pytest.mark.parametrize("most_sequences", [1, 3, 50])
def test_perplexity_equals_that_of_the_models_own_loss(tmp_path, most_sequences):
    config = ModelConfig(name_or_path=str(make_tiny_model(tmp_path / "model", seed=random.randrange(1000))))
    tokenizer, models = load_tokenizer(config), PolicyModels(config, device=torch.device("cpu"))
    lines = ["The weather was bad.", "  ", "My new neighbor is quiet, but the dog\u2028barks.", "a" * 500, "x", "I"]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    texts = load_texts(str(tmp_path / "texts.txt"), tokenizer, context_length=models.context_length)
    assert max(map(len, texts)) == 128
    assert len(texts) == 3  # one of a single token predicts nothing
    total, count = 0.0, 0
    for ids in texts:
        logits = models.policy(torch.tensor([ids])).logits[0].double()
        total += torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item()
        count += len(ids) - 1
    arguments = {"pad": tokenizer.pad_token_id, "most_sequences": most_sequences, "device": torch.device("cpu")}
    assert perplexity(models.hidden, texts, **arguments) == pytest.approx(math.exp(total / count), rel=1e-4)
    assert perplexity(models.reference_hidden, texts, **arguments) == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(("state", "expected"), [(1e4, math.inf), (math.nan, math.nan)])
def test_a_perplexity_may_be_infinite_or_nan_and_is_not_the_one_for_the_other(state, expected):
    def hidden(ids, attention, length):
        return torch.full((len(ids), length, 1), state), LMHead(torch.tensor([[0.0], [1.0]]), None, 1.0, None)

    given = {"pad": 0, "most_sequences": 1, "device": torch.device("cpu"), "backend": "chunked"}
    assert perplexity(hidden, [[0, 0, 0]], **given) == pytest.approx(expected, nan_ok=True)


def test_texts_that_cannot_be_used_are_named(tmp_path):
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(make_tiny_model(tmp_path / "model"))))
    (tmp_path / "empty.txt").write_text(" \n\nx\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in {
        "none.txt": "none.txt cannot be read",
        "binary.txt": "cannot",
        "empty.txt": "no text",
    }.items():
        with pytest.raises(DataError, match=f"eval.perplexity: .*{message}"):
            load_texts(str(tmp_path / name), tokenizer, context_length=None)
