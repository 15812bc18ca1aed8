"""Rewards: how functions are called, how their results are combined, and how invalid ones are reported."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_tiny_tokenizer

from fastppo.training.config import ModelConfig, RewardConfig
from fastppo.training.rewards import Reward, RewardError, RewardFunctions, build_rewards
from fastppo.training.rewards.functions import RunningNormalizer
from fastppo.training.rewards.load import find_function

PROMPTS = ["What is", "Where is", "Who is"]
COMPLETIONS = [" this?", " that nice place?", " it"]


def length(completions):
    return [len(text) for text in completions]


def _score(function, columns=None):
    return RewardFunctions([Reward("mine", function)])(PROMPTS, COMPLETIONS, columns or {})


# ---- calling


def test_total_is_the_weighted_sum_and_each_reward_is_kept_raw():
    rewards = RewardFunctions(
        [Reward("length", length, weight=0.5), Reward("index", lambda prompts: range(len(prompts)), weight=-2.0)]
    )
    output = rewards(PROMPTS, COMPLETIONS, {})
    assert output.by_name["length"].tolist() == [6, 17, 3]
    assert output.by_name["index"].tolist() == [0, 1, 2]
    assert output.total.tolist() == [3.0, 6.5, -2.5]
    assert output.total.dtype == output.by_name["index"].dtype == torch.float32
    empty = rewards([], [], {})
    assert empty.total.shape == empty.by_name["length"].shape == (0,)


def test_functions_get_the_arguments_they_name():
    seen = {}

    def some(prompts, *, answer, missing="default"):
        seen["some"] = (prompts, answer, missing)
        return [0] * len(prompts)

    def everything(completions, **rest):
        seen["everything"] = (completions, rest)
        return [0] * len(completions)

    class Callable:
        def __call__(self, completions, answer):
            seen["object"] = (completions, answer)
            return [0] * len(completions)

    columns = {"answer": [1, 2, 3], "topic": ["a", "b", "c"]}
    rewards = build_rewards([some, everything, Callable()])
    rewards.check_columns(columns)
    rewards(PROMPTS, COMPLETIONS, columns)
    assert seen["some"] == (PROMPTS, [1, 2, 3], "default")
    assert seen["everything"] == (COMPLETIONS, {"prompts": PROMPTS, **columns})
    assert seen["object"] == (COMPLETIONS, [1, 2, 3])


def test_missing_columns_are_found_before_a_step():
    def needs(completions, answers):
        return [0] * len(completions)

    rewards = RewardFunctions([Reward("exact", needs)])
    with pytest.raises(RewardError, match=r"reward 'exact': its function needs 'answers'; did you mean 'answer'\?"):
        rewards.check_columns(["answer"])
    with pytest.raises(RewardError, match="it can have, by name: prompts, completions, completion_ids, id"):
        rewards.check_columns(["id"])
    with pytest.raises(RewardError, match="needs 'texts'"):
        _score(lambda texts, /: [0] * 3)


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.5, True],
        (1, 2.5, 1),
        np.array([1, 2.5, 1], dtype=np.float32),
        torch.tensor([1, 2.5, 1], dtype=torch.bfloat16),
        [torch.tensor(1.0), np.float64(2.5), np.int64(1)],
        iter([1, 2.5, 1]),
    ],
    ids=["list", "tuple", "array", "tensor", "scalars", "iterator"],
)
def test_results_of_many_kinds(result):
    assert _score(lambda completions: result).total.tolist() == [1, 2.5, 1]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "returned NoneType, expected a list of 3 numbers"),
        (1.0, "returned float, expected a list of 3 numbers"),
        (torch.tensor(1.0), "returned float, expected a list of 3 numbers"),
        ("123", "returned str, expected a list"),
        ({"a": 1, "b": 2, "c": 3}, "returned dict"),
        ([1, 2], "returned 2 numbers for 3 completions"),
        ([1, float("nan"), 2], r"gave nan for completion 1, ' that nice place\?', expected a finite number"),
        ([1, 2, float("-inf")], "gave -inf for completion 2"),
        ([1e39, 2, 3], r"gave 1e\+39 for completion 0"),
        ([1, "2", 3], "gave '2' for completion 1"),
        ([1, 2, None], "gave None for completion 2"),
        ([1, 1j, 2], "gave 1j for completion 1"),
        ([1, 10**400, 2], "expected a finite number"),
        (torch.ones(3, 2), r"gave \[1\.0, 1\.0\] for completion 0"),
        ([1, torch.ones(2), 2], "for completion 1"),
    ],
)
def test_results_that_are_no_rewards(result, message):
    with pytest.raises(RewardError, match=f"reward 'mine' {message}" if message[0] in "rg" else message) as caught:
        _score(lambda completions: result)
    assert "\n" not in str(caught.value)


def test_a_long_completion_is_shortened_in_messages():
    rewards = RewardFunctions([Reward("mine", lambda completions: [float("inf")])])
    with pytest.raises(RewardError) as caught:
        rewards(["p"], ["x" * 5000], {})
    assert len(str(caught.value)) < 200


def test_an_exception_comes_with_its_cause_and_line():
    def helper(text):
        return int(text)

    def broken(completions):
        return [helper(text) for text in completions]

    with pytest.raises(RewardError, match=r"reward 'mine' raised ValueError: .*test_rewards\.py, line \d+: return int"):
        _score(broken)
    with pytest.raises(RewardError) as caught:
        _score(broken)
    assert isinstance(caught.value.__cause__, ValueError)

    def deep(completions):
        return json.loads("{")

    with pytest.raises(RewardError, match=r"line \d+: return json\.loads"):
        _score(deep)

    class Decorated:
        @torch.no_grad()
        def __call__(self, completions):
            return [int(text) for text in completions]

    with pytest.raises(RewardError, match=r"test_rewards\.py, line \d+: return \[int"):
        _score(Decorated())

    def generator(completions):
        for text in completions:
            yield int(text)

    with pytest.raises(RewardError, match=r"reward 'mine' raised ValueError: .*line \d+: yield int"):
        _score(generator)


class FailingError(Exception):
    def __str__(self):
        raise RuntimeError


class Odd:
    def __repr__(self):
        raise RuntimeError

    def __getattr__(self, name):
        raise OSError


def raises(error):
    def reward(completions):
        raise error

    return reward


async def coroutine(completions):
    return [0.0] * len(completions)


async def stream(completions):
    yield 0.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (raises(SystemExit(3)), "raised SystemExit: 3 "),
        (raises(asyncio.CancelledError()), "raised CancelledError "),
        (raises(BaseException("mine")), "raised BaseException: mine "),
        (raises(RecursionError("deep")), "raised RecursionError: deep "),
        (raises(MemoryError()), "raised MemoryError "),
        (raises(ValueError("two\nlines\0" + "x" * 10**6)), r"raised ValueError: two lines\\x00xxx"),
        (raises(FailingError()), "raised FailingError "),
        (coroutine, "returned coroutine, expected a list of 3 numbers; write it without async "),
        (stream, "returned async_generator, expected a list of 3 numbers; write it without async "),
        (lambda completions: itertools.count(), "returned more than 3 numbers for 3 completions "),
        (lambda completions: {1.0, 2.0, 3.0}, "returned set, "),
        (lambda completions: np.zeros((3, 2)), r"gave \[0.0, 0.0\] for completion 0, "),
        (lambda completions: torch.zeros(3, device="meta"), "raised NotImplementedError: "),
        (lambda completions: [torch.zeros((), device="meta")] * 3, "gave tensor"),
        (lambda completions: torch.zeros(3, dtype=torch.complex64), "gave 0j for completion 0, "),
        (lambda completions: np.array(["a", "b", "c"]), "gave 'a' for completion 0"),
        (lambda completions: [Odd()] * 3, "gave <Odd instance at "),
        (lambda completions: [[[0]]] * 3, r"gave \[\[0\]\] for completion 0"),
        (lambda completions: ["x" * 10**6] * 3, "gave 'xxx"),
    ],
)
def test_whatever_a_function_does_is_one_line_with_its_place(function, message):
    with pytest.raises(RewardError, match=f"^reward 'mine' {message}") as caught:
        _score(function)
    text = str(caught.value)
    assert re.search(r" \(test_rewards\.py, line \d+", text)
    assert text.isprintable()
    assert len(text) < 400


class Endless:
    """Its signature is code that fails, and unwrapping its call never ends."""

    def __call__(self, prompts, completions):
        return 3

    @property
    def __signature__(self):
        raise RuntimeError

    __call__.__wrapped__ = __call__


def test_a_function_without_a_place():
    with pytest.raises(RewardError, match=r"^reward 'mine' returned int, expected a list of 3 numbers$"):
        _score(Endless())


def test_ctrl_c_in_a_reward_stops_the_run():
    with pytest.raises(KeyboardInterrupt):
        _score(raises(KeyboardInterrupt()))


def test_a_function_that_changes_its_arguments_changes_nothing_for_others():
    def changes(prompts, completions, completion_ids, answer):
        for row in (*completion_ids, *answer):
            row.clear()
        for values in (prompts, completions, answer):
            values.clear()
        return [0.0] * 3

    def sizes(completions, completion_ids, answer):
        return [
            len(text) + 100 * len(ids) + 1000 * len(a)
            for text, ids, a in zip(completions, completion_ids, answer, strict=True)
        ]

    given = list(PROMPTS), list(COMPLETIONS), {"answer": [["x"], ["y", "z"], []]}
    rewards = RewardFunctions([Reward("changes", changes), Reward("sizes", sizes)])
    ids = [[1], [2, 3], [4]]
    assert rewards(*given, completion_ids=ids).total.tolist() == [1106.0, 2217.0, 103.0]
    assert given == (PROMPTS, COMPLETIONS, {"answer": [["x"], ["y", "z"], []]})
    assert ids == [[1], [2, 3], [4]]
    # Too few values are refused although the function shortened the list that they are counted by.
    rewards = RewardFunctions([Reward("empties", lambda completions: completions.clear() or completions)])
    with pytest.raises(RewardError, match="returned 0 numbers for 3 completions"):
        rewards(*given)


def test_inputs_of_unequal_length_are_refused():
    rewards = RewardFunctions([Reward("length", length)])
    with pytest.raises(ValueError, match="completions has 1 values, but there are 2 prompts"):
        rewards(["a", "b"], ["c"], {})
    with pytest.raises(ValueError, match="answer has 3"):
        rewards(["a", "b"], ["c", "d"], {"answer": [1, 2, 3]})


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([], "at least one"),
        ([Reward("a", length), Reward("a", length)], "a name of its own"),
    ],
)
def test_rewards_that_cannot_be(rewards, message):
    with pytest.raises(RewardError, match=message):
        RewardFunctions(rewards)


def test_weights_that_overflow_are_refused():
    rewards = RewardFunctions([Reward("length", length, weight=1e38)])
    with pytest.raises(RewardError, match="too large"):
        rewards(PROMPTS, COMPLETIONS, {})


# ---- normalizing


def test_normalizer_is_the_mean_and_deviation_of_everything_seen():
    normalizer, seen = RunningNormalizer(), []
    for size in (1, 5, 0, 13, 2):
        values = torch.randn(size, dtype=torch.float64) * 3 + 1e4
        normalizer.update(values)
        seen += values.tolist()
    probe = torch.randn(4, dtype=torch.float64) + 1e4
    expected = [(value - statistics.fmean(seen)) / statistics.pstdev(seen) for value in probe.tolist()]
    torch.testing.assert_close(normalizer(probe), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.1, -1e-30])
def test_constant_rewards_normalize_to_nothing(value):
    rewards = RewardFunctions([Reward("same", lambda completions: [value] * len(completions), normalize=True)])
    for size in (3, 7, 1, 5):
        total = rewards(["p"] * size, ["c"] * size, {}).total
        assert total.abs().max() < 1e-6


def test_normalized_rewards_learn_only_when_told_and_only_from_whole_steps():
    fail = False

    def sometimes(completions):
        if fail:
            raise RuntimeError
        return [0.0] * len(completions)

    rewards = RewardFunctions([Reward("length", length, weight=2.0, normalize=True), Reward("other", sometimes)])
    first = rewards(PROMPTS, COMPLETIONS, {})
    mean, deviation = statistics.fmean([6, 17, 3]), statistics.pstdev([6, 17, 3])
    expected = [2 * (value - mean) / deviation for value in (6, 17, 3)]
    torch.testing.assert_close(first.total, torch.tensor(expected))
    assert first.by_name["length"].tolist() == [6, 17, 3]

    state = rewards.state_dict()
    evaluated = rewards(["p"], ["twelve chars"], {}, update=False)
    torch.testing.assert_close(evaluated.total, torch.tensor([2 * (12 - mean) / deviation]))
    fail = True
    with pytest.raises(RewardError):
        rewards(PROMPTS, COMPLETIONS, {})
    assert rewards.state_dict() == state


def test_normalizers_resume_to_the_same_bits():
    def make():
        return RewardFunctions([Reward("length", length, normalize=True), Reward("plain", length)])

    texts = ["x" * int(size) for size in torch.randint(1, 99, (12,))]
    rewards = make()
    rewards(texts, texts, {})
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(rewards.state_dict())))
    for _ in range(3):
        assert torch.equal(rewards(texts[:5], texts[:5], {}).total, resumed(texts[:5], texts[:5], {}).total)
    with pytest.raises(RewardError, match=r"normalizers of the rewards \['length'\], this one \[\]"):
        RewardFunctions([Reward("length", length)]).load_state_dict(rewards.state_dict())


# ---- rewards by token, and constraints


def test_rewards_by_token_stand_at_their_tokens():
    ids = [[5, 6, 7], [8], [9, 10]]

    def positions(completion_ids, **_):
        return [[float(10 * i + t) for t in range(len(row))] for i, row in enumerate(completion_ids)]

    rewards = RewardFunctions([Reward("length", length, 2.0), Reward("positions", positions, 0.5)])
    out = rewards(["p"] * 3, ["abc", "d", "ef"], {}, completion_ids=ids)
    assert out.total.tolist() == [6.0, 2.0, 4.0]
    assert out.weights == {"length": 2.0, "positions": 0.5}
    assert out.objectives.tolist() == [[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]]
    assert out.token_objectives[..., 0].abs().sum() == 0
    assert out.token_objectives[..., 1].tolist() == [[0.0, 1.0, 2.0], [10.0, 0.0, 0.0], [20.0, 21.0, 0.0]]
    assert out.by_name["positions"].tolist() == [3.0, 10.0, 41.0]
    tensors = RewardFunctions([Reward("t", lambda completion_ids: [torch.ones(len(row)) for row in completion_ids])])
    assert tensors(["p"] * 3, ["abc", "d", "ef"], {}, completion_ids=ids).token_objectives.sum() == 6


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([[1.0], [1.0]], r"expected 2 numbers, one for every token"),
        ([[1.0, 2.0], 1.0], r"reward 'f' gave 1.0 for completion 1, 'b', expected 1 numbers, one for every token"),
        ([[1.0, "x"], [1.0]], r"gave \[1.0, 'x'\] for completion 0, 'a', expected finite numbers"),
        ([[1.0, 2.0], [math.nan]], r"gave \[nan\] for completion 1"),
        ([[1.0, [2.0]], [1.0]], r"gave \[1.0, \[2.0\]\] for completion 0"),
    ],
)
def test_wrong_rewards_by_token_are_named(result, message):
    rewards = RewardFunctions([Reward("f", lambda completions: result)])
    with pytest.raises(RewardError, match=message):
        rewards(["p", "p"], ["a", "b"], {}, completion_ids=[[1, 2], [3]])


def test_rewards_by_token_are_not_normalized():
    rewards = RewardFunctions([Reward("f", lambda completions: [[1.0], [2.0]], normalize=True)])
    with pytest.raises(RewardError, match="normalize is for rewards of whole completions"):
        rewards(["p", "p"], ["a", "b"], {}, completion_ids=[[1], [3]])


def test_a_constraints_weight_rises_while_it_is_violated():
    def make():
        return build_rewards(
            [
                RewardConfig("length", function=f"{__name__}:length"),
                RewardConfig(
                    "safe", function=f"{__name__}:zero", weight=0.5, threshold=2.0, multiplier_learning_rate=0.1
                ),
            ]
        )

    rewards = make()
    for weight in (0.5, 0.7, 0.9):
        out = rewards(["p", "p"], ["a", "bb"], {})
        assert out.weights["safe"] == pytest.approx(weight)
        assert out.total.tolist() == [1.0, 2.0]
    rewards(["p", "p"], ["a", "bb"], {}, update=False)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(rewards.state_dict())))
    assert resumed.multipliers["safe"].value == rewards.multipliers["safe"].value == pytest.approx(1.1)


def zero(completions):
    return [0.0] * len(completions)


# ---- finding functions


def test_vader_sentiment(monkeypatch):
    pytest.importorskip("vaderSentiment")
    rewards = build_rewards([RewardConfig(name="sentiment", function="vader_sentiment")])
    texts = [" wonderful, I love it!", " terrible and sad.", " a table.", ""]
    good, bad, neutral, empty = rewards(["The film was hateful and horrible, or"] * 4, texts, {}).total.tolist()
    assert 0.5 < good <= 1
    assert -1 <= bad < -0.3
    assert neutral == empty == 0  # the prompt does not count
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(RewardError, match=r"reward 'sentiment': needs vaderSentiment; pip install .*\[demo\]"):
        build_rewards([RewardConfig(name="sentiment", function="vader_sentiment")])


def reasoning(completions, rows):
    rewards = build_rewards([RewardConfig(name="answer", function="reasoning_gym")])
    columns = {name: [row[name] for row in rows] for name in ("task", "entry")}
    rewards.check_columns(columns)
    return rewards([row["prompt"] for row in rows], completions, columns).total.tolist()


def test_reasoning_gym_scores_each_answer_by_its_own_task(monkeypatch):
    made = []

    def get_score_answer_fn(task):
        made.append(task)
        return {
            "copy": lambda answer, entry: float(answer == entry["answer"]),
            "length": lambda answer, entry: len(answer) / 10,
        }[task]

    package = types.ModuleType("reasoning_gym")
    package.get_score_answer_fn = get_score_answer_fn
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    rows = [{"prompt": "p", "task": task, "entry": {"answer": "ab"}} for task in ("copy", "length", "copy", "length")]
    assert reasoning([" ab\n", "abc", "ba", ""], rows) == pytest.approx([1.0, 0.3, 0.0, 0.0])
    assert sorted(made) == ["copy", "length"]  # each set up once
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(RewardError, match=r"reward 'answer': needs reasoning-gym; pip install .*\[reasoning\]"):
        build_rewards([RewardConfig(name="answer", function="reasoning_gym")])


def test_the_arithmetic_example_is_what_its_script_writes_and_its_answers_are_right(tmp_path):
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is an extra of its own: pip install -e .[reasoning]")
    examples = Path(__file__).parents[2] / "examples"
    arguments = ["chain_sum", str(tmp_path / "made"), "--train", "112", "--eval", "48"]
    options = ["min_terms=2", "max_terms=2", "min_digits=1", "max_digits=1"]
    command = [sys.executable, str(examples / "reasoning_prompts.py"), *arguments, "--set", *options]
    subprocess.run(command, check=True)
    asked = set()
    for part in ("train", "eval"):
        shipped = (examples / "prompts" / f"chain_sum_{part}.jsonl").read_text()
        assert (tmp_path / f"made_{part}.jsonl").read_text() == shipped
        rows = [json.loads(line) for line in shipped.splitlines()]
        answers = [row["entry"]["answer"] for row in rows]
        assert reasoning(answers, rows) == [1.0] * len(rows)
        assert max(reasoning([f"{int(answer) + 1}" for answer in answers], rows)) < 1.0
        asked |= {row["prompt"] for row in rows}
    assert len(asked) == 112 + 48


def test_functions_from_modules_and_files(tmp_path, monkeypatch):
    source = (
        "import dataclasses\n\n@dataclasses.dataclass\nclass Point:\n    x: 'int'\n\ndef score(completions, **_):\n"
    )
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(source + f"    return [{value}] * len(completions)\n")
    (tmp_path / "reward_module_for_tests.py").write_text(source + "    return [3] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    specs = ["a/mine.py:score", f"{tmp_path}/b/mine.py:score", "reward_module_for_tests:score"]
    rewards = build_rewards([RewardConfig(name=spec, function=spec, weight=10.0) for spec in specs])
    output = rewards(["p"], ["c"], {})
    assert [output.by_name[spec].item() for spec in specs] == [1, 2, 3]
    assert output.total.item() == 60
    assert "mine" not in sys.modules


def test_functions_that_cannot_be_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import os\ndef score(completions): ...\n")
    (tmp_path / "syntax.py").write_text("def score(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(1)\n")
    (tmp_path / "lazy.py").write_text("def __getattr__(name): raise OSError('no such name')\n")
    (tmp_path / "imports_more.py").write_text("import a_module_that_is_absent\n")
    monkeypatch.syspath_prepend(tmp_path)
    wrong = {
        "score": "is not vader_sentiment, reasoning_gym, module:function",
        "mine.py:": "is not vader_sentiment",
        "mine.py:scores": r"no function 'scores' in mine\.py; did you mean 'score'",
        "mine.py:os": "no function 'os'",
        "absent.py:score": r"absent\.py: no such file",
        "syntax.py:score": r"loading syntax\.py raised SyntaxError",
        "raises.py:score": r"loading raises\.py raised ZeroDivisionError",
        "absent_module:score": r"no module 'absent_module' is installed; for a file, write its path: absent_module\.py",
        "absent_module.sub:score": "no module 'absent_module.sub'",
        "exits.py:score": r"loading exits\.py raised SystemExit: 1",
        "lazy.py:score": r"loading lazy\.py raised OSError: no such name",
        ".relative:score": "is not vader_sentiment",
        ":score": "is not vader_sentiment",
        "a\0b.py:score": "no such file",
        "x" * 5000 + ".py:score": "no such file",
        "\udce9.py:score": "no such file",
        "raises:score": "loading raises raised ZeroDivisionError",
        "imports_more:score": "loading imports_more raised ModuleNotFoundError: .*a_module_that_is_absent",
    }
    for spec, message in wrong.items():
        with pytest.raises(RewardError, match=message) as caught:
            find_function("mine", spec)
        assert str(caught.value).startswith("reward 'mine': ")


# ---- models


def _classifier(path, labels, **options):
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tiny_tokenizer()
    config = transformers.LlamaConfig(
        vocab_size=331,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=None,
        initializer_range=0.3,
        num_labels=labels,
        **options,
    )
    transformers.LlamaForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize(("labels", "label"), [(1, None), (3, 2)])
def test_a_model_scores_each_text_as_if_alone(tmp_path, labels, label):
    path = _classifier(tmp_path / "m", labels)
    config = RewardConfig(name="model", model=str(path), label=label, batch_size=2)
    rewards = build_rewards([config], model_defaults=ModelConfig())
    given = rewards(PROMPTS, COMPLETIONS, {"ignored": [1, 2, 3]}).total
    assert len(set(given.tolist())) == 3

    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = make_tiny_tokenizer()
    for value, prompt, completion in zip(given, PROMPTS, COMPLETIONS, strict=True):
        alone = model(**tokenizer(prompt + completion, return_tensors="pt")).logits[0, label or 0]
        torch.testing.assert_close(value, alone.detach(), rtol=1e-5, atol=1e-5)

    # Of a text beyond the model's 32 tokens, the end counts.
    endings = rewards(["0123456789" * 9] * 2, ["AAAA", "BBBB"], {"ignored": [0, 0]}).total
    assert endings[0] != endings[1]


def _add_bos(tokenizer):
    """The tokenizer with a token `<s>`, which it puts before every text, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def test_a_text_that_begins_with_bos_gets_no_second_one(tmp_path):
    """The prompts' chat template wrote it."""
    import transformers

    path = _classifier(tmp_path / "m", 1)
    _add_bos(make_tiny_tokenizer()).save_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    rewards = build_rewards([RewardConfig(name="model", model=str(path))], model_defaults=ModelConfig())
    bos, completions = tokenizer.bos_token, ["one", "two"]
    given = rewards([f"{bos}user\nA", "plain"], completions, {"ignored": [1, 2]}).total
    for value, text in zip(given, ("user\nAone", "plaintwo"), strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        torch.testing.assert_close(value, model(torch.tensor([ids])).logits[0, 0].detach(), rtol=1e-5, atol=1e-5)


def test_padding_of_a_reward_model(tmp_path):
    """Its pad token has no embedding, and a text ends with each token that could stand for padding in its place."""
    import transformers

    path = _classifier(tmp_path / "m", 1)
    tokenizer = make_tiny_tokenizer()
    completions = ["<|pad|>", "<|im_start|> and then", "<|im_end|>"]  # tokens 0, 1 and 2
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    alone = [model(**tokenizer("A" + text, return_tensors="pt")).logits[0, 0].item() for text in completions]
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)
    rewards = build_rewards([RewardConfig(name="model", model=str(path))], model_defaults=ModelConfig())
    given = rewards(["A"] * 3, completions, {"ignored": [1, 2, 3]}).total
    assert given.tolist() == pytest.approx(alone, abs=1e-5)

    tokenizer.add_tokens(["[NEW]"])
    tokenizer.save_pretrained(path)
    rewards = build_rewards([RewardConfig(name="model", model=str(path))], model_defaults=ModelConfig())
    with pytest.raises(RewardError, match="token 332 has no embedding"):
        rewards(["A"], ["[NEW]"], {"ignored": [1]})


def test_models_that_cannot_be_used(tmp_path):
    path = str(_classifier(tmp_path / "m", 3, id2label={0: "sad", 1: "calm", 2: "glad"}))
    wrong = [
        ({"model": path}, r"give the label of .*: one of 0 \(sad\), 1 \(calm\), 2 \(glad\)"),
        ({"model": path, "label": 3}, "label 3, but .* has 3"),
        ({"model": str(tmp_path / "absent")}, "no such file or folder"),
        ({"model": "nobody-here/no-such-model"}, "model.allow_download"),
    ]
    for options, message in wrong:
        with pytest.raises(RewardError, match=f"reward 'mine': .*{message}"):
            build_rewards([RewardConfig(name="mine", **options)])
    from tiny import make_tiny_model

    untrained = make_tiny_model(tmp_path / "lm")
    with pytest.raises(RewardError, match="weights of LlamaForSequenceClassification are missing"):
        build_rewards([RewardConfig(name="mine", model=str(untrained), label=0)])
