"""Prompts: read from a file or dataset, tokenized, checked, and drawn in an order that a resumed run continues."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastppo.errors import FastPPOError, did_you_mean, one_line, quote
from fastppo.extras import install_command
from fastppo.rollout.prompt import Prompt
from fastppo.training.files import read_text, why_unreadable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastppo.training.config import DataConfig

_Row = tuple[str, dict[str, Any]]  # where it is, for messages, and its columns


class DataError(FastPPOError, ValueError):
    """Prompts that cannot be used; the message is one line that says where and why."""


@dataclass
class PromptData:
    """The prompts of a run."""

    train: list[Prompt]
    eval: list[Prompt]
    num_dropped: int = 0
    """Overlong prompts left out."""
    num_truncated: int = 0
    """Overlong prompts of which only the end was kept."""


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
        config: the `data` section of the configuration.
        tokenizer: needs a chat template for chats.
        context_length: maximum tokens of prompt and completion together; None for no limit.
        max_new_tokens: maximum tokens of a completion.
        allow_download: allow downloading a dataset from the Hub.

    Raises:
        DataError: there is no such data, a row is not a prompt, prompts are too long, or none is left to train on.
    """
    limit = config.max_prompt_length
    if context_length is not None:
        limit = min(limit, context_length - max_new_tokens)
        if limit < 1:
            raise DataError(
                f"the model's context of {context_length} tokens leaves no room for a prompt "
                f"(rollout.max_new_tokens is {max_new_tokens})"
            )
    data, bos = PromptData([], []), tokenizer.bos_token_id
    for source, split, prompts in (
        (config.train, config.train_split, data.train),
        (config.eval, config.eval_split, data.eval),
    ):
        if source is None:
            continue
        if not (rows := _read(source, split, config.prompt_column, allow_download)):
            raise DataError(f"{source}: holds no prompts")
        names = list(dict.fromkeys(name for _, values in rows for name in values if name != config.prompt_column))
        for name in sorted({"prompts", "completions", "completion_ids"}.intersection(names)):
            raise DataError(f"{source}: no column may be named {name!r}, reward functions get their {name} under it")
        for (where, values), (text, special, ids) in zip(rows, _tokenize(rows, config, tokenizer), strict=True):
            if not ids:
                raise DataError(f"{where}: the prompt is empty, so there is nothing to go on from")
            if len(ids) > limit and config.overlong == "error":
                raise DataError(
                    f"{where}: the prompt has {len(ids)} tokens, at most {limit} fit (data.max_prompt_length and the "
                    "model's context less rollout.max_new_tokens); data.overlong: truncate or drop lets it pass"
                )
            if len(ids) > limit and config.overlong == "drop":
                data.num_dropped += 1
                continue
            if len(ids) > limit:
                data.num_truncated += 1
                # Models that were trained with a leading bos break without it.
                head = ids[:1] if ids[0] == bos and limit > 1 else []
                ids = head + ids[len(ids) - limit + len(head) :]
                text = tokenizer.decode(ids[special and ids[0] == bos :], clean_up_tokenization_spaces=False)
            prompts.append(Prompt(text, ids, {name: values.get(name) for name in names}))
        if not prompts:
            raise DataError(f"{source}: every prompt is longer than {limit} tokens; all {len(rows)} were dropped")
    if config.eval is None and config.eval_size:
        if config.eval_size >= len(data.train):
            raise DataError(
                f"data.eval_size: holding out {config.eval_size} of the {len(data.train)} prompts of {config.train} "
                "leaves none to train on"
            )
        data.train, data.eval = data.train[: -config.eval_size], data.train[-config.eval_size :]
    return data


class PromptSampler:
    """Endless batches of prompt indices: a new shuffle every epoch, full batches also across an epoch's end.

    Args:
        n: number of prompts.
        batch_size: indices in a batch; may exceed n.
        seed: seed of the shuffles.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"n and batch_size must be positive, got {n} and {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._drawn = 0

    def __next__(self) -> list[int]:
        """The next `batch_size` indices, each in [0, n)."""
        places = range(self._drawn, self._drawn + self.batch_size)
        self._drawn += self.batch_size
        return [_shuffled(self.n, self.seed, place // self.n)[place % self.n] for place in places]

    def state_dict(self) -> dict[str, int]:
        """The position in the order, for JSON."""
        epoch, position = divmod(self._drawn, self.n)
        return {"n": self.n, "seed": self.seed, "epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position.

        Raises:
            DataError: it was saved with other prompts or another seed, so the order would differ.
        """
        for name, what, mine in (("n", "number of training prompts", self.n), ("seed", "seed", self.seed)):
            if state[name] != mine:
                raise DataError(f"the {what} was {state[name]} when the run was saved and is {mine} now")
        self._drawn = state["epoch"] * self.n + state["position"]


@functools.lru_cache(maxsize=4)
def _shuffled(n: int, seed: int, epoch: int) -> list[int]:
    # Hashed: torch's CPU generator uses 32 bits of a seed, and neighbouring runs and epochs must not share a shuffle.
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
    return torch.randperm(n, generator=generator).tolist()


