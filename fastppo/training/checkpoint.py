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
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from fastppo.config_fields import NonNegativeInt
from fastppo.engines.dispatch import FastPPOWarning
from fastppo.errors import FastPPOError, one_line, quote
from fastppo.training.files import atomic_folder, delete_folder, delete_temporary, make_folder, naming, sync

FORMAT, VERSION = "fastppo-checkpoint", 1
_MANIFEST = "manifest.json"
# A step saved again is `step-000010.1` until its predecessor is deleted, so that one of the two is always there.
_FOLDER = re.compile(r"step-(\d{6,})(?:\.(\d+))?")


class _File(TypedDict):
    size: NonNegativeInt
    sha256: str


class _Manifest(TypedDict):
    format: str
    version: int
    step: NonNegativeInt
    # Names of files in the folder itself, never paths out of it.
    files: dict[Annotated[str, Field(pattern=r"^[^/\\\x00.][^/\\\x00]*$", max_length=255)], _File]


_MANIFEST_TYPE = TypeAdapter(_Manifest)


class CheckpointError(FastPPOError, RuntimeError):
    """A checkpoint that cannot be saved, is damaged, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums have been verified. Tensors are read on demand."""

    path: Path
    step: int
    state: dict[str, Any]
    config: dict[str, Any]
    files: frozenset[str]
    """Names of the verified files."""

    def tensors(self, group: str) -> dict[str, Tensor]:
        """Read a group's tensors into CPU memory, contiguous; tied tensors are one tensor again.

        Raises:
            CheckpointError: there is no such group, or its file cannot be read.
        """
        with restoring(f"{self.path}: {group}.safetensors"):
            if f"{group}.safetensors" not in self.files:
                raise CheckpointError("is not part of the checkpoint")
            with safe_open(self.path / f"{group}.safetensors", framework="pt", device="cpu") as file:
                # safetensors maps the file; the clones outlive it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                tied = json.loads(file.metadata()["tied"])
            if both := sorted(tied.keys() & tensors.keys()):
                raise CheckpointError(f"{quote(both[0])} is stored, and tied to another tensor as well")
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
        make_folder(root)
        delete_temporary(root)
        earlier = _folders(root)
        same_step = [path for number, path in earlier if number == step]
        attempt = int(same_step[-1].suffix[1:] or 0) + 1 if same_step else 0
        target = final.with_suffix(f".{attempt}") if attempt else final
        with atomic_folder(target) as folder:
            with ThreadPoolExecutor(max_workers=8) as pool:
                written = pool.map(lambda name: _write(folder / name, writers[name]), writers)
                files = dict(zip(writers, written, strict=True))
            manifest = _manifest_bytes({"format": FORMAT, "version": VERSION, "step": step, "files": files})
            _write(folder / _MANIFEST, partial(Path.write_bytes, data=manifest))
    except OSError as error:
        there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        space = f" (it needs {num_bytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free)" if free < num_bytes else ""
        raise CheckpointError(
            f"{root}: the checkpoint of step {step} could not be saved: {error}{space}. Older checkpoints are untouched"
        ) from error

    try:
        for path in same_step:
            delete_folder(path)
        if target != final:
            os.rename(target, final)
            target = final
            sync(root)
        wanted = {number for number in keep_for if number < step}
        _delete_old([(number, path) for number, path in earlier if number < step], keep_last - 1, wanted)
    except OSError as error:
        message = f"{root}: step {step} is saved, but an older checkpoint could not be deleted: {error}"
        warnings.warn(message, FastPPOWarning, stacklevel=2)
    return target


