"""The table of docs/large-models.md: what `fastppo plan` says that PPO of these models needs on cards of these sizes.

    PYTHONPATH=. python benchmarks/what_fits.py           print the rows
    PYTHONPATH=. python benchmarks/what_fits.py --write   put them into the page, with today's date

Nothing is measured here and no GPU is needed. It takes some minutes.
"""

from __future__ import annotations

import argparse
import datetime
import re
from collections.abc import Iterator
from pathlib import Path

from fastppo.training.config import Config, build_config
from fastppo.training.plan.phases import Machine, memory_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "large-models.md"
MODELS = ("Llama-3.2-1B", "Qwen3-1.7B", "Qwen3-4B", "Llama-3.1-8B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B")
_CASTED, _ADAPTED = {"dtype": "float32", "autocast": "bfloat16"}, {"dtype": "bfloat16", "autocast": "bfloat16"}
_ADAPTERS = {"lora": {"r": 16}, "value_model": "adapter"}
WAYS = {  # what differs from `configuration`
    "full": {"model": _CASTED | {"value_model": "separate"}},
    "full, 8 bits": {
        "model": _CASTED | {"value_model": "separate", "offload_idle": True},
        "optim": {"name": "paged_adamw_8bit"},
    },
    "adapters": {"model": _ADAPTED | _ADAPTERS},
    "nf4": {"model": _ADAPTED | _ADAPTERS | {"quantization": "nf4"}},
}
CARDS = {"24 GB": 23.5, "40 GB": 39.4, "80 GB": 79.1}
"""GiB that CUDA reports of a GPU that is sold as one of so many GB."""


def configuration(model: str, way: str) -> Config:
    """Passes of 4,096 tokens, 32 sequences of 512 + 512 tokens sampled together, in a process."""
    changes = WAYS[way]
    path = ROOT / "tests" / "configurations" / model
    # What `auto` takes without vLLM.
    engine = "continuous" if changes["model"]["dtype"] == "bfloat16" else "transformers"
    rollout = {"num_prompts": 256, "num_generations": 1, "max_new_tokens": 512, "generation_batch_size": 32}
    return build_config({
        "data": {"train": "-", "max_prompt_length": 512},
        "rollout": rollout | {"engine": engine},
        "batch": {"max_tokens": 4096},
        **changes,
        "model": changes["model"] | {"name_or_path": str(path), "gradient_checkpointing": True},
    })  # fmt: skip


def row(model: str, way: str) -> str:
    """What one GPU needs, the smallest that has it, and what each of eight needs; in GiB."""
    config = configuration(model, way)

    def needs(card: str, processes: int = 1) -> float:
        return memory_of(config, Machine("cuda", int(CARDS[card] * 2**30), processes)).peak.total / 2**30

    alone, card = needs("80 GB"), "none"
    for name in CARDS:  # the operators' scratch is a share of the card's memory
        if alone <= CARDS[name] and (there := needs(name)) <= CARDS[name]:
            alone, card = there, name
            break
    of_eight = ""
    if way == "full":  # 8-bit moments cannot be sharded, and with adapters every process has a whole copy
        each = needs("80 GB", 8)
        of_eight = f"{each:.1f}" if each <= CARDS["80 GB"] else f"{each:.1f}, too much"
    return f"| {model} | {way} | {alone:.1f} | {card} | {of_eight} | planned |"


def rows() -> Iterator[str]:
    for model in MODELS:
        for way in WAYS:
            yield row(model, way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace the rows of the page, and their date")
    write = parser.parse_args().write
    made = []
    for line in rows():
        print(line, flush=True)
        made.append(line)
    if write:
        text = PAGE.read_text(encoding="utf-8")
        text = re.sub(r"(?:^\| .* \| planned \|\n)+", "\n".join(made) + "\n", text, flags=re.MULTILINE)
        text = re.sub(r"(?<=planned on )\d{4}-\d\d-\d\d", datetime.date.today().isoformat(), text)
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
