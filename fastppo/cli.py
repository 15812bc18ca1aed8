"""The `fastppo` command."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence

import fastppo

_DESCRIPTION = """\
Policy optimization of language models on one machine.

  fastppo train examples/sentiment.yaml            train, with checkpoints, curves and a report
  fastppo train CONFIG.yaml --ppo.kl_coef 0.1      the same with another value for one key
  fastppo train CONFIG.yaml --resume               go on from the newest checkpoint
  fastppo eval CONFIG.yaml --model runs/x/final    held-out reward of a policy
  fastppo doctor                                   what is installed, and which backends can be used and why
"""
_OVERRIDES = "Any key of the configuration can be given as --section.key value; `fastppo keys` lists them."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C)."""
    parser = argparse.ArgumentParser(
        prog="fastppo", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fastppo {fastppo.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # An abbreviation of an option could as well be a misspelt key.
    section = {"epilog": _OVERRIDES, "allow_abbrev": False}

    train = commands.add_parser(
        "train", help="train a policy", description="Train a policy by reinforcement.", **section
    )
    train.add_argument("config", help="YAML file; see examples/")
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in output_dir")
    train.add_argument("--plain", action="store_true", help="one plain line a step, also on a terminal")

    evaluate = commands.add_parser(
        "eval", help="evaluate a policy", description="Sample held-out prompts and score them.", **section
    )
    evaluate.add_argument("config", help="the run's YAML file")
    evaluate.add_argument("--model", help="a policy to evaluate in place of the configuration's, e.g. runs/x/final")
    evaluate.add_argument("--samples", type=int, default=8, help="completions to show (default: 8)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object and nothing else")

    commands.add_parser("doctor", help="what is installed here, and which backends can be used")
    commands.add_parser("keys", help="every key of the configuration, its type and default")

    arguments, rest = parser.parse_known_args(argv)
    try:
        return _dispatch(parser, arguments, rest)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what Python flushes on its way out
        return 0


def _dispatch(parser: argparse.ArgumentParser, arguments: argparse.Namespace, rest: list[str]) -> int:
    if rest and arguments.command not in ("train", "eval"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.command == "doctor":
        from fastppo.doctor import report

        try:
            print(report())
        except ValueError as error:
            print(f"fastppo: {error}", file=sys.stderr)
            return 2
        return 0
    if missing := [name for name in ("transformers", "pydantic", "rich", "yaml") if not importlib.util.find_spec(name)]:
        print(f"fastppo: {', '.join(missing)} missing; pip install 'fastppo[train]'", file=sys.stderr)
        return 1
    if arguments.command == "keys":
        return _keys()
    return _run(_train if arguments.command == "train" else _evaluate, arguments, rest)


def _run(command, arguments: argparse.Namespace, overrides: list[str]) -> int:
    """A command with what may go wrong for a person turned into one line each."""
    # It warns on import of 4-bit kernels that it could not load; nothing here multiplies in 4 bits.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from fastppo.algorithms.learner import NonFiniteError
    from fastppo.models import ModelError
    from fastppo.training.checkpoint import CheckpointError
    from fastppo.training.config import ConfigError, load_config
    from fastppo.training.data import DataError
    from fastppo.training.rewards import RewardError

    try:
        return command(arguments, load_config(arguments.config, overrides))
    except ConfigError as error:
        print(f"fastppo: {error}", file=sys.stderr)
        return 2
    except (ModelError, DataError, RewardError, CheckpointError, NonFiniteError) as error:
        print(f"fastppo: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"fastppo: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _train(arguments: argparse.Namespace, config) -> int:
    import transformers

    from fastppo.training.allocator import keep_freed_memory
    from fastppo.training.progress import ProgressDisplay
    from fastppo.training.trainer import Trainer

    transformers.utils.logging.disable_progress_bar()
    keep_freed_memory()
    trainer = Trainer(config, resume=arguments.resume)
    if arguments.plain:
        trainer.progress = ProgressDisplay(config.total_steps, start_step=trainer.step, enabled=False)
    result = trainer.train()
    if result.final is not None:
        print(f"policy: {result.final}")
    print(f"report: {result.report}")
    if result.stopped is not None:
        print(f"fastppo: stopped at step {result.step}: {result.stopped}; --resume goes on", file=sys.stderr)
        return 1
    return 128 + result.interrupted_by if result.interrupted_by else 0


def _evaluate(arguments: argparse.Namespace, config) -> int:
    import json

    from fastppo.training.evaluate import evaluate_policy

    metrics, rows = evaluate_policy(config, arguments.model)
    if arguments.json:
        print(json.dumps({"metrics": metrics, "samples": rows[: arguments.samples]}))
        return 0
    for row in rows[: arguments.samples]:
        print(f"{row['reward']:+.3f}  {row['prompt']!r} -> {row['completion']!r}")
    for name, value in metrics.items():
        print(f"{name:24} {value:.4f}")
    return 0


def _keys() -> int:
    import textwrap

    import yaml

    from fastppo.training.config import documented_keys

    section = ""
    for key in documented_keys():
        head = key.name.rpartition(".")[0]
        if head != section:
            section = head
            print()
        default = "required" if key.default in ("required", "") else yaml.safe_dump(key.default).split("\n")[0]
        print(f"{key.name}: {default}  ({key.type})")
        for line in textwrap.wrap(key.help, 96):
            print(f"    {line}")
    return 0
