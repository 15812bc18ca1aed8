"""Functions on several ranks: processes of one gloo group, forked from a server that has imported the packages once."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "pytest", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama", "transformers.optimization",
    "transformers.convert_slow_tokenizer", "peft", "fastppo.training.trainer",
])  # fmt: skip
_SERVER = {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}


def start_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[tuple[Any, Any]]:
    """Start `function(*arguments)` on each rank; returns each one's process, and the pipe that it reports to."""
    with tempfile.NamedTemporaryFile(delete=False) as store:
        pass
    started = []
    with mock.patch.dict(os.environ, _SERVER):  # which starts here
        for rank in range(num_ranks):
            reader, writer = _CONTEXT.Pipe(duplex=False)
            given = (rank, num_ranks, store.name, writer, function, arguments)
            process = _CONTEXT.Process(target=_run, args=given, daemon=True)
            process.start()
            writer.close()
            started.append((process, reader))
    return started


def run_ranks(num_ranks: int, function: Callable[..., Any], *arguments: Any, seconds: float = 60) -> list[Any]:
    """What `function(*arguments)` returns on each rank. One rank alone is a process without a group."""
    started = start_ranks(num_ranks, function, *arguments)
    try:
        reports = [reader.recv() if reader.poll(seconds) else (None, "no answer") for _, reader in started]
    finally:
        for process, _ in started:
            process.join(timeout=5)
            process.kill()
    for rank, (_, trace) in enumerate(reports):
        assert trace is None, f"rank {rank} of {num_ranks}: {trace}"
    return [result for result, _ in reports]


def _run(rank: int, num_ranks: int, store: str, report: Any, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{num_ranks}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # which the group below does without
    if num_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    try:
        report.send((function(*arguments), None))
    except BaseException:
        report.send((None, traceback.format_exc()))
    if num_ranks > 1:
        dist.destroy_process_group()
