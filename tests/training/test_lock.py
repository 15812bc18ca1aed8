"""One run a folder: who holds the lock, and when it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastppo
from fastppo.training.checkpoint import CheckpointError
from fastppo.training.lock import FolderLock

ROOT = Path(__file__).resolve().parents[2]


def held_elsewhere(folder):
    """A forked process that holds the folder's lock until it is killed; its id."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lock = FolderLock(folder)
        os.write(writer, b"x")
        while lock:
            signal.pause()
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return child


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_a_second_run_is_told_who_has_the_folder_until_that_process_ends(tmp_path):
    child = held_elsewhere(tmp_path)
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            FolderLock(tmp_path)
        assert f"{tmp_path}: process {child} on {socket.gethostname()} has a run in this folder" in str(caught.value)
    kill(child)
    with FolderLock(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_within_a_process(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()  # has it
    with pytest.raises(CheckpointError, match="a Trainer of this process has a run in this folder"):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    other = FolderLock(tmp_path)
    with pytest.raises(CheckpointError, match="a Trainer of this process"):
        lock.acquire()
    other.itself = other  # only garbage collection frees it
    del other
    with lock:
        pass
    with FolderLock(tmp_path):
        pass


def test_a_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path):
    """Workers are forked, share what is open, and stay when their run is killed."""
    reader, writer = os.pipe()
    run = os.fork()
    if run == 0:
        lock = FolderLock(tmp_path)
        worker = os.fork()
        if worker:
            os.write(writer, worker.to_bytes(8, "little"))
        while lock:
            signal.pause()
    os.close(writer)
    worker = int.from_bytes(os.read(reader, 8), "little")
    os.close(reader)
    with pytest.raises(CheckpointError, match=f"process {run} on"):
        FolderLock(tmp_path)
    kill(run)
    try:
        deadline = time.monotonic() + 60
        while True:  # the worker is just being started
            try:
                FolderLock(tmp_path).release()
                break
            except CheckpointError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        os.kill(worker, 0)  # it lives
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_deleted_by_the_run_that_ends_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    """Opened before the other run's release and locked after it, the file is no longer that of the folder."""
    first, flock = FolderLock(tmp_path), fcntl.flock

    def released_meanwhile(*arguments):
        monkeypatch.undo()
        first.release()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", released_meanwhile)
    second = FolderLock(tmp_path)
    with pytest.raises(CheckpointError):
        FolderLock(tmp_path)
    second.release()


def test_whose_file_somebody_deleted(tmp_path):
    """It is taken anew, unless another run has begun; that one's file is left alone."""
    lock, path = FolderLock(tmp_path), tmp_path / ".lock"
    path.unlink()
    lock.acquire()
    with pytest.raises(CheckpointError):
        FolderLock(tmp_path)
    path.unlink()
    other = FolderLock(tmp_path)
    with pytest.raises(CheckpointError, match="has a run in this folder"):
        lock.acquire()
    lock.release()
    assert path.exists()
    other.release()


def test_the_child_of_a_fork_does_not_have_its_parent_s_lock(tmp_path):
    lock = FolderLock(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            lock.acquire()
        except CheckpointError:
            os._exit(3)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    lock.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.warns(fastppo.FastPPOWarning, match="cannot be locked .*do not start a second run"),
        FolderLock(tmp_path),
    ):
        pass
    monkeypatch.setattr("fastppo.training.lock.fcntl", None)  # Windows
    with pytest.warns(fastppo.FastPPOWarning, match="cannot be locked"), FolderLock(tmp_path):
        pass


@pytest.mark.slow
def test_a_process_that_ends_without_a_release_leaves_the_folder_free(tmp_path):
    program = "import sys; from pathlib import Path; from fastppo.training.lock import FolderLock\n"
    program += "lock = FolderLock(Path(sys.argv[1])); raise SystemExit(3)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=False)
    assert done.returncode == 3
    assert list(tmp_path.iterdir()) == []


def test_folders_that_it_made_go_with_it_unless_something_is_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").mkdir()
    for folder, stays in (("a/b/c", ["old"]), ("old", ["old"]), ("old/new", ["old"])):
        lock = FolderLock(Path(folder))
        monkeypatch.chdir("/")
        lock.release()
        monkeypatch.chdir(tmp_path)
        assert sorted(path.name for path in tmp_path.rglob("*")) == stays
    with FolderLock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "kept", "old"]
