"""Make a folder with a tiny random model, prompts, a reward and a configuration: a whole run that takes seconds.

    python examples/make_tiny_run.py /tmp/tiny && fastppo train /tmp/tiny/config.yaml

Good for trying options out, and for seeing that an installation works.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REWARD = '''"""The share of vowels in a completion: a reward that even a random model can raise."""


def vowels(prompts, completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
'''


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=fast.eos_token_id,
            pad_token_id=fast.pad_token_id,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    prompts = [json.dumps({"prompt": f"Number {number} is"}) for number in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    (folder / "reward.py").write_text(REWARD)
    config = {
        "output_dir": str(folder / "run"),
        "total_steps": 20,
        "model": {"name_or_path": str(folder / "model")},
        "data": {"train": str(folder / "prompts.jsonl"), "eval_size": 16},
        "rewards": [{"name": "vowels", "function": f"{folder / 'reward.py'}:vowels"}],
        "rollout": {"num_prompts": 16, "num_generations": 2, "max_new_tokens": 12},
        "ppo": {"num_mini_batches": 2, "kl_coef": 0.01},
        "optim": {"learning_rate": 3.0e-3},
        "checkpoint": {"every": 10},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


if __name__ == "__main__":
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="made if it is not there; files of an earlier run are overwritten")
    try:
        main(parser.parse_args().folder)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
