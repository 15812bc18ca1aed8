"""Checkpoints that lose nothing: atomic, checksummed, no pickle.

    root/step-000010/
        policy.safetensors ...   one file a group of tensors
        state.json               step counters, data position, controllers, schedulers
        config.json              the run's configuration
        manifest.json            written last: size and sha256 of every other file, and of itself

A checkpoint is written into a hidden sibling folder, made durable file by file, and becomes `step-000010` by one
rename, so a process killed at any instant leaves the folder whole or absent. Nothing older is touched before that
rename is durable.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastppo.engines.dispatch import FastPPOWarning

FORMAT = "fastppo-checkpoint"
VERSION = 1

MAY_DIFFER = frozenset(
    {
        "output_dir",
        "total_steps",
        "tensorboard",
        "on_nonfinite",
        "checkpoint",
        "eval",
        "watch",
        "model.allow_download",
    }
)
"""Configuration keys (with everything below them) that a resumed run may change: none enters a step's computation.

`total_steps` is here so that a run can be prolonged. A schedule that decays to an end follows the new end from there
on, which no longer gives the bits of a run that had it from its beginning.
"""

# https://github.com/huggingface/safetensors#format
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK = 1 << 22  # bytes; what is hashed is still in cache when it is written

_MANIFEST = "manifest.json"
_SAVING, _TRASH = ".saving-", ".trash-"
# A step saved again gets `.1` until its predecessor is out of the way: at no instant is neither there.
_FOLDER = re.compile(r"step-(\d{6,})(?:\.(\d+))?")
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be saved, is damaged, or does not belong to this run."""


def _warn(message: str) -> None:
    warnings.warn(message, FastPPOWarning, stacklevel=3)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte has been verified. Tensors are read when asked for."""

    path: Path
    step: int
    state: dict[str, Any]
    config: dict[str, Any]
    groups: tuple[str, ...]

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of a group, contiguous and on the CPU, in memory of their own.

        Names that were one tensor when saved are one tensor again.

        Raises:
            CheckpointError: there is no such group, or its file can no longer be read.
        """
        if group not in self.groups:
            raise CheckpointError(f"{self.path}: has no group {group!r}, only {', '.join(self.groups) or 'none'}")
        try:
            with safe_open(self.path / f"{group}.safetensors", framework="pt", device="cpu") as file:
                # What safetensors returns is mapped from the file; a copy survives the file.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                tied = json.loads(file.metadata()["tied"])
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path}: {group}.safetensors can no longer be read ({error})") from error
        for name, kept in tied.items():
            tensors[name] = tensors[kept]
        return tensors


