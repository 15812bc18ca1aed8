"""The `fastppo` command."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence

import fastppo
from fastppo.extras import install_command

_DESCRIPTION = """\
Policy optimization of language models on one machine.

  fastppo train examples/sentiment.yaml            train, with checkpoints, curves and a report
  fastppo train CONFIG.yaml --ppo.kl_coef 0.1      the same with another value for one key
  fastppo train CONFIG.yaml --resume               go on from the newest checkpoint
  fastppo eval CONFIG.yaml --model runs/x/final    held-out reward of a policy
  fastppo keys ppo                                 the configuration's keys, of one section or all
  fastppo doctor                                   what is installed, and which backends can be used and why
"""
_OVERRIDES = "Any key of the configuration can be given as --section.key value; `fastppo keys` lists them."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C)."""
    run = {"epilog": _OVERRIDES, "allow_abbrev": False}  # an abbreviated option could as well be a misspelt key
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("fastppo", description=_DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastppo {fastppo.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train = commands.add_parser("train", help="train a policy", **run)
    train.add_argument("config", help="YAML file; see examples/")
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in output_dir")
    train.add_argument("--plain", action="store_true", help="one plain line a step, also on a terminal")
    evaluate = commands.add_parser("eval", help="sample held-out prompts and score the completions", **run)
    evaluate.add_argument("config", help="the run's YAML file")
    evaluate.add_argument("--model", help="a policy to evaluate in place of the configuration's, e.g. runs/x/final")
    evaluate.add_argument("--samples", type=int, default=8, help="completions to show (default: 8)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    commands.add_parser("doctor", help="what is installed here, and which backends can be used")
    keys = commands.add_parser("keys", help="every key of the configuration, its type and default")
    keys.add_argument("section", nargs="?", help="explain the keys of one section in full, such as ppo")

    arguments, overrides = parser.parse_known_args(argv)
    if overrides and arguments.command in ("doctor", "keys"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if arguments.command == "eval" and arguments.samples < 0:
        parser.error(f"--samples must be at least 0, got {arguments.samples}")
    if arguments.command == "doctor":
        from fastppo.doctor import report

        return _show(report)
    if missing := [name for name in ("transformers", "pydantic", "rich", "yaml") if not importlib.util.find_spec(name)]:
        return _fail(1, f"{', '.join(missing)} missing; {install_command('train')}")
    if arguments.command == "keys":
        from fastppo.training.config_keys import explain, overview

        return _show(lambda: explain(arguments.section) if arguments.section else overview())
    return _run(_train if arguments.command == "train" else _evaluate, arguments, overrides)


def _fail(status: int, message: object) -> int:
    print(f"fastppo: {message}", file=sys.stderr)
    return status


def _show(page: Callable[[], str]) -> int:
    try:
        print(page(), flush=True)
    except ValueError as error:  # an unknown FASTPPO_BACKEND or section
        return _fail(2, error)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  what Python flushes on its way out
    return 0


def _run(command, arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run a command on a configuration. Errors that a user can mend become one line each."""
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
        return _fail(2, error)
    except (ModelError, DataError, RewardError, CheckpointError, NonFiniteError, FloatingPointError) as error:
        return _fail(1, error)
    except OSError as error:
        return _fail(1, f"{error.filename or ''}: {error.strerror or error}")
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
        return _fail(1, f"stopped at step {result.step}: {result.stopped}; --resume goes on")
    return 128 + result.interrupted_by if result.interrupted_by else 0


def _evaluate(arguments: argparse.Namespace, config) -> int:
    from fastppo.training.evaluate import evaluate_policy

    metrics, rows = evaluate_policy(config, arguments.model)
    rows = rows[: arguments.samples]
    if arguments.json:
        print(json.dumps({"metrics": metrics, "samples": rows}))
        return 0
    for row in rows:
        print(f"{row['reward']:+.3f}  {row['prompt']!r} -> {row['completion']!r}")
    for name, value in metrics.items():
        print(f"{name:24} {value:.4f}")
    return 0
