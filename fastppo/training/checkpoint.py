"""Atomic, checksummed checkpoint folders of tensors and JSON values; no pickle.

    root/step-000010/
        policy.safetensors ...   one file for each group of tensors; of several processes, one of each with its part:
                                 policy-0.safetensors, policy-1.safetensors ...
        state.json               step counters, data position, controllers, schedulers
        config.json              the run's configuration
        manifest.json            written last: size and sha256 of every other file, and its own sha256

A checkpoint is written to a hidden folder, its files are synced to disk, and one rename gives the folder its name. A
process killed at any instant leaves it whole or absent. Older ones are deleted only after that rename is on disk.

Several processes save and load together: every rank makes the same calls in the same order, and an error of one rank is
raised on all. torch.distributed.checkpoint plans who writes what, and who reads what on another number of ranks. Its
own files are not used: their metadata is a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
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
from torch.distributed.checkpoint import DefaultSavePlanner, Metadata, SavePlan, TensorStorageMetadata
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties
from torch.distributed.tensor import DTensor
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from fastppo.algorithms.ranks import Ranks
from fastppo.config_fields import NonNegativeInt
from fastppo.engines.dispatch import FastPPOWarning
from fastppo.errors import FastPPOError, one_line, quote
from fastppo.training.files import atomic_folder, delete_folder, delete_temporary, make_folder, naming, sync

FORMAT, VERSION = "fastppo-checkpoint", 1
_MANIFEST = "manifest.json"
_ONE = Ranks()
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
    ranks: Ranks
    """Those that read it together."""

    def tensors(self, group: str, like: Callable[[str], Tensor | None] = lambda name: None) -> dict[str, Tensor]:
        """Read a group's tensors into CPU memory, contiguous; tied tensors are one tensor again.

        Args:
            like: where this returns, for a tensor's name, a DTensor of its shape, the tensor is sharded as that one is,
                and each rank reads only its part.

        Raises:
            CheckpointError: there is no such group, or its files cannot be read.
        """
        tensors: dict[str, Tensor] = {}
        with self.ranks.agreed():
            self._read(group, like, tensors)
        return tensors

    def _read(self, group: str, like: Callable[[str], Tensor | None], tensors: dict[str, Tensor]) -> None:
        pattern = re.compile(re.escape(group) + r"(-\d+)?\.safetensors")
        names = sorted(name for name in self.files if pattern.fullmatch(name))
        parts: dict[str, dict[torch.Size, Tensor]] = {}  # of each tensor, by offset
        tied: dict[str, str] = {}
        with restoring(f"{self.path}: {group}.safetensors"), contextlib.ExitStack() as stack:
            if not names:
                raise CheckpointError("is not part of the checkpoint")
            for file in (stack.enter_context(safe_open(self.path / name, "pt", "cpu")) for name in names):
                metadata = file.metadata()
                tied |= json.loads(metadata.get("tied", "{}"))
                offsets = json.loads(metadata.get("offsets", "{}"))
                for name in file.keys():  # noqa: SIM118
                    part = file.get_tensor(name)  # mapped, not read
                    parts.setdefault(name, {})[torch.Size(offsets.get(name, [0] * part.ndim))] = part
            if both := sorted(tied.keys() & parts.keys()):
                raise CheckpointError(f"{quote(both[0])} is stored, and tied to another tensor as well")
            saved = {name: _metadata(name, parts[name]) for name in sorted(parts)}
            for name, stored in saved.items():
                own, dtype = like(name), stored.properties.dtype
                if isinstance(own, DTensor) and own.shape == stored.size:
                    tensors[name] = torch.empty_like(own, dtype=dtype, device="cpu", requires_grad=False)
                else:
                    tensors[name] = torch.empty(stored.size, dtype=dtype)
            for item in create_default_local_load_plan(tensors, Metadata(saved)).items:
                name, offset = item.storage_index.fqn, item.storage_index.offset
                target = tensors[name].to_local() if isinstance(tensors[name], DTensor) else tensors[name]
                source = parts[name][offset][_slices(item.storage_offsets, item.lengths)]
                target[_slices(item.dest_offsets, item.lengths)].copy_(source)
            tensors |= {name: tensors[kept] for name, kept in tied.items()}


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    config: dict[str, Any],
    keep_last: int,
    keep_for: Collection[int] = (),
    ranks: Ranks = _ONE,
) -> Path:
    """Write a checkpoint, then delete old ones. On return it survives a crash of the process or the machine.

    Args:
        root: folder of a run's checkpoints; made if missing.
        step: number of completed steps, >= 0. A checkpoint of the same step is replaced, those of later steps stay.
        tensors: group -> name -> dense tensor, which nothing may modify meanwhile. Each group becomes
            `<group>.safetensors`. One process stores tied tensors (same memory, shape, strides and dtype) once. Of a
            DTensor each rank writes its part. Other tensors that ranks have under one name are the same on all.
        state, config: JSON values, of which floats keep every bit, NaN and infinities included. Rank 0's are saved.
        keep_last: number of checkpoints to keep, this one included, >= 1. Damaged ones do not count.
        keep_for: for each of these steps, also keep the newest checkpoint of that step or before.
        ranks: those that write it together.

    Returns:
        The checkpoint's folder, `root/step-<step, six digits>`.

    Raises:
        CheckpointError: it could not be written. Older checkpoints are untouched and no partial one remains.
        TypeError: a value that JSON cannot hold; the message names it.
    """
    root = Path(root)
    tied = {group: _tied(named) if ranks.size == 1 else {} for group, named in tensors.items()}
    stored = {
        f"{group}/{name}": tensor.detach()
        for group, named in tensors.items()
        for name, tensor in named.items()
        if name not in tied[group]
    }
    for device in {tensor.device for tensor in stored.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # the writers' threads do not wait for this thread's streams
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(stored)
    final = root / f"step-{step:06d}"
    try:
        with contextlib.ExitStack() as stack:
            earlier, target, folder = ranks.first(lambda: _begin(root, step, stack))
            plans = ranks.each(planner.create_local_plan)
            plan = ranks.first(lambda: planner.create_global_plan(plans)[0])[ranks.rank]
            documents = {"state": state, "config": config}
            parts = ranks.each(lambda: _write_part(folder, plan, planner, tied, documents, ranks))
            files = {name: file for part in parts for name, file in part.items()}
            ranks.first(lambda: _finish(folder, {"step": step, "files": files}, stack))
    except OSError as error:
        num_bytes = sum(tensor.nbytes for tensor in stored.values())
        there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        space = f" (it needs {num_bytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free)" if free < num_bytes else ""
        raise CheckpointError(
            f"{root}: the checkpoint of step {step} could not be saved: {error}{space}. Older checkpoints are untouched"
        ) from error
    if ranks.rank > 0:
        return final

    same_step = [path for number, path in earlier if number == step]
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


def find_checkpoint(root: Path, *, until: int | None = None, ranks: Ranks = _ONE) -> Checkpoint | None:
    """Return the newest undamaged checkpoint (not after step `until`), or None if there is none at all.

    A FastPPOWarning tells of each damaged one that is passed over.

    Raises:
        CheckpointError: the folder exists but cannot be listed, or all are damaged; the message says how the newest is.
    """
    root = Path(root)
    try:
        folders = ranks.first(lambda: _folders(root))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{root}: checkpoints cannot be listed ({error.strerror})") from error
    damaged = []
    for step, path in reversed(folders):
        if until is None or step <= until:
            try:
                found = load_checkpoint(path, ranks)
            except CheckpointError as error:
                damaged.append(error)
                continue
            for error in damaged if ranks.rank == 0 else ():
                warnings.warn(f"skipped a damaged checkpoint: {error}", FastPPOWarning, stacklevel=2)
            return found
    if damaged:
        raise CheckpointError(f"no checkpoint can be used; the newest: {damaged[0]}") from damaged[0]
    return None


def load_checkpoint(path: Path, ranks: Ranks = _ONE) -> Checkpoint:
    """Open a checkpoint's folder and verify the checksums of all its files, of which each rank reads its share.

    Raises:
        CheckpointError: a file is missing, truncated, changed or unreadable; the message names it.
    """
    path = Path(path)
    with ranks.agreed():
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
            own = sorted(files, key=lambda name: files[name]["size"])[ranks.rank :: ranks.size]
            with ThreadPoolExecutor(max_workers=8) as pool:
                for name, now in zip(own, pool.map(_size_and_hash, [path / name for name in own]), strict=True):
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
    return Checkpoint(path, manifest["step"], *trees, frozenset(files), ranks)


def discard_checkpoints(root: Path, *, after: int, ranks: Ranks = _ONE) -> None:
    """Delete the checkpoints of steps later than `after`, the latest first; CheckpointError if that fails."""
    ranks.first(lambda: _discard(Path(root), after))


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


def _discard(root: Path, after: int) -> None:
    try:
        for step, path in reversed(_folders(root)):
            if step > after:
                delete_folder(path)
        sync(root)
    except OSError as error:
        raise CheckpointError(f"{root}: a checkpoint after step {after} cannot be deleted ({error})") from error


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


def _tied(named: dict[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one of these -> that one's name; DTensors, without memory to see, are not."""
    tied, names = {}, {}
    for name, tensor in named.items():
        if tensor.numel() and not isinstance(tensor, DTensor):
            memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if names.setdefault(memory, name) != name:
                tied[name] = names[memory]
    return tied