def save_checkpoint(
    root: Path,
    step: int,
    *,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    config: dict[str, Any],
    keep_last: int,
    keep_for: Collection[int] = (),
    warn: Callable[[str], None] = _warn,
) -> Path:
    """Write the checkpoint of `step` and delete those older than the newest `keep_last`.

    On return the checkpoint is durable: it survives a crash of the process or of the machine. Until then nothing older
    has been touched. Nothing may modify the tensors meanwhile. Checkpoints of later steps are left alone.

    Args:
        root: folder of a run's checkpoints; made if missing.
        step: number of the step that is complete, >= 0. If it has been saved before, the new one takes its place.
        tensors: group -> name -> strided tensor of any shape, on any device; each group becomes `<group>.safetensors`.
            Within a group, names whose tensors are the same memory with the same shape, strides and dtype (tied
            weights) are stored once, under the first of them, and all come back, tied. Tensors that merely overlap
            are stored whole, each for itself.
        state: JSON values only (dicts with string keys, lists, str, int, float, bool, None). Floats keep every bit, NaN
            and infinities included.
        config: the run's configuration as a plain tree, JSON values only.
        keep_last: how many to keep, this one included, >= 1. Damaged ones do not count.
        keep_for: of each of these steps, also keep the newest that is of this step or an earlier one.
        warn: called with a message when something that could not be deleted had to stay.

    Returns:
        The folder of the checkpoint, `root/step-<step, six digits>`.

    Raises:
        CheckpointError: it could not be written (disk full, not writable). Nothing half-written remains and older
            checkpoints are whole.
        TypeError, ValueError: an argument that cannot be saved; the message names it.
    """
    root = Path(root)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step: expected an integer >= 0, got {step!r}")
    if isinstance(keep_last, bool) or not isinstance(keep_last, int) or keep_last < 1:
        raise ValueError(f"keep_last: expected an integer >= 1, got {keep_last!r}")
    _check_json(state, "state")
    _check_json(config, "config")
    files = {"state.json": [_json_bytes(state)], "config.json": [_json_bytes(config)]}
    needed = 0
    for group, named in tensors.items():
        if not isinstance(group, str) or not _GROUP.fullmatch(group):
            raise ValueError(f"tensors: a group's name becomes a file's; {group!r} is not made of [A-Za-z0-9_.-]")
        size, files[f"{group}.safetensors"] = _safetensors(group, named)
        needed += size
    for device in {tensor.device for named in tensors.values() for tensor in named.values() if tensor.is_cuda}:
        # The writers copy from threads of their own, which do not wait for this thread's streams.
        torch.cuda.synchronize(device)

    try:
        _make_folder(root)
        _clean(root, warn)
        earlier = _folders(root)
        same_step = [attempt for (number, attempt), _ in earlier if number == step]
        name = f"step-{step:06d}"
        target = root / (f"{name}.{max(same_step) + 1}" if same_step else name)
        temporary = root / f"{_SAVING}{name}-{secrets.token_hex(4)}"
        try:
            os.mkdir(temporary)
            manifest = {"format": FORMAT, "version": VERSION, "step": step, "files": _write_files(temporary, files)}
            _write_files(temporary, {_MANIFEST: [_manifest_bytes(manifest)]})
            _fsync_folder(temporary)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _fsync_folder(root)
    except OSError as error:
        raise CheckpointError(_why_not_saved(root, step, needed, error)) from error

    try:
        for _, path in [item for item in earlier if item[0][0] == step]:
            _discard(path)
        if same_step:
            os.rename(target, root / name)
            target = root / name
            _fsync_folder(root)
        whole, wanting = 1, {wanted for wanted in keep_for if wanted < step}
        for (number, _), path in [item for item in reversed(earlier) if item[0][0] < step]:
            if whole >= keep_last and not any(number <= wanted for wanted in wanting):
                _discard(path)
            elif _looks_whole(path):
                whole += 1
                wanting = {wanted for wanted in wanting if wanted < number}
    except OSError as error:
        warn(f"{root}: step {step} is saved, but an older checkpoint could not be deleted: {error}")
    return target


def find_checkpoint(root: Path, *, until: int | None = None, warn: Callable[[str], None] = _warn) -> Checkpoint | None:
    """The newest checkpoint under `root` that is whole; None if there is none.

    Args:
        root: folder given to `save_checkpoint`; need not exist.
        until: leave out those of later steps.
        warn: called for each damaged checkpoint that is passed over, with a message that says what is wrong. By default
            a FastPPOWarning.

    Raises:
        CheckpointError: the folder exists but cannot be listed.
    """
    root = Path(root)
    try:
        folders = _folders(root)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{root}: checkpoints cannot be listed ({error.strerror})") from error
    for (step, _), path in reversed(folders):
        if until is not None and step > until:
            continue
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warn(f"passed over a checkpoint that is not whole: {error}")
    return None


