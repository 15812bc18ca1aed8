"""Files of a run: whole or absent after a kill, synced to disk, and named in the errors of writing them."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fastppo.engines.dispatch import FastPPOWarning
from fastppo.errors import one_line

SAVING, TRASH = ".saving-", ".trash-"
"""How the names of files and folders begin that are written, or deleted, at the moment."""


def read_text(path: str | Path, most: int = -1) -> str:
    """The text of a UTF-8 file or pipe, without a byte-order mark.

    Args:
        path: a pipe that nobody writes to is empty, rather than waited for.
        most: bytes that it may have; -1 for any number.

    Raises:
        OSError, ValueError: it cannot be read; `why_unreadable` says why.
    """
    flag = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | flag)) as file:
        if flag:
            os.set_blocking(file.fileno(), True)
        if stat.S_ISCHR(os.fstat(file.fileno()).st_mode):  # such as /dev/zero, which has no end
            raise ValueError("a device, not a file")
        data = file.read() if most < 0 else file.read(most + 1)
    if 0 <= most < len(data):
        raise ValueError(f"more than {most} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None


def why_unreadable(error: OSError | ValueError) -> str:
    """The reason of an error of `read_text`."""
    return getattr(error, "strerror", None) or one_line(error)


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a file atomically: after a kill or a power cut it holds all of `data`, or what it held before."""
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f"{SAVING}{path.name}")
    with naming(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder that then takes the place of `path`: after a kill or a power cut that is whole, old, or absent."""
    make_folder(path.parent)
    temporary = path.with_name(f"{SAVING}{path.name}-{secrets.token_hex(4)}")
    try:
        os.mkdir(temporary)
        yield temporary
        for folder, _, names in os.walk(temporary):
            for each in (*(os.path.join(folder, name) for name in names), folder):
                with naming(each):
                    sync(each)
        if os.path.lexists(path):
            delete_folder(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def make_folder(path: Path) -> list[Path]:
    """Make a folder, with its parents, whose names survive a power cut; returns those that were not there."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync(made.parent)
    return missing


def delete_folder(path: Path) -> None:
    """Rename a folder, then delete it, so that one deleted in part never looks whole. Of a link, only the link goes."""
    trash = path.with_name(f"{TRASH}{path.name}-{secrets.token_hex(4)}")
    os.rename(path, trash)
    _delete(trash)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(path: str | Path) -> None:
    """Sync a file, or a folder's entries, to disk; a file's own sync does not cover its name."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to but not listed, or any on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an error of writing `path` name it: a full disk's has no name, and safetensors and tokenizers have their own.

    Raises:
        OSError: with a `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if type(error) not in (SafetensorError, Exception):  # tokenizers raises plain Exceptions
            raise
        raise OSError(errno.EIO, one_line(error), str(path)) from error


def delete_temporary(folder: Path) -> None:
    """Delete what killed processes left half-written, or half-deleted, in a folder; warn of what cannot be."""
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            if path.name.startswith((SAVING, TRASH)):
                _delete(path)
        except OSError as error:
            message = f"{folder}: what a killed run left could not be deleted: {error}"
            warnings.warn(message, FastPPOWarning, stacklevel=3)