def _begin(root: Path, step: int, stack: contextlib.ExitStack) -> tuple[list[tuple[int, Path]], Path, Path]:
    """Open a hidden folder; returns the earlier checkpoints, the name that it gets when `stack` closes, and it."""
    make_folder(root)
    delete_temporary(root)
    earlier = _folders(root)
    same_step = [path for number, path in earlier if number == step]
    target = root / f"step-{step:06d}"
    if same_step:
        target = target.with_suffix(f".{int(same_step[-1].suffix[1:] or 0) + 1}")
    return earlier, target, stack.enter_context(atomic_folder(target))


def _write_part(
    folder: Path,
    plan: SavePlan,
    planner: DefaultSavePlanner,
    tied: dict[str, dict[str, str]],
    documents: dict[str, Any],
    ranks: Ranks,
) -> dict[str, _File]:
    """Write this rank's files; returns their sizes and hashes by name. The first rank has one of every group."""
    writers: dict[str, Callable[[Path], Any]] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    offsets: dict[str, dict[str, list[int]]] = {}
    if ranks.rank == 0:
        parts = {group: {} for group in tied}
        for name, tree in documents.items():
            _check_json(tree, name)
            writers[f"{name}.json"] = partial(Path.write_bytes, data=_json_bytes(tree))
    for item in plan.items:
        group, name = item.index.fqn.split("/", 1)
        parts.setdefault(group, {})[name] = planner.resolve_data(item)
        if any(item.index.offset):
            offsets.setdefault(group, {})[name] = list(item.index.offset)
    for group, named in parts.items():
        # Of two entries safetensors would write either one first, and the same tensors have two hashes.
        metadata = {"offsets": offsets[group]} if group in offsets else {"tied": tied[group]}
        metadata = {name: json.dumps(value) for name, value in metadata.items()}
        suffix = f"-{ranks.rank}" if ranks.size > 1 else ""
        writers[f"{group}{suffix}.safetensors"] = partial(save_file, _separate(named), metadata=metadata)
    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(writers, pool.map(lambda name: _write(folder / name, writers[name]), writers), strict=True))