def discard_checkpoints(root: Path, *, after: int) -> None:
    """Delete the checkpoints of steps later than `after`, the latest first.

    Raises:
        CheckpointError: one cannot be deleted.
    """
    try:
        for (step, _), path in reversed(_folders(Path(root))):
            if step > after:
                _discard(path)
        _fsync_folder(Path(root))
    except OSError as error:
        raise CheckpointError(f"{root}: a checkpoint after step {after} cannot be deleted ({error})") from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Verify one checkpoint's folder, every byte of it.

    Raises:
        CheckpointError: something is missing, cut short, changed or unreadable; the message names the file.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    names = sorted(manifest["files"], key=lambda name: -manifest["files"][name]["size"])
    with ThreadPoolExecutor(max_workers=8) as pool:
        for problem in pool.map(lambda name: _wrong(path / name, **manifest["files"][name]), names):
            if problem:
                raise CheckpointError(f"{path}: {problem}")
    try:
        state, config = (json.loads((path / name).read_bytes()) for name in ("state.json", "config.json"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    groups = tuple(sorted(name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors")))
    return Checkpoint(path, manifest["step"], state, config, groups)


def check_same_run(
    saved: dict[str, Any], given: dict[str, Any], *, may_differ: set[str] | frozenset[str] = MAY_DIFFER
) -> None:
    """Refuse to resume a run with another configuration.

    Args:
        saved: the checkpoint's configuration tree.
        given: the configuration tree of the run that resumes.
        may_differ: dotted keys that are not compared, each with everything below it (`eval` or `eval.*`).

    Raises:
        CheckpointError: one message with every differing dotted key and both its values.
    """
    kept = [key.removesuffix(".*") for key in may_differ]
    differences = [
        f"{key} was {_show(was)}, is now {_show(now)}"
        for key, was, now in _differences(saved, given, "")
        if not any(key == free or key.startswith(f"{free}.") for free in kept)
    ]
    if differences:
        raise CheckpointError(
            f"the configuration is not the checkpoint's: {'; '.join(differences)}. Resume with the saved values, or "
            "start a new run with another output_dir"
        )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take an optimizer's `state_dict` apart into named tensors and JSON.

    Args:
        optimizer: anything with torch's `state_dict` and `param_groups`; states may nest and may hold tensors, numbers,
            strings, None.

    Returns:
        tensors: dotted name (`state.0.exp_avg`) -> the optimizer's own tensor, not a copy.
        meta: JSON values; everything else, with hyperparameters.

    Raises:
        TypeError: a state that is neither; the message names it.
    """
    tensors: dict[str, Tensor] = {}
    packed = {key: _pack(value, key, tensors) for key, value in optimizer.state_dict().items()}
    return tensors, {"state_dict": packed, "shapes": _parameter_shapes(optimizer)}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Put back what `optimizer_tensors` took, to the bit, on the optimizer's devices; hyperparameters included.

    torch's `load_state_dict` casts every tensor to its parameter's dtype, which would round float32 moments of a
    bfloat16 parameter, and spoils strings; here states come back as they were saved. `tensors` stay the caller's: none
    of their memory is shared.

    Raises:
        CheckpointError: the optimizer is over other parameters, or a saved state is missing or not taken.
    """
    shapes = _parameter_shapes(optimizer)
    if shapes != meta["shapes"]:
        raise CheckpointError(
            f"the optimizer's parameters are not the checkpoint's: {_first_other_shape(meta, shapes)}"
        )
    try:
        state_dict = {key: _unpack(value, tensors) for key, value in meta["state_dict"].items()}
    except KeyError as error:
        raise CheckpointError(f"the checkpoint's optimizer state lacks the tensor {error}") from error
    optimizer.load_state_dict(state_dict)  # the optimizer chooses devices, and nests states as it likes
    saved_groups = state_dict["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip((n for group in saved_groups for n in group["params"]), parameters, strict=True):
        if number in state_dict["state"]:
            optimizer.state[parameter] = _as_saved(optimizer.state[parameter], state_dict["state"][number])
    taken, _ = optimizer_tensors(optimizer)
    lost = [name for name in tensors if name not in taken or taken[name].dtype != tensors[name].dtype]
    if lost:
        raise CheckpointError(f"the optimizer ({type(optimizer).__name__}) did not take the states {', '.join(lost)}")


def _as_saved(loaded: Any, saved: Any) -> Any:
    """`saved` on the devices of `loaded`, in memory of its own; dict keys that only `loaded` has are left to it."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device, copy=True)
    if isinstance(saved, dict):
        return {key: _as_saved(value, saved[key]) if key in saved else value for key, value in loaded.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_as_saved(*pair) for pair in zip(loaded, saved, strict=True))
    return saved


# Optimizer states as JSON: a tensor becomes {"$tensor": its name}; what JSON lacks is tagged likewise.


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while name in tensors:  # a key may itself hold a dot
            name += "'"
        tensors[name] = value
        return {"$tensor": name}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, dict) and all(isinstance(key, int | str) for key in value):
        items = [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        return dict(items) if plain else {"$dict": items}
    raise TypeError(f"optimizer: {name} is a {type(value).__name__}, which a checkpoint cannot hold")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": name}:
            return tensors[name]
        case {"$tuple": items}:
            return tuple(_unpack(item, tensors) for item in items)
        case {"$dict": items}:
            return {key: _unpack(item, tensors) for key, item in items}
    return {key: _unpack(item, tensors) for key, item in value.items()}


def _parameter_shapes(optimizer: torch.optim.Optimizer) -> list[list[list[int]]]:
    return [[list(parameter.shape) for parameter in group["params"]] for group in optimizer.param_groups]


def _first_other_shape(meta: dict[str, Any], shapes: list[list[list[int]]]) -> str:
    saved = meta["shapes"]
    if [len(group) for group in saved] != [len(group) for group in shapes]:
        return f"groups of {[len(group) for group in saved]} were saved, there are {[len(group) for group in shapes]}"
    return next(
        f"group {group}, parameter {index}: shape {old} was saved, it is {new}"
        for group, pair in enumerate(zip(saved, shapes, strict=True))
        for index, (old, new) in enumerate(zip(*pair, strict=True))
        if old != new
    )


# Comparing configurations

_ABSENT = object()


def _differences(saved: Any, given: Any, key: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, dict) and isinstance(given, dict):
        pairs = [(name, saved.get(name, _ABSENT), given.get(name, _ABSENT)) for name in {**saved, **given}]
    elif isinstance(saved, list | tuple) and isinstance(given, list | tuple):
        length = max(len(saved), len(given))
        padded = [[*items, *[_ABSENT] * (length - len(items))] for items in (saved, given)]
        pairs = [(index, *pair) for index, pair in enumerate(zip(*padded, strict=True))]
    else:
        same_nan = saved != saved and given != given
        if saved != given and not same_nan:
            yield key, saved, given
        return
    for name, was, now in pairs:
        yield from _differences(was, now, f"{key}.{name}" if key else str(name))


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value, default=str)


# JSON that comes back as it was


def _check_json(value: Any, name: str) -> None:
    """TypeError for whatever JSON would refuse or silently turn into something else (tuples, integer keys)."""
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


def _json_bytes(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, indent=1).encode("ascii") + b"\n"


def _manifest_bytes(manifest: dict[str, Any]) -> bytes:
    return _json_bytes({**manifest, "sha256": hashlib.sha256(_json_bytes(manifest)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder; CheckpointError if a byte of it is not as written."""
    try:
        raw = (path / _MANIFEST).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {_MANIFEST} cannot be read ({error.strerror})") from error
    try:
        manifest = json.loads(raw)
        del manifest["sha256"]
        sound = _manifest_bytes(manifest) == raw
    except (ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path}: {_MANIFEST} is damaged")
    if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
        raise CheckpointError(
            f"{path}: {manifest['format']} version {manifest['version']}, this fastppo reads {FORMAT} version {VERSION}"
        )
    return manifest


def _wrong(path: Path, size: int, sha256: str) -> str | None:
    """What distinguishes a file from the one that was written; None if nothing does."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_CHUNK, size + 1)))
    try:
        with open(path, "rb", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                return f"{path.name} has {found} bytes, {size} bytes were written"
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None if digest.hexdigest() == sha256 else f"{path.name} has changed since it was written (sha256 differs)"


def _looks_whole(path: Path) -> bool:
    """Whether the manifest is sound and every file has its size: no hashing, so that saving stays cheap."""
    try:
        files = _read_manifest(path)["files"]
        return all((path / name).stat().st_size == file["size"] for name, file in files.items())
    except (CheckpointError, OSError):
        return False


# Writing


def _safetensors(group: str, named: dict[str, Tensor]) -> tuple[int, Iterable[Any]]:
    """The size in bytes of a safetensors file, and an iterable of its bytes in pieces of at most _CHUNK.

    Written here, not by the library, so that bytes are hashed on their way to the disk, tensors leave a GPU one at a
    time and a full disk is an OSError.
    """
    kept: dict[tuple, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in named.items():
        _check_tensor(group, name, tensor)
        memory = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and kept.setdefault(memory, name) != name:
            tied[name] = kept[memory]
    # Widest items first, as the library does, so that every tensor starts aligned.
    names = sorted(named.keys() - tied.keys(), key=lambda name: (-named[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "tied": json.dumps(tied)}}
    offset = 0
    for name in names:
        tensor = named[name]
        end = offset + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {"dtype": _SAFETENSORS_DTYPES[tensor.dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode("ascii")
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text

    def pieces() -> Iterator[Any]:
        yield prefix
        for name in names:
            tensor = named[name].detach().cpu().contiguous()
            data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            for start in range(0, len(data), _CHUNK):
                yield data[start : start + _CHUNK]

    return len(prefix) + offset, pieces()


def _check_tensor(group: str, name: str, tensor: Tensor) -> None:
    where = f"tensors[{group!r}][{name!r}]"
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"{where}: a tensor needs a string for a name, other than __metadata__")
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: expected a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "__tensor_flatten__"):
        # A DTensor's own memory is one process's share.
        raise TypeError(
            f"{where}: a {type(tensor).__name__} has no memory of its own; give a plain tensor (full_tensor())"
        )
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _SAFETENSORS_DTYPES:
        raise TypeError(
            f"{where}: expected a strided tensor with data, got {tensor.layout} {tensor.dtype} {tensor.device}"
        )


def _write_files(folder: Path, files: dict[str, Iterable[Any]]) -> dict[str, dict[str, Any]]:
    """Write files, all at once, each from its pieces; returns each one's size in bytes and sha256, all durable."""
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=8) as pool:
        futures = {name: pool.submit(_write_file, folder / name, pieces, stop) for name, pieces in files.items()}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # after an error, or Ctrl-C, the others need not go on to the end
    for future in done:
        future.result()
    return {name: future.result() for name, future in futures.items()}


def _write_file(path: Path, pieces: Iterable[Any], stop: threading.Event) -> dict[str, Any]:
    size, digest = 0, hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        # A piece is hashed while it is written: both release the interpreter, and one file may hold most of the bytes.
        with ThreadPoolExecutor(max_workers=1) as hasher:
            for piece in pieces:
                if stop.is_set():
                    return {}
                hashed = hasher.submit(digest.update, piece)
                written = 0
                while written < len(piece):
                    written += os.write(descriptor, memoryview(piece)[written:])
                hashed.result()
                size += written
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def _fsync_folder(path: Path) -> None:
    """Make a folder's entries durable (a file's own fsync does not cover its name)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have none for folders
            raise
    finally:
        os.close(descriptor)


def _make_folder(path: Path) -> None:
    if path.is_dir():
        return
    if path.parent != path:
        _make_folder(path.parent)
    path.mkdir(exist_ok=True)
    _fsync_folder(path.parent)


def _folders(root: Path) -> list[tuple[tuple[int, int], Path]]:
    """Checkpoints' folders, oldest first, each with (step, attempt)."""
    found = []
    for path in root.iterdir():
        match = _FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found.append(((int(match[1]), int(match[2] or 0)), path))
    return sorted(found)


def _clean(root: Path, warn: Callable[[str], None]) -> None:
    """Remove what killed processes left behind."""
    for path in root.iterdir():
        try:
            if path.name.startswith(_SAVING):
                _discard(path)
            elif path.name.startswith(_TRASH):
                shutil.rmtree(path)
        except OSError as error:
            warn(f"{root}: what a killed run left could not be deleted: {error}")


def _discard(path: Path) -> None:
    """Delete a folder, renamed first: a folder half deleted is never taken for one half written or whole."""
    trash = path.with_name(f"{_TRASH}{path.name}-{secrets.token_hex(4)}")
    os.rename(path, trash)
    shutil.rmtree(trash)


def _why_not_saved(root: Path, step: int, needed: int, error: OSError) -> str:
    message = f"{root}: the checkpoint of step {step} could not be saved: {error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
        message += f" (it needs {needed / 1e9:.3f} GB, {shutil.disk_usage(there).free / 1e9:.3f} GB are free)"
    return f"{message}. Older checkpoints are untouched"
