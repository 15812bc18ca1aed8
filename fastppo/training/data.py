"""Prompts: read from a file or dataset, tokenized, checked, and drawn in an order that a resumed run continues.

Whatever is wrong with them is found here, before a model is run, and reported with the row it is in.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastppo.rollout.prompt import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastppo.training.config import DataConfig

_SUFFIXES = (".jsonl", ".csv", ".txt")
# The two arguments every reward function gets; a column of that name would hide one.
_RESERVED = ("prompts", "completions")


class DataError(ValueError):
    """Prompts that cannot be used; the message is one line that says where and why."""


@dataclass
class PromptData:
    """The prompts of a run."""

    train: list[Prompt]
    eval: list[Prompt]
    num_dropped: int = 0
    """Overlong prompts left out."""
    num_truncated: int = 0
    """Overlong prompts cut to their end."""


def load_prompts(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None,
    max_new_tokens: int,
    allow_download: bool = False,
) -> PromptData:
    """Read, template, tokenize and check every prompt.

    Args:
        config: the data section of the configuration.
        tokenizer: with a chat template where one is asked for.
        context_length: most tokens the model takes, prompt and completion together; None for any number.
        max_new_tokens: what a completion may take of it.
        allow_download: let a Hub dataset be fetched.

    Raises:
        DataError: no such data, a row that is no prompt, prompts too long, or none left to train on.
    """
    limit = config.max_prompt_length
    if context_length is not None:
        limit = min(limit, context_length - max_new_tokens)
        if limit < 1:
            raise DataError(
                f"the model's context of {context_length} tokens leaves no room for a prompt "
                f"(rollout.max_new_tokens is {max_new_tokens})"
            )
    data = PromptData([], [])
    data.train = _load(config.train, config.train_split, config, tokenizer, limit, allow_download, data)
    if config.eval is not None:
        data.eval = _load(config.eval, config.eval_split, config, tokenizer, limit, allow_download, data)
    elif config.eval_size:
        if config.eval_size >= len(data.train):
            raise DataError(
                f"data.eval_size: holding out {config.eval_size} of the {len(data.train)} prompts of {config.train} "
                "leaves none to train on"
            )
        data.train, data.eval = data.train[: -config.eval_size], data.train[-config.eval_size :]
    return data


class PromptSampler:
    """Endless batches of prompt indices: every epoch a new shuffle, every batch full, also across an epoch's end.

    A shuffle depends on the seed and the epoch's number alone, so three integers are the whole state.

    Args:
        n: number of prompts.
        batch_size: indices in a batch; more than n is possible.
        seed: of the shuffles.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"n and batch_size must be positive, got {n} and {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._position = 0, 0
        self._order = self._shuffle()

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        """The next `batch_size` indices, each in [0, n)."""
        batch: list[int] = []
        while len(batch) < self.batch_size:
            if self._position == self.n:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffle()
            taken = self._order[self._position : self._position + self.batch_size - len(batch)]
            batch += taken
            self._position += len(taken)
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where it stands, as JSON can hold it."""
        return {"n": self.n, "seed": self.seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where `state` was taken.

        Raises:
            DataError: it was taken with other prompts or another seed, so the order would not go on.
        """
        for name, mine in (("n", self.n), ("seed", self.seed)):
            if state[name] != mine:
                what = "number of training prompts" if name == "n" else "seed"
                raise DataError(f"the {what} was {state[name]} when the run was saved and is {mine} now")
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffle()

    def _shuffle(self) -> list[int]:
        # Hashed, since torch's CPU generator takes 32 bits of a seed and those of neighbouring runs must not meet.
        digest = hashlib.sha256(f"{self.seed}/{self._epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        return torch.randperm(self.n, generator=generator).tolist()


@dataclass
class _Row:
    where: str
    values: dict[str, Any] = field(default_factory=dict)


def _load(
    source: str,
    split: str,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    allow_download: bool,
    data: PromptData,
) -> list[Prompt]:
    rows = _read(source, split, config.prompt_column, allow_download)
    if not rows:
        raise DataError(f"{source}: holds no prompts")
    column = config.prompt_column
    names = list(dict.fromkeys(name for row in rows for name in row.values if name != column))
    for name in _RESERVED:
        if name in names:
            raise DataError(f"{source}: no column may be named {name!r}, reward functions get their {name} under it")
    texts, specials = zip(*(_text(row, config, tokenizer) for row in rows), strict=True)
    prompts = []
    for row, text, special, ids in zip(rows, texts, specials, _tokenize(tokenizer, texts, specials), strict=True):
        if not ids:
            raise DataError(f"{row.where}: the prompt is empty, so there is nothing to go on from")
        if len(ids) > limit:
            if config.overlong == "error":
                raise DataError(
                    f"{row.where}: the prompt has {len(ids)} tokens, at most {limit} fit (data.max_prompt_length and "
                    "the model's context less rollout.max_new_tokens); data.overlong: truncate or drop lets it pass"
                )
            if config.overlong == "drop":
                data.num_dropped += 1
                continue
            data.num_truncated += 1
            ids = _keep_end(ids, limit, tokenizer.bos_token_id)
            added = special and ids[0] == tokenizer.bos_token_id
            text = tokenizer.decode(ids[1:] if added else ids, clean_up_tokenization_spaces=False)
        prompts.append(Prompt(text, ids, {name: row.values.get(name) for name in names}))
    if not prompts:
        raise DataError(f"{source}: every prompt is longer than {limit} tokens, so all {len(rows)} were dropped")
    return prompts


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], specials: tuple[bool, ...]
) -> list[list[int]]:
    """Token ids of each text; a chat template has written its special tokens itself."""
    ids: list[list[int]] = [[]] * len(texts)
    for special in (False, True):
        chosen = [index for index, flag in enumerate(specials) if flag == special]
        if chosen:
            # verbose=False: the tokenizer's own warning of long inputs says less than the check that follows.
            encoded = tokenizer([texts[index] for index in chosen], add_special_tokens=special, verbose=False)
            for index, row in zip(chosen, encoded["input_ids"], strict=True):
                ids[index] = row
    return ids


