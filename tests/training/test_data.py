"""Prompts: every source and every way it can be wrong, and an order that a resumed run continues."""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter

import pytest
from tiny import make_tiny_tokenizer

from fastppo.training.config import DataConfig
from fastppo.training.data import DataError, PromptSampler, load_prompts


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def _load(tokenizer, path, *, context_length=128, max_new_tokens=10, **options):
    config = DataConfig(**{"train": str(path), "eval_size": 0, **options})
    return load_prompts(config, tokenizer, context_length=context_length, max_new_tokens=max_new_tokens)


def _jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- sources


def test_jsonl_keeps_every_column(tokenizer, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '\ufeff{"prompt": "Ünï", "answer": 4, "tags": ["a"]}\n\n{"prompt": "two", "answer": null}\n', "utf-8"
    )
    train = _load(tokenizer, path).train
    assert [prompt.text for prompt in train] == ["Ünï", "two"]
    assert [prompt.columns for prompt in train] == [{"answer": 4, "tags": ["a"]}, {"answer": None, "tags": None}]
    for prompt in train:
        assert tokenizer.decode(prompt.input_ids) == prompt.text


def test_csv_and_txt(tokenizer, tmp_path):
    table = tmp_path / "p.csv"
    table.write_text('id,question\n7,"one, with a comma\nand a line"\n8,two\n', encoding="utf-8")
    train = _load(tokenizer, table, prompt_column="question").train
    assert [prompt.text for prompt in train] == ["one, with a comma\nand a line", "two"]
    assert [prompt.columns for prompt in train] == [{"id": "7"}, {"id": "8"}]
    lines = tmp_path / "p.txt"
    lines.write_text("one \n\n  two\n", encoding="utf-8")
    assert [prompt.text for prompt in _load(tokenizer, lines).train] == ["one ", "  two"]


