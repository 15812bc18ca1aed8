"""A folder with a model of a published size and random weights, a tokenizer and prompts: nothing is downloaded."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CONFIGURATIONS = Path(__file__).parents[2] / "tests" / "configurations"
MEMORY = Path("/dev/shm")  # faster than a disk, where there is one large enough
TINY = {
    "vocab_size": 331,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def scratch_folder(num_bytes: float) -> tempfile.TemporaryDirectory:
    """A new folder for so many bytes, in memory if they fit there twice."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2 * num_bytes
    return tempfile.TemporaryDirectory(prefix="fastppo-model-", dir=MEMORY if roomy else None)


def configuration(name: str, *, tiny: bool = False) -> dict:
    """The published config.json of a model, or one like it of a few thousand parameters; no token ends a text."""
    tree = json.loads((CONFIGURATIONS / name / "config.json").read_text()) | (TINY if tiny else {})
    # One that is never sampled, so that all completions have the same length.
    return tree | {"bos_token_id": None, "eos_token_id": tree["vocab_size"]}


def num_parameters(tree: dict) -> int:
    return sum(parameter.numel() for parameter in _shapes(tree).parameters())


def _shapes(tree: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**tree))


def write_model(folder: Path, tree: dict, *, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Weights as before training, a file for each layer, and the tokenizer: a token for every byte."""
    files: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in _shapes(tree).named_parameters():  # tied ones once
        layer = re.search(r"\.layers\.\d+\.", name)
        files.setdefault(layer[0] if layer else name, {})[name] = parameter
    generator = torch.Generator(device).manual_seed(0)
    weight_map = {}
    for number, parameters in enumerate(files.values()):
        tensors = {}
        for name, parameter in parameters.items():
            weight = torch.ones(parameter.shape, dtype=dtype, device=device)
            if parameter.dim() > 1:
                weight.normal_(std=tree["initializer_range"], generator=generator)
            tensors[name] = weight.cpu()
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(tree))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)


def write_prompts(path: Path, count: int, length: int) -> None:
    """Different prompts of `length` tokens, a line each."""
    path.write_text("".join(f"{number:0{length}}\n" for number in range(count)))