def _keep_end(ids: list[int], limit: int, bos: int | None) -> list[int]:
    """The last `limit` tokens; a leading bos stays, since models that were trained with it break without."""
    if bos is not None and ids[0] == bos and limit > 1:
        return [bos, *ids[len(ids) - limit + 1 :]]
    return ids[-limit:]


def _text(row: _Row, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """What the model reads, and whether the tokenizer is to add its special tokens."""
    prompt = row.values.get(config.prompt_column)
    if config.prompt_column not in row.values:
        near = difflib.get_close_matches(config.prompt_column, row.values, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(repr, row.values)) or 'none'}"
        raise DataError(f"{row.where}: no column {config.prompt_column!r}; {hint} (data.prompt_column)")
    if isinstance(prompt, str):
        if not config.apply_chat_template:
            if config.system_prompt is not None:
                raise DataError("data.system_prompt: a plain prompt has no place for it; set data.apply_chat_template")
            return prompt, True
        messages = [{"role": "user", "content": prompt}]
    elif _is_chat(prompt):
        messages = list(prompt)
    else:
        raise DataError(f"{row.where}: a prompt is a string or a list of {{role, content}}, got {_kind(prompt)}")
    if config.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system_prompt})
    if tokenizer.chat_template is None:
        raise DataError(f"{row.where}: needs a chat template, and the tokenizer has none")
    # A prompt that ends in the assistant's own words is one to go on with.
    unfinished = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not unfinished, continue_final_message=unfinished
        )
    except Exception as error:  # templates are programs of their own and raise what they like
        raise DataError(f"{row.where}: the chat template refuses it ({' '.join(str(error).split())})") from error
    return text, False


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in prompt)
        and all(isinstance(message.get("content"), str) for message in prompt)
    )


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _read(source: str, split: str, column: str, allow_download: bool) -> list[_Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_disk(path, split)
    if path.suffix not in _SUFFIXES:
        if path.exists():
            raise DataError(f"{source}: expected {', '.join(_SUFFIXES)} or a folder saved by datasets")
        return _from_hub(source, split, allow_download)
    reader = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}[path.suffix]
    try:
        # -sig: spreadsheets write a byte-order mark, which would become part of the first column's name.
        with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as file:
            return list(reader(file, source, column))
    except FileNotFoundError:
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise DataError(f"{source}: no such file{hint}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror})") from None


def _jsonl(file: Iterator[str], source: str, column: str) -> Iterator[_Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: expected an object like {{{json.dumps(column)}: ...}}, got {_kind(values)}")
        yield _Row(where, values)


def _csv(file: Iterator[str], source: str, column: str) -> Iterator[_Row]:
    reader = csv.DictReader(file, strict=True)
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{source}, line {reader.line_num + 1}: not valid CSV ({error})") from None
        if values is None:
            return
        where = f"{source}, line {reader.line_num}"
        if None in values or None in values.values():
            raise DataError(f"{where}: has another number of fields than the header's {len(reader.fieldnames)}")
        yield _Row(where, values)


def _txt(file: Iterator[str], source: str, column: str) -> Iterator[_Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _Row(f"{source}, line {number}", {column: line.rstrip("\n")})


def _from_disk(path: Path, split: str) -> list[_Row]:
    datasets = _datasets(str(path))
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a folder saved by datasets ({' '.join(str(error).split())})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path}: no split {split!r}; it has {', '.join(loaded)}")
        loaded = loaded[split]
    return _rows(loaded, str(path))


def _from_hub(source: str, split: str, allow_download: bool) -> list[_Row]:
    if not allow_download:
        raise DataError(
            f"{source}: no such file or folder; if it is a dataset on the Hub, model.allow_download: true lets it be "
            "downloaded"
        )
    try:
        return _rows(_datasets(source).load_dataset(source, split=split), source)
    except (OSError, ValueError, RuntimeError) as error:  # its own errors, and the Hub's, derive from these
        raise DataError(f"{source}: cannot be loaded from the Hub ({' '.join(str(error).split())})") from error


def _rows(dataset: Any, source: str) -> list[_Row]:
    return [_Row(f"{source}, row {number}", dict(values)) for number, values in enumerate(dataset)]


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: needs datasets (pip install datasets)") from None
    return datasets