def _tokenize(
    rows: list[_Row], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool, list[int]]]:
    """Of every row: what the model reads, whether the tokenizer added special tokens to it, and the token ids."""
    tokenized = []
    texts = [_text(where, values, config, tokenizer) for where, values in rows]
    for special, group in itertools.groupby(texts, key=lambda item: item[1]):
        batch = [text for text, _ in group]
        # verbose=False: the tokenizer's own warning about long inputs says less than the check of their length.
        ids = tokenizer(batch, add_special_tokens=special, verbose=False)["input_ids"]
        tokenized += [(text, special, row) for text, row in zip(batch, ids, strict=True)]
    return tokenized


def _text(
    where: str, values: dict[str, Any], config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, bool]:
    """What the model reads, and whether the tokenizer must add special tokens; a chat template writes its own."""
    if config.prompt_column not in values:
        hint = did_you_mean(config.prompt_column, values, otherwise="it has")
        raise DataError(f"{where}: no column {quote(config.prompt_column)}{hint} (data.prompt_column)")
    prompt = values[config.prompt_column]
    if isinstance(prompt, str) and not config.apply_chat_template:
        if config.system_prompt is not None:
            raise DataError("data.system_prompt: a plain prompt has no place for it; set data.apply_chat_template")
        return prompt, True
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise DataError(f"{where}: a prompt is a string or a list of {{role, content}}, got {_kind(prompt)}")
    if config.system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": config.system_prompt}, *messages]
    if tokenizer.chat_template is None:
        raise DataError(f"{where}: needs a chat template, and the tokenizer has none")
    # A prompt that ends in the assistant's own words is one to go on with.
    unfinished = messages[-1]["role"] == "assistant"
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=not unfinished, continue_final_message=unfinished
        )
    except Exception as error:  # templates are programs of their own and raise what they like
        raise DataError(f"{where}: the chat template refuses it ({one_line(error)})") from error
    return text, False


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {quote(value, 60)}"


# Plain readers: `datasets` reports a broken line without its file and number, reads CSV's `NA` and `007` as null and 7,
# takes a short CSV row for one with nulls, and writes a cache.
def _read(source: str, split: str, column: str, allow_download: bool) -> list[_Row]:
    path = Path(os.path.expanduser(source))  # Path.expanduser raises for a user that does not exist
    readers = {".jsonl": _jsonl, ".csv": _csv, ".txt": _txt}
    if (is_folder := os.path.isdir(path)) or (path.suffix not in readers and not os.path.exists(path)):
        return _from_datasets(source, path if is_folder else None, split, allow_download)
    if path.suffix not in readers:
        raise DataError(f"{source}: expected {', '.join(readers)} or a folder saved by datasets")
    try:
        text = read_text(path)
    except FileNotFoundError:
        beside = os.listdir(path.parent) if path.parent.is_dir() else []
        raise DataError(f"{source}: no such file{did_you_mean(path.name, beside, f'{path.parent}/')}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: cannot be read ({why_unreadable(error)})") from None
    lines = io.StringIO(text, newline="" if path.suffix == ".csv" else None)
    return list(readers[path.suffix](lines, source, column))


def _jsonl(file: Iterator[str], source: str, column: str) -> Iterator[_Row]:
    for where, line in _txt(file, source, column):
        try:
            values = json.loads(line[column])
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: holds half of a surrogate pair, such as \\ud83d") from None
        except (ValueError, RecursionError) as error:  # ValueError: also an integer of too many digits
            raise DataError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: expected an object like {{{json.dumps(column)}: ...}}, got {_kind(values)}")
        yield where, values


def _csv(file: Iterator[str], source: str, column: str) -> Iterator[_Row]:
    reader = csv.DictReader(file, strict=True)
    try:
        names = [name for name in reader.fieldnames or () if name]  # spreadsheets may add empty columns
        if len(set(names)) < len(names):
            raise DataError(f"{source}: two columns of the header have the same name")
        for values in reader:
            where = f"{source}, line {reader.line_num}"
            if None in values or None in values.values():
                raise DataError(f"{where}: has another number of fields than the header's {len(reader.fieldnames)}")
            yield where, values
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.line_num + 1}: not valid CSV ({error})") from None


def _txt(file: Iterator[str], source: str, column: str) -> Iterator[_Row]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{source}, line {number}", {column: line.rstrip("\n")}


def _from_datasets(source: str, folder: Path | None, split: str, allow_download: bool) -> list[_Row]:
    """Rows of a folder that `datasets` saved or, if it is None, of a dataset on the Hub."""
    if folder is None and not allow_download:
        raise DataError(f"{source}: no such file or folder; model.allow_download: true lets the Hub be asked")
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: needs the package datasets; {install_command('train')}") from None
    try:
        loaded = datasets.load_from_disk(folder) if folder else datasets.load_dataset(source, split=split)
    except Exception as error:  # on a damaged folder it raises a KeyError, TypeError, AttributeError, ...
        what = "not a folder saved by datasets" if folder else "cannot be loaded from the Hub"
        raise DataError(f"{source}: {what} ({one_line(error)})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{source}: no split {quote(split)}{did_you_mean(split, loaded, otherwise='it has')}")
        loaded = loaded[split]
    return [(f"{source}, row {number}", values) for number, values in enumerate(loaded)]