def _finish(folder: Path, manifest: dict[str, Any], stack: contextlib.ExitStack) -> None:
    data = _manifest_bytes({"format": FORMAT, "version": VERSION, **manifest})
    _write(folder / _MANIFEST, partial(Path.write_bytes, data=data))
    stack.close()


def _separate(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as `save_file` needs them: contiguous, and none in another's memory."""
    separate, storages = {}, set()
    for name, tensor in named.items():
        tensor = tensor.contiguous()
        storage = (tensor.device, tensor.untyped_storage().data_ptr())
        separate[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    return separate


def _metadata(name: str, parts: dict[torch.Size, Tensor]) -> TensorStorageMetadata:
    """The metadata of a tensor that is stored in parts, by their offsets."""
    ends = ([start + length for start, length in zip(at, part.shape, strict=True)] for at, part in parts.items())
    size = torch.Size(map(max, zip(*ends, strict=True)))
    dtypes = {part.dtype for part in parts.values()}
    if len(dtypes) > 1 or sum(part.numel() for part in parts.values()) != math.prod(size):
        raise CheckpointError(f"the parts of {quote(name)} do not make a whole")
    chunks = [ChunkStorageMetadata(at, part.shape) for at, part in parts.items()]
    return TensorStorageMetadata(TensorProperties(dtype=dtypes.pop()), size, chunks)


def _slices(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(offsets, lengths, strict=True))


def _write(path: Path, write: Callable[[Path], Any]) -> dict[str, Any]:
    """Write a file; returns its size in bytes and sha256."""
    with naming(path):
        write(path)
        with contextlib.suppress(OSError):  # safetensors makes files that only their owner can read
            os.chmod(path, path.parent.stat().st_mode & 0o666)
        sync(path)  # here, since another machine's sync would not reach what this one has written
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
