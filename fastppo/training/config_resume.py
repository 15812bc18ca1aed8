"""Which keys of the configuration may change when a run is resumed, and the check of all others."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator
from typing import Any

from fastppo.algorithms.config import AlgorithmConfig
from fastppo.errors import one_line, quote
from fastppo.training.checkpoint import CheckpointError
from fastppo.training.config import ALGORITHMS, Config, section_of

MAY_CHANGE = frozenset({
    # Where and how long. A learning-rate schedule that decays to an end then decays to the new end, so a run with
    # another `total_steps` differs from one that had it from the start.
    "output_dir", "total_steps",
    # Where and in what pieces the same numbers are computed, up to rounding.
    "device", "distributed", "backend", "model.attn_implementation", "model.gradient_checkpointing",
    "model.activation_offloading", "model.offload_idle", "batch.max_tokens",
    "rollout.generation_batch_size", "rewards.N.batch_size", "ALGORITHM.gradient_accumulation_steps",
    # What samples: other completions, of the same distribution.
    "rollout.engine", "rollout.vllm",
    # What is permitted.
    "model.allow_download", "model.trust_remote_code",
    # What is saved and shown, and what is done about trouble.
    "report_to", "project", "run_name", "on_nonfinite", "checkpoint.every", "checkpoint.keep_last",
    "model.lora.merge",
    "eval.every", "eval.num_prompts", "eval.num_samples", "eval.rewards", "eval.perplexity",
    "tensorboard",  # which earlier versions had in place of report_to
    "watch.defaults", "watch.baseline_steps", "watch.lr_factor", "watch.max_rollbacks", "watch.rules",
})  # fmt: skip
"""Keys, as `fastppo keys` names them, that may change on resume: a run's result does not depend on them.

`N` is any index, ALGORITHM any algorithm's section. The keys below one that is listed may change, too.
"""

# Options of algorithms that earlier versions had, with the values at which today's code computes the same.
_REMOVED = {
    "length_penalty": 0.0, "reward_clip": None, "preconditioner": "none", "preconditioner_probes": 8,
    "vector_dtype": "auto", "vector_device": "auto", "importance_sampling_cap": None,
}  # fmt: skip
_ABSENT = object()


def check_same_run(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise a CheckpointError with every differing key and both values, unless two configuration trees agree.

    A key that one of them lacks has its default there, so that a checkpoint can be older than a key.

    Args:
        saved: the checkpoint's configuration.
        given: that of the run that resumes. The keys of `MAY_CHANGE` are not compared.
    """
    differences = [
        f"{key} was {_show(was)}, is now {_show(now)}"
        for key, was, now in _differences(_filled(Config, saved), _filled(Config, given), "")
    ]
    if len(differences) > 8:
        differences[8:] = [f"and {len(differences) - 8} more"]
    if differences:
        raise CheckpointError(
            f"the configuration differs from the checkpoint's: {'; '.join(differences)}. Resume with the saved values, "
            "or start a new run with another output_dir"
        )


def may_change(key: str) -> bool:
    """Whether the key `rewards.0.batch_size`, for example, may change on resume."""
    parts = ["N" if part.isdecimal() else part for part in key.split(".")]
    parts[0] = "ALGORITHM" if parts[0] in ALGORITHMS else parts[0]
    return any(".".join(parts[:length]) in MAY_CHANGE for length in range(1, len(parts) + 1))


def _filled(section: type, tree: Any) -> Any:
    """A section's tree with the defaults of the keys that it lacks."""
    if not isinstance(tree, dict):
        return tree
    filled = {**_REMOVED, **tree} if issubclass(section, AlgorithmConfig) else dict(tree)
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        if item.name not in filled:
            if item.default is item.default_factory:  # required
                continue
            default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
            filled[item.name] = dataclasses.asdict(default) if dataclasses.is_dataclass(default) else default
        below, value = section_of(hints[item.name]), filled[item.name]
        if below is not None:
            filled[item.name] = [_filled(below, each) for each in value] if _is_list(value) else _filled(below, value)
    return filled


def _differences(saved: Any, given: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, saved value, given value) wherever two trees differ."""
    if _is_list(saved) and _is_list(given):
        saved, given = dict(enumerate(saved)), dict(enumerate(given))
    if isinstance(saved, dict) and isinstance(given, dict):
        for name in {**saved, **given}:
            below = f"{key}.{name}" if key else str(name)
            if not may_change(below):
                yield from _differences(saved.get(name, _ABSENT), given.get(name, _ABSENT), below)
    elif saved != given and not (saved != saved and given != given):  # NaN equals NaN
        yield key, saved, given


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    try:
        return one_line(json.dumps(value), 80)
    except (TypeError, ValueError, RecursionError):
        return quote(value)