def find_checkpoint(root: Path, *, until: int | None = None) -> Checkpoint | None:
    """Return the newest undamaged checkpoint (not after step `until`), or None if there is none at all.

    A FastPPOWarning tells of each damaged one that is passed over.

    Raises:
        CheckpointError: the folder exists but cannot be listed, or all are damaged; the message says how the newest is.
    """
    try:
        folders = _folders(Path(root))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{root}: checkpoints cannot be listed ({error.strerror})") from error
    damaged = []
    for step, path in reversed(folders):
        if until is None or step <= until:
            try:
                found = load_checkpoint(path)
            except CheckpointError as error:
                damaged.append(error)
                continue
            for error in damaged:
                warnings.warn(f"skipped a damaged checkpoint: {error}", FastPPOWarning, stacklevel=2)
            return found
    if damaged:
        raise CheckpointError(f"no checkpoint can be used; the newest: {damaged[0]}") from damaged[0]
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint's folder and verify the checksums of all its files.

    Raises:
        CheckpointError: a file is missing, truncated, changed or unreadable; the message names it.
    """
    path = Path(path)
    try:
        manifest = _read_manifest(path)
        if (found := _FOLDER.fullmatch(path.name)) and int(found[1]) != manifest["step"]:
            raise CheckpointError(f"{path}: {_MANIFEST}: step is {manifest['step']}, unlike in the folder's name")
        files = manifest["files"]
        for name, file in files.items():
            if not (path / name).is_file():
                raise CheckpointError(f"{path}: {name} is missing")
            if (size := (path / name).stat().st_size) != file["size"]:
                raise CheckpointError(f"{path}: {name} has {size} bytes, {file['size']} bytes were written")
        with ThreadPoolExecutor(max_workers=8) as pool:
            for name, now in zip(files, pool.map(_size_and_hash, [path / name for name in files]), strict=True):
                if now != files[name]:
                    raise CheckpointError(f"{path}: {name} has changed since it was written (sha256 differs)")
        trees = []
        for name in ("state.json", "config.json"):
            with restoring(f"{path}: {name}"):
                trees.append(json.loads((path / name).read_bytes()))
            if not isinstance(trees[-1], dict):
                raise CheckpointError(f"{path}: {name}: expected an object, got {quote(trees[-1])}")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    return Checkpoint(path, manifest["step"], *trees, frozenset(files))


def discard_checkpoints(root: Path, *, after: int) -> None:
    """Delete the checkpoints of steps later than `after`, the latest first; CheckpointError if that fails."""
    try:
        for step, path in reversed(_folders(Path(root))):
            if step > after:
                delete_folder(path)
        sync(Path(root))
    except OSError as error:
        raise CheckpointError(f"{root}: a checkpoint after step {after} cannot be deleted ({error})") from error


@contextlib.contextmanager
def restoring(where: str) -> Iterator[None]:
    """Turn whatever a part of a checkpoint makes its loader raise into a CheckpointError that says where."""
    try:
        yield
    except Exception as error:
        problem = one_line(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            problem = one_line(f"{'.'.join(map(str, first['loc']))}: {first['msg']}, got {quote(first['input'])}")
        elif isinstance(error, KeyError):
            problem = f"lacks {quote(*error.args)}"
        elif not isinstance(error, FastPPOError):
            problem = f"cannot be restored ({type(error).__name__}: {problem})"
        raise CheckpointError(f"{where}: {problem}") from error


def check_like(saved: Any, own: Any, key: str = "") -> None:
    """Check that a saved state can take the place of an object's own.

    It has to have the keys of `own` and values of their types, integers within 64 bits. Flags, and keys that begin with
    an underscore, may be absent: other versions of a library have others.

    Raises:
        CheckpointError: it cannot; the message begins with the dotted key.
    """
    if own is None or own == {}:  # nothing to compare with
        return
    where = f"{key}: " if key else ""
    kinds: dict[type, Any] = {float: int | float, tuple: list | tuple}
    if not isinstance(saved, kinds.get(type(own), type(own))) or (isinstance(saved, bool) and type(own) is not bool):
        raise CheckpointError(f"{where}expected {type(own).__name__}, got {quote(saved)}")
    if isinstance(own, dict):
        for name, value in own.items():
            if name in saved:
                check_like(saved[name], value, f"{key}.{name}" if key else name)
            elif not (name.startswith("_") or value is None or isinstance(value, bool)):
                raise CheckpointError(f"{where}lacks {quote(name)}")
    elif isinstance(own, list | tuple):
        if len(saved) != len(own):
            raise CheckpointError(f"{where}expected {len(own)} items, got {len(saved)}")
        for index, (item, value) in enumerate(zip(saved, own, strict=True)):
            check_like(item, value, f"{key}.{index}")
    elif isinstance(saved, int) and not -(2**63) <= saved < 2**63:
        raise CheckpointError(f"{where}{quote(saved)} is out of range")


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
    """Write a file; returns its size in bytes and sha256."""
    with naming(path):
        write(path)
        with contextlib.suppress(OSError):  # safetensors makes files that only their owner can read
            os.chmod(path, path.parent.stat().st_mode & 0o666)
        return _size_and_hash(path)


def _size_and_hash(path: Path) -> dict[str, Any]:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
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
    except (ValueError, TypeError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: {_MANIFEST} is damaged")
    with restoring(f"{path}: {_MANIFEST}"):
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            found = one_line(f"{manifest['format']} version {quote(manifest['version'])}", 100)
            raise CheckpointError(f"{found}, this fastppo reads {FORMAT} version {VERSION}")
        _MANIFEST_TYPE.validate_python(manifest, strict=True)
        if missing := {"state.json", "config.json"} - manifest["files"].keys():
            raise CheckpointError(f"files: lacks {quote(min(missing))}")
    return manifest


def _folders(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, oldest first."""
    found = [(_FOLDER.fullmatch(path.name), path) for path in root.iterdir()]
    numbered = sorted((int(m[1]), int(m[2] or 0), path) for m, path in found if m and path.is_dir())
    return [(step, path) for step, _, path in numbered]


def _delete_old(folders: list[tuple[int, Path]], keep: int, keep_for: set[int]) -> None:
    """Delete all but the newest `keep`, and for each step of `keep_for` the newest of that step or before."""
    for step, path in reversed(folders):
        if keep <= 0 and not any(step <= wanted for wanted in keep_for):
            delete_folder(path)
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
