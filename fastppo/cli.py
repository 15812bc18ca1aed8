"""The `fastppo` command."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

import fastppo
from fastppo.errors import ConfigError, FastPPOError, one_line
from fastppo.extras import install_command

_DESCRIPTION = """\
Policy optimization of language models on one machine.

  fastppo train examples/sentiment.yaml            train, with checkpoints, curves and a report
  fastppo train CONFIG.yaml --ppo.kl_coef 0.1      the same with another value for one key
  fastppo train CONFIG.yaml --resume               go on from the newest checkpoint
  fastppo plan CONFIG.yaml --gpu-memory 24         whether it fits in memory, before anything is loaded
  fastppo eval CONFIG.yaml --model runs/x/final    held-out reward of a policy
  fastppo keys ppo                                 the configuration's keys, of one section or all
  fastppo doctor                                   what is installed, and which backends can be used and why
"""
_OUT_OF_MEMORY = ("CUDA out of memory", "DefaultCPUAllocator", "not enough memory")  # PyTorch's words
_LESS = "rollout.generation_batch_size, gradient_accumulation_steps, rollout.max_new_tokens"
_DISTRIBUTED = "fastppo.training.distributed"
_OVERRIDES = "Any key of the configuration can be given as --section.key value; `fastppo keys` lists them."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # its descriptor was closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream := getattr(sys, name), "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a completion may hold what this encoding lacks
    output_dir = config = None
    try:
        arguments, overrides = _parse(argv)
        try:
            os.getcwd()
        except OSError:  # one of PyTorch's libraries would end the process
            return _fail(1, "the current folder is gone; change to one that exists")
        if arguments.command == "doctor":
            from fastppo.doctor import report

            return _show(report())
        needed = ("transformers", "pydantic", "rich", "yaml", "jinja2", "matplotlib")  # the last two for the report
        if missing := [name for name in needed if not importlib.util.find_spec(name)]:
            return _fail(1, f"{', '.join(missing)} missing; {install_command('train')}")
        # They warn on import of 4-bit kernels that they could not load; nothing here multiplies in 4 bits.
        for name in ("bitsandbytes", "kernels"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if arguments.command == "keys":
            from fastppo.training.config_keys import explain, overview

            return _show(overview() if arguments.section is None else explain(arguments.section))
        planned = arguments.command == "plan"  # by one process, for however many
        if planned and os.environ.get("RANK", "0") != "0":
            return 0
        if distributed := None if planned else _distributed():
            distributed.connect()  # first, so that of all processes one tells of an error
            if os.environ["RANK"] != "0":
                warnings.simplefilter("ignore")
        from fastppo.training.config import load_config

        config = load_config(arguments.config, overrides)
        output_dir = os.path.expanduser(config.output_dir)
        status = {"train": _train, "plan": _plan, "eval": _evaluate}[arguments.command](arguments, config)
        if distributed:
            distributed.disconnect()
        return status
    except SystemExit as end:  # argparse has printed the help, the version or what is wrong
        end.code = _show("", end="") or end.code
        raise
    except KeyboardInterrupt as error:
        if distributed := sys.modules.get(_DISTRIBUTED):
            distributed.tells(error)  # else the others would tell of this one's end
        return 130
    except BaseException as error:
        return _explain(error, output_dir, config)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(one_line(message, 240))  # argparse itself repeats every word that it does not know


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the words that are overrides of the configuration."""
    run = {"epilog": _OVERRIDES, "allow_abbrev": False}  # an abbreviated option could as well be a misspelt key
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser("fastppo", description=_DESCRIPTION, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fastppo {fastppo.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train = commands.add_parser("train", help="train a policy", **run)
    train.add_argument("config", help="YAML file; see examples/")
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint in output_dir")
    train.add_argument("--plain", action="store_true", help="one plain line a step, also on a terminal")
    plan = commands.add_parser("plan", help="the memory that a run needs, from its configuration alone", **run)
    plan.add_argument("config", help="the run's YAML file")
    of_each = (
        "of each GPU in GiB, as nvidia-smi counts them: one sold as 24 GB has about 23.5 (default: this machine's)"
    )
    plan.add_argument("--gpu-memory", type=float, metavar="GIB", help=of_each)
    plan.add_argument("--gpus", type=int, metavar="N", help="processes, each with a GPU (default: torchrun's, else 1)")
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
    if arguments.command == "plan" and not 0 < (1.0 if arguments.gpu_memory is None else arguments.gpu_memory) < 1e6:
        parser.error(f"--gpu-memory must be above 0 and below 1000000, in GiB, got {arguments.gpu_memory:g}")
    if arguments.command == "plan" and not 1 <= (1 if arguments.gpus is None else arguments.gpus) <= 10**6:
        parser.error(f"--gpus must be from 1 to 1000000, got {arguments.gpus}")
    return arguments, overrides


def _fail(status: int, message: object) -> int:
    _write("stderr", f"fastppo: {one_line(message, 1000)}\n")
    return status


def _show(page: str, end: str = "\n") -> int:
    error = _write("stdout", page + end)
    if error is None or isinstance(error, BrokenPipeError):  # the reader, `head` for one, has seen enough
        return 0
    return _fail(1, f"standard output: {getattr(error, 'strerror', error)}")


def _write(stream: str, text: str) -> OSError | ValueError | None:
    """Write and flush; after an error the stream takes anything, so that Python's own flush at exit says nothing."""
    try:
        getattr(sys, stream).write(text)
        getattr(sys, stream).flush()
    except (OSError, ValueError) as error:  # ValueError: a reward function has closed it
        setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115
        return error
    return None


def _distributed() -> ModuleType | None:
    """`fastppo.training.distributed`, which loads torch, where this process is one of several."""
    several = (os.environ.get("WORLD_SIZE") or "1") != "1"
    return importlib.import_module(_DISTRIBUTED) if several else None


def _explain(error: BaseException, output_dir: str | None, config=None) -> int:
    """One line for what went wrong. What nobody foresaw leaves its traceback in a file."""
    distributed = sys.modules.get(_DISTRIBUTED)  # if loaded: what failed may have been the import of torch
    if distributed and not distributed.tells(error):
        return 2 if isinstance(error, ConfigError) else 1
    if isinstance(error, ConfigError):
        return _fail(2, error)
    if distributed and distributed.lost_process(error):
        why = one_line(str(error).partition(". ")[0], 120)
        return _fail(1, f"another process of this run has ended ({why}); --resume goes on from the newest checkpoint")
    if isinstance(error, FastPPOError | FloatingPointError | ImportError):
        return _fail(1, error)
    if isinstance(error, OSError) or "(os error " in one_line(error):  # as safetensors, which is Rust, words it
        # A write to a full disk does not name its file; what the command writes is in output_dir.
        named = getattr(error, "errno", 0) is None  # by its text, as libraries do
        where = getattr(error, "filename", None) or (None if named else output_dir)
        why = getattr(error, "strerror", None) or one_line(error)
        return _fail(1, f"{where}: {why}" if where else why)
    if isinstance(error, MemoryError) or any(words in one_line(error) for words in _OUT_OF_MEMORY):
        if config is not None:
            from fastppo.training.plan.report import out_of_memory

            return _fail(1, out_of_memory(error, config))
        return _fail(1, f"out of memory ({one_line(error)}); take a smaller model or less of it at a time: {_LESS}")
    text = "".join(traceback.format_exception(error))
    folder = output_dir if output_dir and os.path.isdir(output_dir) else tempfile.gettempdir()
    try:
        with open(os.path.join(folder, "traceback.txt"), "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        _write("stderr", text)
        return 1
    what = f"{type(error).__name__}: {one_line(error)}"
    return _fail(1, f"unexpected error, which is a bug in fastppo: {what}; please report it with {file.name}")


def _train(arguments: argparse.Namespace, config) -> int:
    import transformers

    from fastppo.training.allocator import keep_freed_memory, return_freed_memory
    from fastppo.training.plan.report import in_one_line
    from fastppo.training.progress import ProgressDisplay
    from fastppo.training.trainer import Trainer

    transformers.utils.logging.disable_progress_bar()
    return_freed_memory() if _distributed() else keep_freed_memory()
    if os.environ.get("RANK", "0") == "0" and (planned := in_one_line(config)):
        _show(planned)
    trainer = Trainer(config, resume=arguments.resume)
    if arguments.plain and trainer.ranks.rank == 0:
        trainer.progress = ProgressDisplay(config.total_steps, start_step=trainer.step, enabled=False)
    result = trainer.train()
    if trainer.ranks.rank != 0:  # the first one tells
        failed = int(result.stopped is not None)
        return 128 + result.interrupted_by if result.interrupted_by else failed
    policy = "" if result.final is None else f"policy: {result.final}\n"
    failed = _show(f"{policy}report: {result.report}")
    if result.stopped is not None:
        return _fail(1, f"stopped at step {result.step}: {result.stopped}; --resume goes on")
    return 128 + result.interrupted_by if result.interrupted_by else failed


def _plan(arguments: argparse.Namespace, config) -> int:
    from fastppo.training.distributed.launch import world_size
    from fastppo.training.plan import machine_of, page, plan

    return _show(page(plan(config, machine_of(config, arguments.gpu_memory, arguments.gpus or world_size()))))


def _evaluate(arguments: argparse.Namespace, config) -> int:
    from fastppo.training.evaluate import evaluate_policy

    metrics, rows = evaluate_policy(config, arguments.model)
    if os.environ.get("RANK", "0") != "0":
        return 0
    rows = rows[: arguments.samples]
    if arguments.json:
        return _show(json.dumps({"metrics": metrics, "samples": rows}))
    lines = [f"{row['reward']:+.3f}  {row['prompt']!r} -> {row['completion']!r}" for row in rows]
    return _show("\n".join([*lines, *(f"{name:24} {value:.4f}" for name, value in metrics.items())]))
