"""Atomic, checksummed checkpoint folders of tensors and JSON values; no pickle.

    root/step-000010/
        policy.safetensors ...   one file for each group of tensors
        state.json               step counters, data position, controllers, schedulers
        config.json              the run's configuration
        manifest.json            written last: size and sha256 of every other file, and its own sha256

A checkpoint is written to a hidden folder, its files are synced to disk, and one rename gives the folder its name. A
process killed at any instant leaves it whole or absent. Older ones are deleted only after that rename is on disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastppo.engines.dispatch import FastPPOWarning
from fastppo.errors import FastPPOError

FORMAT, VERSION = "fastppo-checkpoint", 1
MAY_DIFFER = frozenset({
    "output_dir", "total_steps", "tensorboard", "on_nonfinite", "checkpoint", "eval", "watch", "model.allow_download",
})  # fmt: skip
"""Keys, with all keys below them, that may change on resume: no training step depends on them.

`total_steps` is among them so that a run can be prolonged. A learning-rate schedule that decays to an end then decays
to the new end, so the resumed run differs from one that had the new `total_steps` from the start.
"""

# Options that earlier versions had, with the values at which today's code computes the same.
_REMOVED = {
    "length_penalty": 0.0, "reward_clip": None, "preconditioner": "none", "preconditioner_probes": 8,
    "vector_dtype": "auto", "vector_device": "auto",
}  # fmt: skip
_ABSENT = object()
_MANIFEST = "manifest.json"
_SAVING, _TRASH = ".saving-", ".trash-"
# A step saved again is `step-000010.1` until its predecessor is deleted, so that one of the two is always there.
_FOLDER = re.compile(r"step-(\d{6,})(?:\.(\d+))?")


class CheckpointError(FastPPOError, RuntimeError):
    """A checkpoint that cannot be saved, is damaged, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums have been verified. Tensors are read on demand."""

    path: Path
    step: int
    state: dict[str, Any]
    config: dict[str, Any]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Read a group's tensors into CPU memory, contiguous; tied tensors are one tensor again.

        Raises:
            CheckpointError: there is no such group, or its file can no longer be read.
        """
        try:
            with safe_open(self.path / f"{group}.safetensors", framework="pt", device="cpu") as file:
                # safetensors maps the file; the clones outlive it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                tied = json.loads(file.metadata()["tied"])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: {group}.safetensors can no longer be read ({error})") from error
        return tensors | {name: tensors[kept] for name, kept in tied.items()}


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    config: dict[str, Any],
    keep_last: int,
    keep_for: Collection[int] = (),
) -> Path:
    """Write a checkpoint, then delete old ones. On return it survives a crash of the process or the machine.

    Args:
        root: folder of a run's checkpoints; made if missing.
        step: number of completed steps, >= 0. A checkpoint of the same step is replaced, those of later steps stay.
        tensors: group -> name -> dense tensor, which nothing may modify meanwhile. Each group becomes
            `<group>.safetensors`. Tied tensors (same memory, shape, strides and dtype) are stored once.
        state, config: JSON values, of which floats keep every bit, NaN and infinities included.
        keep_last: number of checkpoints to keep, this one included, >= 1. Damaged ones do not count.
        keep_for: for each of these steps, also keep the newest checkpoint of that step or before.

    Returns:
        The checkpoint's folder, `root/step-<step, six digits>`.

    Raises:
        CheckpointError: it could not be written. Older checkpoints are untouched and no partial one remains.
        TypeError: a value that JSON cannot hold; the message names it.
    """
    root = Path(root)
    _check_json(state, "state")
    _check_json(config, "config")
    writers: dict[str, Callable[[Path], Any]] = {
        "state.json": partial(Path.write_bytes, data=_json_bytes(state)),
        "config.json": partial(Path.write_bytes, data=_json_bytes(config)),
    }
    num_bytes = 0
    for group, named in tensors.items():
        stored, tied = _without_shared_memory(named)
        num_bytes += sum(tensor.nbytes for tensor in stored.values())
        writers[f"{group}.safetensors"] = partial(save_file, stored, metadata={"tied": json.dumps(tied)})
    for device in {tensor.device for named in tensors.values() for tensor in named.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # the writers' threads do not wait for this thread's streams

    final = root / f"step-{step:06d}"
    try:
        missing = [folder for folder in (root, *root.parents) if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            _fsync_folder(folder.parent)
        _delete_leftovers(root)
        earlier = _folders(root)
        same_step = [path for number, path in earlier if number == step]
        attempt = int(same_step[-1].suffix[1:] or 0) + 1 if same_step else 0
        target = final.with_suffix(f".{attempt}") if attempt else final
        temporary = root / f"{_SAVING}{final.name}-{secrets.token_hex(4)}"
        try:
            os.mkdir(temporary)
            with ThreadPoolExecutor(max_workers=8) as pool:
                written = pool.map(lambda name: _write(temporary / name, writers[name]), writers)
                files = dict(zip(writers, written, strict=True))
            manifest = _manifest_bytes({"format": FORMAT, "version": VERSION, "step": step, "files": files})
            _write(temporary / _MANIFEST, partial(Path.write_bytes, data=manifest))
            _fsync_folder(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _fsync_folder(root)
    except (OSError, SafetensorError) as error:
        there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        space = f" (it needs {num_bytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free)" if free < num_bytes else ""
        raise CheckpointError(
            f"{root}: the checkpoint of step {step} could not be saved: {error}{space}. Older checkpoints are untouched"
        ) from error

    try:
        for path in same_step:
            _delete(path)
        if target != final:
            os.rename(target, final)
            target = final
            _fsync_folder(root)
        wanted = {number for number in keep_for if number < step}
        _delete_old([(number, path) for number, path in earlier if number < step], keep_last - 1, wanted)
    except OSError as error:
        message = f"{root}: step {step} is saved, but an older checkpoint could not be deleted: {error}"
        warnings.warn(message, FastPPOWarning, stacklevel=2)
    return target


def find_checkpoint(root: Path, *, until: int | None = None) -> Checkpoint | None:
    """Return the newest undamaged checkpoint (not after step `until`), or None; warn of each damaged one.

    Raises:
        CheckpointError: the folder exists but cannot be listed.
    """
    try:
        folders = _folders(Path(root))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{root}: checkpoints cannot be listed ({error.strerror})") from error
    for step, path in reversed(folders):
        if until is None or step <= until:
            try:
                return load_checkpoint(path)
            except CheckpointError as error:
                warnings.warn(f"skipped a damaged checkpoint: {error}", FastPPOWarning, stacklevel=2)
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint's folder and verify the checksums of all its files.

    Raises:
        CheckpointError: a file is missing, truncated, changed or unreadable; the message names it.
    """
    path = Path(path)
    try:
        manifest = _read_manifest(path)
        files = manifest["files"]
        with ThreadPoolExecutor(max_workers=8) as pool:
            found = pool.map(_size_and_hash, [path / name for name in files])
            for (name, was), now in zip(files.items(), found, strict=True):
                if now["size"] != was["size"]:
                    raise CheckpointError(f"{path}: {name} has {now['size']} bytes, {was['size']} bytes were written")
                if now != was:
                    raise CheckpointError(f"{path}: {name} has changed since it was written (sha256 differs)")
        state, config = (json.loads((path / name).read_bytes()) for name in ("state.json", "config.json"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    return Checkpoint(path, manifest["step"], state, config)


def discard_checkpoints(root: Path, *, after: int) -> None:
    """Delete the checkpoints of steps later than `after`, the latest first; CheckpointError if that fails."""
    try:
        for step, path in reversed(_folders(Path(root))):
            if step > after:
                _delete(path)
        _fsync_folder(Path(root))
    except OSError as error:
        raise CheckpointError(f"{root}: a checkpoint after step {after} cannot be deleted ({error})") from error


def check_same_run(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise a CheckpointError with every differing key and both values, unless two configuration trees agree.

    Args:
        saved: the checkpoint's configuration.
        given: that of the run that resumes. The keys of `MAY_DIFFER` are not compared.
    """
    free = tuple(f"{key}." for key in MAY_DIFFER)
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
    """(dotted key, saved value, given value) wherever two trees differ."""
    if isinstance(saved, list | tuple) and isinstance(given, list | tuple):
        saved, given = dict(enumerate(saved)), dict(enumerate(given))
    if isinstance(saved, dict) and isinstance(given, dict):
        for name in {**saved, **given}:
            was, now = saved.get(name, _ABSENT), given.get(name, _ABSENT)
            if now is not _ABSENT or was != _REMOVED.get(name, _ABSENT):
                yield from _differences(was, now, f"{key}.{name}" if key else str(name))
    elif saved != given and not (saved != saved and given != given):  # NaN equals NaN
        yield key, saved, given


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, default=str)


def _check_json(value: Any, name: str) -> None:
    """Raise TypeError for values that JSON refuses or silently changes (tuples, integer keys)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name}: the key {key!r} is a {type(key).__name__}; JSON has only string keys")
            _check_json(item, f"{name}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, f"{name}.{index}")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"{name}: {type(value).__name__} is not a JSON value (dict, list, str, int, float, bool, None)")


def _without_shared_memory(named: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as `save_file` needs them, contiguous and none in another's memory; and tied name -> stored name."""
    stored, tied, names, storages = {}, {}, {}, set()
    for name, tensor in named.items():
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and names.setdefault(memory, name) != name:
            tied[name] = names[memory]
            continue
        tensor = tensor.detach().contiguous()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        stored[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return stored, tied


def _write(path: Path, write: Callable[[Path], Any]) -> dict[str, Any]:
    """Write a file and sync it to disk; returns its size in bytes and sha256."""
    write(path)
    with contextlib.suppress(OSError):  # safetensors makes files that only their owner can read
        os.chmod(path, path.parent.stat().st_mode & 0o666)
    return _size_and_hash(path, sync=True)


def _size_and_hash(path: Path, *, sync: bool = False) -> dict[str, Any]:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        if sync:
            os.fsync(file.fileno())
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def _json_bytes(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, indent=1).encode("ascii") + b"\n"


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    return _json_bytes({**manifest, "sha256": hashlib.sha256(_json_bytes(manifest)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, Any]:
    raw = (path / _MANIFEST).read_bytes()
    try:
        manifest = json.loads(raw)
        del manifest["sha256"]
        sound = _manifest_bytes(manifest) == raw
    except (ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: {_MANIFEST} is damaged")
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
        found = f"{manifest['format']} version {manifest['version']}"
        raise CheckpointError(f"{path}: {found}, this fastppo reads {FORMAT} version {VERSION}")
    return manifest


def _fsync_folder(path: Path) -> None:
    """Sync a folder's entries; a file's own fsync does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def _folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, oldest first."""
    found = [(_FOLDER.fullmatch(path.name), path) for path in root.iterdir()]
    numbered = sorted((int(m[1]), int(m[2] or 0), path) for m, path in found if m and path.is_dir())
    return [(step, path) for step, _, path in numbered]


def _delete(path: Path) -> None:
    """Rename a folder, then delete it, so that one deleted in part never looks like a checkpoint."""
    trash = path.with_name(f"{_TRASH}{path.name}-{secrets.token_hex(4)}")
    os.rename(path, trash)
    shutil.rmtree(trash)


def _delete_old(folders: list[tuple[int, Path]], keep: int, keep_for: set[int]) -> None:
    """Delete all but the newest `keep`, and for each step of `keep_for` the newest of that step or before."""
    for step, path in reversed(folders):
        if keep <= 0 and not any(step <= wanted for wanted in keep_for):
            _delete(path)
        elif _has_all_files(path):
            keep -= 1
            keep_for = {wanted for wanted in keep_for if wanted < step}


def _has_all_files(path: Path) -> bool:
    """Whether the manifest is sound and every file has its size. Nothing is hashed, so that saving stays fast."""
    try:
        files = _read_manifest(path)["files"]
        return all((path / name).stat().st_size == file["size"] for name, file in files.items())
    except (CheckpointError, OSError):
        return False


def _delete_leftovers(root: Path) -> None:
    """Delete the temporary folders of killed processes."""
    for path in root.iterdir():
        try:
            if path.name.startswith((_SAVING, _TRASH)):
                shutil.rmtree(path)
        except OSError as error:
            message = f"{root}: what a killed run left could not be deleted: {error}"
            warnings.warn(message, FastPPOWarning, stacklevel=3)
