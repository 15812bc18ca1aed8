"""Write prompts of a reasoning-gym task, for the reward `reasoning_gym`: always the same ones for the same arguments.

    python examples/reasoning_prompts.py chain_sum examples/prompts/chain_sum --train 192 --eval 48 \
        --set min_terms=2 max_terms=2 min_digits=1 max_digits=1

writes chain_sum_train.jsonl and chain_sum_eval.jsonl. No question is in both files, nor twice in one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import yaml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("task", help="name of a reasoning-gym task")
    parser.add_argument("output", help="path that _train.jsonl and _eval.jsonl are appended to")
    parser.add_argument("--train", type=int, default=192, help="training prompts")
    parser.add_argument("--eval", type=int, default=48, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of the task")
    arguments = parser.parse_args()
    if wrong := [item for item in arguments.set if "=" not in item]:
        parser.error(f"--set: expected KEY=VALUE, got {wrong[0]!r}")
    if min(arguments.train, arguments.eval) < 0 or not (wanted := arguments.train + arguments.eval):
        parser.error("--train and --eval: expected at least one prompt")
    if not (folder := Path(arguments.output).parent).is_dir():
        parser.error(f"{folder}: no such folder")

    entries: dict[str, dict] = {}
    try:
        import reasoning_gym

        options = {key: yaml.safe_load(value) for key, value in (item.split("=", 1) for item in arguments.set)}
        # A small task repeats itself: ten times as many draws as questions, and no more.
        for entry in reasoning_gym.create_dataset(arguments.task, seed=arguments.seed, size=10 * wanted, **options):
            entries.setdefault(entry["question"], entry)
            if len(entries) == wanted:
                break
    except Exception as error:  # each task checks its options in its own way
        parser.error(f"{arguments.task}, with these options: {' '.join(str(error).split())}")
    if len(entries) < wanted:
        parser.error(f"{arguments.task} with these options has no more than {len(entries)} questions, not {wanted}")

    rows = [
        {"prompt": question, "task": arguments.task, "entry": entry | {"metadata": _plain(entry["metadata"])}}
        for question, entry in entries.items()
    ]
    for name, part in (("train", rows[arguments.eval :]), ("eval", rows[: arguments.eval])):
        with open(f"{arguments.output}_{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)


def _plain(metadata: dict) -> dict:
    """Without what says where the entry came from: no score looks at it."""
    return {key: value for key, value in metadata.items() if not key.startswith("source_") and key != "difficulty"}


if __name__ == "__main__":
    main()
