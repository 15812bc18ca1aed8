"""Files of a run: whole or absent after a kill, synced to disk, and named in the errors of writing them."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fastppo.engines.dispatch import FastPPOWarning
from fastppo.errors import one_line

SAVING, TRASH = ".saving-", ".trash-"
"""How the names of files and folders begin that are written, or deleted, at the moment."""


def atomic_write(path: str | Path, data: bytes) -> None:
    """Write a file atomically: after a kill or a power cut it holds all of `data`, or what it held before."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{SAVING}{path.name}")
    with naming(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder whose files then take the place of `path`: after a kill, that is whole or absent, never in part."""
    temporary = path.with_name(f"{SAVING}{path.name}-{secrets.token_hex(4)}")
    try:
        os.mkdir(temporary)
        yield temporary
        sync_folder(temporary)
        if path.exists():
            delete_folder(path)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def delete_folder(path: Path) -> None:
    """Rename a folder, then delete it, so that one deleted in part never looks whole."""
    trash = path.with_name(f"{TRASH}{path.name}-{secrets.token_hex(4)}")
    os.rename(path, trash)
    shutil.rmtree(trash)


def sync_folder(path: Path) -> None:
    """Sync a folder's entries; a file's own fsync does not cover its name."""
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
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
        except OSError as error:
            message = f"{folder}: what a killed run left could not be deleted: {error}"
            warnings.warn(message, FastPPOWarning, stacklevel=3)
