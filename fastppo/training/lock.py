"""One run a folder: a lock that a process holds, and that ends with the process, however it ends."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import warnings
import weakref
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from fastppo.engines.dispatch import FastPPOWarning
from fastppo.errors import one_line
from fastppo.training.checkpoint import CheckpointError
from fastppo.training.files import make_folder

LOCK_FILE = ".lock"

_descriptors: set[int] = set()
"""Those of the locks that this process holds."""


def _let_go() -> None:
    """After a fork, in the child: a worker that outlives its run must not keep others out of the folder."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class FolderLock:
    """A lock on a run's folder, from its construction to `release`; also released when it is garbage-collected.

    Folders that it made are deleted with it if they are empty then.

    It is `flock` on a file whose text names the holder. Where the file system has no locks, a FastPPOWarning says so.

    Raises:
        CheckpointError: another run holds it; the message names its process and host.
        OSError, ValueError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()  # a reward function may change the current folder
        self._release = None
        self.acquire()

    def acquire(self) -> None:
        """Take the lock, unless this process has it by this object; anew if its file has been deleted meanwhile."""
        if self._release is not None and self._release.alive:
            descriptor, path, _ = self._release.peek()[2]
            if descriptor not in _descriptors or not _is_at(descriptor, path):  # after a fork; or a deletion
                self._release()
        if self._release is None or not self._release.alive:
            made = make_folder(self._folder)
            descriptor = _open_and_lock(self._folder)
            _descriptors.add(descriptor)
            self._release = weakref.finalize(self, _unlock, descriptor, self._folder / LOCK_FILE, made)

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        self._release()

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def _open_and_lock(folder: Path) -> int:
    path, mine = folder / LOCK_FILE, f"process {os.getpid()} on {socket.gethostname()}"
    tried_again = False
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError("no flock on this system")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = _is_at(descriptor, path)  # unless the run that had it deleted it since it was opened here
        except BlockingIOError:
            holder = os.read(descriptor, 300).decode("utf-8", "replace")
            os.close(descriptor)
            if holder == mine and not tried_again:
                tried_again = True
                gc.collect()  # a Trainer that nothing refers to any more
                continue
            who = "a Trainer of this process" if holder == mine else one_line(holder or "another process")
            raise CheckpointError(
                f"{folder}: {who} has a run in this folder; wait for its end, or choose another output_dir"
            ) from None
        except OSError as error:
            message = f"{folder}: cannot be locked ({error.strerror or error}); do not start a second run in it"
            warnings.warn(message, FastPPOWarning, stacklevel=5)
            current = True
        if current:
            with contextlib.suppress(OSError):  # a full disk: then the message cannot say who
                os.ftruncate(descriptor, 0)
                os.write(descriptor, mine.encode())
            return descriptor
        os.close(descriptor)


def _unlock(descriptor: int, path: Path, made: list[Path]) -> None:
    if descriptor in _descriptors:  # not so in the child of a fork
        _descriptors.remove(descriptor)
        try:
            with contextlib.suppress(OSError):
                if _is_at(descriptor, path):
                    path.unlink()  # before the lock is gone: no other run's file is deleted
                    for folder in made:  # that are still empty: nothing stays of a run that was refused
                        folder.rmdir()
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one at the path, which may have been deleted and made again."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
