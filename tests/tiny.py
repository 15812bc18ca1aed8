"""A tiny random Llama with a real tokenizer, for tests without a download; and helpers for short training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

_SENTENCES = [
    "The movie last night was wonderful, and everyone in the room loved it.",
    "My new neighbor is quiet, but the dog next door barks all day long.",
    "When I opened the package, I found a broken cup and a sad little note.",
    "The weather was bad, the food was good, and the train was late again.",
]
_SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_tokenizer(vocab_size: int = 331):
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, with a chat template, pad and eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(_SPECIAL):
        raise ValueError(f"vocab_size must be at least {len(alphabet) + len(_SPECIAL)}: every byte, and special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=_SPECIAL, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=_CHAT_TEMPLATE
    )


def make_tiny_model(
    path: str | Path, *, vocab_size: int = 331, hidden_size: int = 32, layers: int = 2, tie: bool = True, seed: int = 0
) -> Path:
    """Save a random Llama and its tokenizer in a folder, and return the folder.

    The same arguments give the same weights, and torch's global generator is left as it was. The context is 128 tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tiny_tokenizer(vocab_size)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size + 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # the usual 0.02 gives so small a model an all but uniform distribution
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def build_changed_config(tree: dict[str, Any], changes: dict[str, Any]):
    """Build the configuration of a tree of plain values after setting each `section__key=value` in it."""
    from fastppo.training.config import build_config

    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return build_config(tree)


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """A run's metrics, one dict a line, without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time") and k != "tokens_per_second"} for r in rows]


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's final policy."""
    return load_file(out / "final" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def within_noise(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether the means of two sets of runs, [8 or more, ...], differ by at most six standard errors.

    The errors are estimated from the runs themselves. With eight runs of each, chance exceeds six once in 30,000 times:
    Student's t of 14 degrees of freedom.
    """
    assert min(len(one), len(other)) >= 8
    error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    return (one.mean(0) - other.mean(0)).abs() <= 6 * error + 1e-6