def test_values_of_a_file_stay_as_they_are(tokenizer, tmp_path, monkeypatch):
    """Plain readers: no library guesses a type for a whole column, and none is imported for a file."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    table = tmp_path / "p.csv"
    table.write_text("prompt,answer\nNA,007\nnull,\n", encoding="utf-8")
    train = _load(tokenizer, table).train
    assert [(prompt.text, prompt.columns["answer"]) for prompt in train] == [("NA", "007"), ("null", "")]
    answers = [4, "four", 4.5, None, [1, "a"], {"x": 1}, {"y": []}, "2024-01-01"]
    path = _jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "answer": answer} for answer in answers])
    assert [prompt.columns["answer"] for prompt in _load(tokenizer, path).train] == answers
    assert sorted(item.name for item in tmp_path.iterdir()) == ["p.csv", "p.jsonl"]


def test_chats_and_texts_in_one_file_keep_their_order(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    path = _jsonl(tmp_path / "p.jsonl", [{"prompt": prompt} for prompt in ("one", chat, chat, "two", chat)])
    train = _load(tokenizer, path).train
    assert [prompt.text[:3] for prompt in train] == ["one", "<|i", "<|i", "two", "<|i"]
    assert [tokenizer.decode(prompt.input_ids) for prompt in train] == [prompt.text for prompt in train]


def test_saved_dataset(tokenizer, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_dict({"prompt": [name, "x"], "n": [1, 2]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "both")
    splits["train"].save_to_disk(tmp_path / "one")
    data = _load(tokenizer, tmp_path / "both", eval=str(tmp_path / "both"))
    assert [prompt.text for prompt in data.train] == ["train", "x"]
    assert [prompt.text for prompt in data.eval] == ["test", "x"]
    assert data.train[1].columns == {"n": 2}
    assert len(_load(tokenizer, tmp_path / "one").train) == 2
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        _load(tokenizer, tmp_path / "both", train_split="dev")
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match="not a folder saved by datasets"):
        _load(tokenizer, tmp_path / "plain")
    for damaged in ("[]", "{}", '{"splits": 3}'):
        (tmp_path / "both" / "dataset_dict.json").write_text(damaged)
        with pytest.raises(DataError, match="both: not a folder saved by datasets"):
            _load(tokenizer, tmp_path / "both")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="plain: needs the package datasets; pip install"):
        _load(tokenizer, tmp_path / "plain")


def test_held_out_prompts(tokenizer, tmp_path):
    path = _jsonl(tmp_path / "p.jsonl", [{"prompt": str(number)} for number in range(9)])
    data = _load(tokenizer, path, eval_size=4)
    assert [prompt.text for prompt in data.train] == ["0", "1", "2", "3", "4"]
    assert [prompt.text for prompt in data.eval] == ["5", "6", "7", "8"]
    assert _load(tokenizer, path, eval_size=0).eval == []
    other = _jsonl(tmp_path / "q.jsonl", [{"prompt": "held out"}])
    data = _load(tokenizer, path, eval=str(other), eval_size=4)
    assert (len(data.train), [prompt.text for prompt in data.eval]) == (9, ["held out"])
    for size in (9, 10):
        with pytest.raises(DataError, match=f"data.eval_size: holding out {size} of the 9"):
            _load(tokenizer, path, eval_size=size)


# ---- chat


def test_chat(tokenizer, tmp_path):
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
    path = _jsonl(tmp_path / "p.jsonl", [{"prompt": [user]}, {"prompt": [{**system, "content": "Own."}, user]}])
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    first, second = _load(tokenizer, path, system_prompt="Be kind.").train
    assert first.text == "<|im_start|>system\nBe kind.<|im_end|>\n" + turn
    assert second.text == "<|im_start|>system\nOwn.<|im_end|>\n" + turn
    assert first.input_ids == tokenizer(first.text, add_special_tokens=False)["input_ids"]
    assert first.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3

    plain = _jsonl(tmp_path / "q.jsonl", [{"prompt": "Hi"}])
    assert _load(tokenizer, plain, apply_chat_template=True).train[0].text == turn
    assert _load(tokenizer, plain).train[0].text == "Hi"
    begun = _jsonl(tmp_path / "r.jsonl", [{"prompt": [user, {"role": "assistant", "content": "Well, I"}]}])
    assert _load(tokenizer, begun).train[0].text.endswith("<|im_start|>assistant\nWell, I")


def test_chat_mistakes(tokenizer, tmp_path):
    plain = _jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi"}])
    with pytest.raises(DataError, match=r"set data\.apply_chat_template"):
        _load(tokenizer, plain, system_prompt="Be kind.")
    bare = make_tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(DataError, match="line 1: needs a chat template"):
        _load(bare, plain, apply_chat_template=True)
    bare.chat_template = "{{ raise_exception('only one turn') }}"
    with pytest.raises(DataError, match=r"line 1: the chat template refuses it .*only one turn"):
        _load(bare, plain, apply_chat_template=True)


def test_bos_is_added_once(tmp_path):
    from tokenizers import processors

    tokenizer = make_tiny_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    path = _jsonl(tmp_path / "p.jsonl", [{"prompt": "The movie last night was"}])
    plain = _load(tokenizer, path).train[0]
    assert plain.input_ids[0] == bos
    assert plain.text == "The movie last night was"
    # The template writes it itself.
    assert _load(tokenizer, path, apply_chat_template=True).train[0].input_ids[:2].count(bos) == 1
    # And it stays at the head of a prompt that is cut.
    cut = _load(tokenizer, path, max_prompt_length=4, overlong="truncate").train[0]
    assert cut.input_ids == [bos, *plain.input_ids[-3:]]
    assert plain.text.endswith(cut.text)


# ---- lengths


def test_overlong_prompts(tokenizer, tmp_path):
    texts = ["short", "a good deal longer than the others are: 0123456789 0123456789", "brief"]
    path = _jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    length = len(tokenizer(texts[1])["input_ids"])
    limits = {"max_prompt_length": length - 1}
    with pytest.raises(DataError, match=f"line 2: the prompt has {length} tokens, at most {length - 1} fit"):
        _load(tokenizer, path, **limits)
    assert len(_load(tokenizer, path, max_prompt_length=length).train) == 3

    dropped = _load(tokenizer, path, overlong="drop", **limits)
    assert ([prompt.text for prompt in dropped.train], dropped.num_dropped) == (["short", "brief"], 1)
    cut = _load(tokenizer, path, overlong="truncate", **limits)
    assert (len(cut.train), cut.num_truncated) == (3, 1)
    assert cut.train[1].input_ids == tokenizer(texts[1])["input_ids"][1:]
    assert texts[1].endswith(cut.train[1].text)
    with pytest.raises(DataError, match="all 3 were dropped"):
        _load(tokenizer, path, overlong="drop", max_prompt_length=1)


def test_the_context_limits_too(tokenizer, tmp_path):
    path = _jsonl(tmp_path / "p.jsonl", [{"prompt": "0123456789"}])
    length = len(tokenizer("0123456789")["input_ids"])
    assert _load(tokenizer, path, context_length=length + 6, max_new_tokens=6).train
    with pytest.raises(DataError, match=f"at most {length - 1} fit"):
        _load(tokenizer, path, context_length=length + 5, max_new_tokens=6)
    with pytest.raises(DataError, match="leaves no room"):
        _load(tokenizer, path, context_length=6, max_new_tokens=6)
    assert _load(tokenizer, path, context_length=None, max_new_tokens=10**9).train


# ---- what can be wrong


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", "", "holds no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"line 2: not valid JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n["a"]\n', r"line 3: expected an object like \{\"prompt\": \.\.\.\}, got list"),
        ("p.jsonl", '{"promt": "a"}\n', r"line 1: no column 'prompt'; did you mean 'promt'\?"),
        ("p.jsonl", '{"text": "a", "id": 1}\n', r"line 1: no column 'prompt'; it has text, id"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 5}\n', r"line 2: a prompt is a string or a list .*, got int 5"),
        ("p.jsonl", '{"prompt": null}\n', r"line 1: a prompt is .*, got nothing"),
        ("p.jsonl", '{"prompt": []}\n', r"line 1: a prompt is "),
        ("p.jsonl", '{"prompt": [{"role": "user"}]}\n', r"line 1: a prompt is "),
        ("p.jsonl", '{"prompt": ["a"]}\n', r"line 1: a prompt is "),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', r"line 2: the prompt is empty"),
        ("p.jsonl", '{"prompt": "a", "completions": "b"}\n', r"no column may be named 'completions'"),
        ("p.jsonl", '{"prompt": "a", "completion_ids": [1]}\n', r"no column may be named 'completion_ids'"),
        ("p.jsonl", "[" * 100_000, r"line 1: not valid JSON"),
        ("p.jsonl", '{"prompt": "a", "n": ' + "1" * 5000 + "}", r"line 1: not valid JSON"),
        ("p.jsonl", '{"prompt": "\\ud83d"}\n', r"line 1: holds half of a surrogate pair"),
        ("p.csv", "prompt,id\n", "holds no prompts"),
        ("p.csv", "prompt,id\na,1\nb\n", r"line 3: has another number of fields than the header's 2"),
        ("p.csv", "prompt,id\na,1,2\n", r"line 2: has another number of fields"),
        ("p.csv", 'prompt\n"a" b\n', r"line 2: not valid CSV"),
        ("p.csv", "prompt,id,,,id\na,1,,,2\n", r"two columns of the header have the same name"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.parquet", "x", r"expected \.jsonl, \.csv, \.txt or a folder"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        _load(tokenizer, path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tokenizer, tmp_path):
    (tmp_path / "prompts.jsonl").write_bytes(b" " * 9000 + b'{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 9012\)"):
        _load(tokenizer, tmp_path / "prompts.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")  # which nobody writes to
    with pytest.raises(DataError, match="holds no prompts"):
        _load(tokenizer, tmp_path / "pipe.jsonl")
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"cannot be read \(a device, not a file\)"):
        _load(tokenizer, tmp_path / "endless.txt")
    with pytest.raises(DataError, match=r"no such file; did you mean '.*/prompts\.jsonl'\?"):
        _load(tokenizer, tmp_path / "prompt.jsonl")
    with pytest.raises(DataError, match=r"no such file$"):
        _load(tokenizer, tmp_path / "nowhere" / "x.txt")
    with pytest.raises(DataError, match=r"model\.allow_download: true"):
        _load(tokenizer, "someone/some-dataset")


# ---- the order


@pytest.mark.parametrize(("n", "batch_size"), [(7, 3), (5, 5), (4, 9), (1, 2), (6, 1)])
def test_every_epoch_is_a_shuffle_and_every_batch_full(n, batch_size):
    sampler = PromptSampler(n, batch_size, seed=random.randrange(2**31))
    batches = [next(sampler) for _ in range(4 * n)]
    assert {len(batch) for batch in batches} == {batch_size}
    order = [index for batch in batches for index in batch]
    epochs = [order[start : start + n] for start in range(0, len(order), n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 4:
        assert max(Counter(map(tuple, epochs)).values()) < len(epochs)


def test_order_depends_on_the_seed_alone():
    def first(seed):
        return next(PromptSampler(50, 50, seed))

    assert first(3) == first(3)
    assert first(3) != first(4)
    sampler = PromptSampler(50, 50, 3)
    _, second = next(sampler), next(sampler)
    assert second != first(4)  # seeds and epochs do not run into one another
    assert first(2**32 + 3) != first(3)


def test_resumed_order_goes_on_exactly():
    n, batch_size, seed = 11, 4, random.randrange(2**31)
    sampler = PromptSampler(n, batch_size, seed)
    for step in range(14):
        state = json.loads(json.dumps(sampler.state_dict()))
        resumed = PromptSampler(n, batch_size, seed)
        resumed.load_state_dict(state)
        expected = PromptSampler(n, batch_size, seed)
        for _ in range(step):
            next(expected)
        assert [next(resumed) for _ in range(5)] == [next(expected) for _ in range(5)]
        next(sampler)


def test_order_of_other_prompts_is_refused():
    state = PromptSampler(5, 2, 0).state_dict()
    with pytest.raises(DataError, match="number of training prompts was 5 when the run was saved and is 6 now"):
        PromptSampler(6, 2, 0).load_state_dict(state)
    with pytest.raises(DataError, match="the seed was 0"):
        PromptSampler(5, 2, 1).load_state_dict(state)
    with pytest.raises(ValueError, match="positive"):
        PromptSampler(0, 2, 0)
