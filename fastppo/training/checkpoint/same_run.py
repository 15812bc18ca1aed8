"""Compare the configuration of a run that resumes with the one in its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from fastppo.training.checkpoint.store import CheckpointError

MAY_DIFFER = frozenset({
    "output_dir", "total_steps", "tensorboard", "on_nonfinite", "checkpoint", "eval", "watch", "model.allow_download",
})  # fmt: skip
"""Keys, with all keys below them, that may change on resume: no training step depends on them.

`total_steps` is among them so that a run can be prolonged. A learning-rate schedule that decays to an end then decays
to the new end, so the resumed run differs from one that had the new `total_steps` from the start.
"""

_ABSENT = object()


def check_same_run(saved: dict[str, Any], given: dict[str, Any], *, may_differ: Collection[str] = MAY_DIFFER) -> None:
    """Raise a CheckpointError with every differing key and both values, unless two configuration trees agree.

    Args:
        saved: the checkpoint's configuration.
        given: that of the run that resumes.
        may_differ: dotted keys that are not compared, each with all keys below it (`eval` or `eval.*`).
    """
    free = tuple(f"{key.removesuffix('.*')}." for key in may_differ)
    differences = [
        f"{key} was {_show(was)}, is now {_show(now)}"
        for key, was, now in _differences(saved, given, "")
        if not f"{key}.".startswith(free)
    ]
    if differences:
        raise CheckpointError(
            f"the configuration differs from the checkpoint's: {'; '.join(differences)}. Resume with the saved values, "
            "or start a new run with another output_dir"
        )


def _differences(saved: Any, given: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, list | tuple) and isinstance(given, list | tuple):
        saved, given = dict(enumerate(saved)), dict(enumerate(given))
    if isinstance(saved, dict) and isinstance(given, dict):
        for name in {**saved, **given}:
            below = f"{key}.{name}" if key else str(name)
            yield from _differences(saved.get(name, _ABSENT), given.get(name, _ABSENT), below)
    elif saved != given and not (saved != saved and given != given):  # NaN equals NaN
        yield key, saved, given


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, default=str)
