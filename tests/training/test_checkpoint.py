"""Checkpoints restore every bit, are whole after a kill at any instant, and never load damaged."""
# ruff: noqa: NPY002  numpy's global generator is what libraries draw from, and what is tested here

import base64
import errno
import itertools
import json
import math
import os
import random
import resource
import shutil
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import typing
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import fastppo
from fastppo.training import checkpoint as module
from fastppo.training.checkpoint import (
    CheckpointError,
    discard_checkpoints,
    find_checkpoint,
    load_checkpoint,
    restoring,
    save_checkpoint,
)
from fastppo.training.config import OptimConfig, Schedule
from fastppo.training.optim import build_optimizer, build_scheduler, load_optimizer, optimizer_tensors
from fastppo.training.rng import rng_state, seed_everything, set_rng_state


def same_bits(left, right):
    """Equal in dtype, shape and every bit (NaN payloads and signs of zero included)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    left, right = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(left, right)


pytestmark = pytest.mark.filterwarnings("error::fastppo.FastPPOWarning")


def save(root, step, *, keep_last=2, **content):
    return save_checkpoint(root, step, **{**payload(step), **content}, keep_last=keep_last)


def payload(step, mark=0):
    """A small checkpoint whose every part tells which step it is of."""
    generator = torch.Generator().manual_seed(1000 * mark + step)
    weight = torch.randn(7, 5, generator=generator)
    tensors = {
        "policy": {"embed": weight, "head": weight, "bias": torch.randn(3, generator=generator)},
        "optimizer": {"moment": torch.randn(9, generator=generator)},
    }
    return {"tensors": tensors, "state": {"step": step, "mark": mark}, "config": {"seed": step}}


def assert_is(found, step, mark=0):
    expected = payload(step, mark)
    assert (found.step, found.state, found.config) == (step, expected["state"], expected["config"])
    for group, tensors in expected["tensors"].items():
        restored = found.tensors(group)
        assert restored.keys() == tensors.keys()
        assert all(same_bits(restored[name], tensor) for name, tensor in tensors.items())


def names(root):
    return sorted(path.name for path in root.iterdir())


# What is saved comes back


def test_layout_and_round_trip_of_every_kind_of_tensor(tmp_path):
    root = tmp_path / "deep" / "er"
    weight, square = torch.randn(13, 7), torch.randn(6, 6)
    bits = torch.randint(-(2**31), 2**31, (101,), dtype=torch.int32).view(torch.float32)
    tensors = {
        "tied.b": weight,
        "tied.a": weight,
        "detached": torch.nn.Parameter(weight).data[:],
        "transposed": weight.t(),
        "square": square,
        "square transposed": square.t(),
        "tail": weight[5:],
        "strided": torch.randn(6, 9)[::2, 1::3],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(3, 1, 2)),
        "bf16": torch.randn(5, 3).bfloat16(),
        "fp16": torch.randn(1, 3).half(),
        "fp64": torch.randn(3, dtype=torch.float64),
        "fp8": torch.randn(7).to(torch.float8_e4m3fn),
        "any bits": bits,
        "special": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]),
        "0-dim": torch.randn(()),
        "0-dim int": torch.tensor(-(2**62)),
        "0-dim bool": torch.tensor(True),
        "empty": torch.empty(0, 5),
        "empty too": torch.empty(3, 0, dtype=torch.bfloat16),
        "uint8": torch.randint(0, 256, (11,), dtype=torch.uint8),
        "uint16": torch.arange(5).to(torch.uint16),
        "int8": torch.arange(-3, 4, dtype=torch.int8),
        "bool": torch.rand(17) > 0.5,
        "names of any kind/é": torch.randn(2),
    }
    path = save_checkpoint(root, 10, tensors={"policy": tensors, "none": {}}, state={}, config={}, keep_last=1)
    assert path == root / "step-000010"
    assert names(path) == ["config.json", "manifest.json", "none.safetensors", "policy.safetensors", "state.json"]
    found = find_checkpoint(root)
    assert (found.path, found.step) == (path, 10)
    assert found.tensors("none") == {}
    restored = found.tensors("policy")
    assert restored.keys() == tensors.keys()
    assert [name for name in tensors if not same_bits(restored[name], tensors[name])] == []
    # Same memory, same shape: one tensor, stored once. Memory merely shared: each its own.
    assert restored["tied.a"] is restored["tied.b"] is restored["detached"]
    on_disk = load_file(path / "policy.safetensors")
    assert tensors.keys() - on_disk.keys() == {"tied.a", "detached"}
    assert all(same_bits(on_disk[name], tensors[name]) for name in on_disk)
    pointers = [tensor.data_ptr() for name, tensor in restored.items() if tensor.numel() and name != "tied.a"]
    assert len(set(pointers)) == len(pointers) - 1  # "detached" alone is shared
    # In memory of its own: changing it, or losing the file, changes nothing else.
    restored["tail"].zero_()
    assert same_bits(found.tensors("policy")["tail"], tensors["tail"])
    os.truncate(path / "policy.safetensors", 0)
    assert same_bits(restored["bf16"], tensors["bf16"])
    shutil.rmtree(path)
    with pytest.raises(CheckpointError, match=r"policy\.safetensors: "):
        found.tensors("policy")


def test_tied_weights_of_a_model_stay_tied(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(11, 6)
            self.head = torch.nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

    model, other = Model(), Model()
    path = save(tmp_path, 1, tensors={"policy": model.state_dict()})
    assert path.joinpath("policy.safetensors").stat().st_size < 2 * model.head.weight.nbytes + 400
    other.load_state_dict(load_checkpoint(path).tensors("policy"))
    assert same_bits(other.head.weight, model.head.weight)
    assert same_bits(other.embed.weight, model.embed.weight)
    assert other.head.weight is other.embed.weight


def test_state_keeps_every_bit_of_a_float(tmp_path):
    doubles = [struct.unpack("d", random.randbytes(8))[0] for _ in range(500)]
    state = {"doubles": doubles, "special": [math.inf, -math.inf, -0.0, 5e-324], "text": 'é\n"\ud800', "big": 2**200}
    state |= {"none": None, "yes": True, "nested": {"": [{}, [], 0, False]}}
    restored = load_checkpoint(save(tmp_path, 0, state=state)).state
    pack = struct.Struct("d").pack
    for left, right in zip(restored.pop("doubles"), state.pop("doubles"), strict=True):
        assert pack(left) == pack(right) or (math.isnan(left) and math.isnan(right))
    assert list(map(pack, restored.pop("special"))) == list(map(pack, state.pop("special")))
    assert restored == state
    assert restored["yes"] is True


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tensors": {"p": {"w": torch.ones(1, device="meta")}}}, NotImplementedError, "meta"),
        ({"state": {"data": {"at": (1, 2)}}}, TypeError, "state.data.at: tuple is not a JSON value"),
        ({"state": {"list": [0, np.int64(3)]}}, TypeError, "state.list.1: int64"),
        ({"state": {"by_index": {1: 2}}}, TypeError, "state.by_index: the key 1 is a int"),
        ({"config": {"model": {"dtype": torch.float32}}}, TypeError, "config.model.dtype: dtype"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, change, error, message):
    save(tmp_path, 1)
    arguments = {"step": 2, **payload(2), "keep_last": 1, **change}
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path, arguments.pop("step"), **arguments)
    assert names(tmp_path) == ["step-000001"]


def test_an_unknown_group_is_named(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"value\.safetensors: is not part of the checkpoint"):
        find_checkpoint(tmp_path).tensors("value")


# A checkpoint from before `save_file` wrote them: {file name: bytes as Latin-1} as JSON, zlib, base64.
WRITTEN_BEFORE = (
    "eNq1VtuO2zYQ/RVDaN+UBSlKIhkEu0AfAvQlP7AyjBE5XKu1JVWSc+lC/15erNvGmywQ1A8czuHwcDQX0s+RampTPd391Td19H4XPRf1roh6RF1Y"
    "lRb1WNRRvIvOUFcG++GFoWm6MwzO1M6hH9q2eaeOqP5um6q2eOytPmPXV03tGQPSD9g6lQXVVCfsne5Y/TIM6I+aQYdW/6LTOc/iCTpCkuXhfNRC"
    "KSMxzYhUlBOktJREA4c804wDN5zmpTaQKJISk0spkBGeZWgykVPL4kjHOLiwisstH+hNF6gUCfK8zIggQkmghhOVJVpzRYnMWQnKAE2JAMoToWXK"
    "M4EIJSOAwMpy60LbnCr17a4HgwPWfdP1tzxhSXozGhnTSgMwJROV5nmGeZJrViLVYDVIGdhYIJNaq9IY4CmlQBRgliZEl+nWlaYdqrM9sPupN4Tc"
    "8sZglqdaoGKMSc5TRjJAzglkWOYqT6gNDIo8F9aJNJUmQwBaZpTlvFRGwdUbO4zXAlqR56ikINyknJVSJqWNOBFG5AxUpngmU6YTbXKllZSlkIZS"
    "JoFrQbSgjKc+8dcyv/mdrtyLCyFUuJFQP5Ifj89FdDiccQANAxwOIVSbdmlde1g5VKHXiuh5LKIxnsuf3E1dYnfq4VuLwewjS8JOG4OAPe6d6k9q"
    "jOlx8Kl5JPEu3W8I8Wt7gM9P33P+8dHV/5Y0uc2axjtxk/XQ//NLxCLe0WQ/jjv3exlRQR6cUPqDExLuPch8Rij74HL3fbvMiSP/c+KKooiOCNpJ"
    "C9gRzyV6dcppAN6SzCTesVcTmlwz2jVf+reyvRJve2/sUhLojnAyv1YVrtisb+Nrcf39T5+J5D5MZOIzWPKzE7q8n9Yf6gDkDy922KV562zjpNH3"
    "vlwUcVWwPB3LKzV39csn5qArNWyuMYcugEV+m0weAzLL3fWis7/nabJ62RbMkYSCDFHddvdsNsYrlk2j/oxoNv4h19yeb6Tz9gvjNJsm+yCDGKc7"
    "v4UOzoenrrm0/Spo06FFdPKHkbssnqHSNlu/cc05dmlPuA67jfedjNeKlJN29WX5bPvR4XyK74hY0C9YPR2Hg0YF34IfhC6rcO6fOvBNauDU47Jy"
    "hq++gG4s2ZsBQR3dSn05nZYFBe1w6aA83dqlK2Oww3qoXjEwlz5cF1tS63njIqMPLz9l6C6r7T4P/SZ+ZJu4kMf9+pH3Tb7adN06MSTrjPtxv7zH"
    "Nfi/SZ/gU3hLx/8A9r8BJg=="
)


def test_checkpoints_of_the_earlier_writer_load(tmp_path):
    """Tied, transposed and bfloat16 tensors, and an AdamW after one step."""
    path = tmp_path / "step-000003"
    path.mkdir()
    for name, text in json.loads(zlib.decompress(base64.b64decode(WRITTEN_BEFORE))).items():
        (path / name).write_bytes(text.encode("latin-1"))
    found = find_checkpoint(tmp_path)
    assert (found.step, found.config) == (3, {"seed": 1})
    assert math.isnan(found.state["nan"])
    policy, weight = found.tensors("policy"), torch.arange(6.0).reshape(2, 3) / 7
    assert policy["embed"] is policy["head"]
    assert same_bits(policy["embed"], weight)
    assert same_bits(policy["rows"], weight.t()[1:])
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter], lr=0.5)
    parameter.grad = torch.tensor([0.25, 3.0], dtype=torch.bfloat16)
    optimizer.step()
    assert same_bits(policy["half"], parameter)
    resumed = torch.optim.AdamW([torch.nn.Parameter(policy["half"])], lr=0.1)
    load_optimizer(resumed, found.tensors("optimizer"), found.state["optimizer"])
    expected = optimizer_tensors(optimizer)[0]
    restored = optimizer_tensors(resumed)[0]
    assert expected.keys() == restored.keys()
    assert all(same_bits(restored[name], expected[name]) for name in expected)
    assert resumed.param_groups[0]["lr"] == 0.5


def test_files_have_the_permissions_of_other_new_files(tmp_path):
    (tmp_path / "other").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "other", *save(tmp_path, 1).iterdir())}
    assert len(modes) == 1


# Which checkpoints stay


def test_keep_last(tmp_path):
    tmp_path.joinpath("notes.txt").write_text("mine")
    tmp_path.joinpath("step-best").mkdir()
    for step in (5, 999_999, 1_000_000, 1_000_005):
        save(tmp_path, step, keep_last=3)
        assert_is(find_checkpoint(tmp_path), step)
    steps = ["step-1000000", "step-1000005", "step-999999"]
    assert names(tmp_path) == sorted([*steps, "notes.txt", "step-best"])
    save(tmp_path, 1_000_006, keep_last=1)
    assert names(tmp_path) == ["notes.txt", "step-1000006", "step-best"]


def test_one_from_before_a_step_is_kept_and_found(tmp_path):
    for step in (0, 3, 6):
        save(tmp_path, step, keep_last=2, keep_for={2})
    assert names(tmp_path) == ["step-000000", "step-000003", "step-000006"]
    save(tmp_path, 9, keep_last=2, keep_for={5})
    assert names(tmp_path) == ["step-000003", "step-000006", "step-000009"]
    assert_is(find_checkpoint(tmp_path, until=5), 3)
    assert find_checkpoint(tmp_path, until=2) is None
    discard_checkpoints(tmp_path, after=5)
    assert names(tmp_path) == ["step-000003"]
    save(tmp_path, 4, keep_last=1, keep_for={4})
    assert names(tmp_path) == ["step-000004"]


def test_those_between_what_is_wanted_are_not_kept(tmp_path):
    """However long one rule has nothing to judge, a run keeps a bounded number of checkpoints."""
    for step in range(0, 30, 3):
        save(tmp_path, step, keep_last=2, keep_for={0, min(step - 1, 10)})
    assert names(tmp_path) == ["step-000000", "step-000009", "step-000024", "step-000027"]


def test_damaged_ones_do_not_count_and_later_ones_are_left_alone(tmp_path):
    for step in (1, 2, 3, 4, 9):
        save(tmp_path, step, keep_last=9)
    tmp_path.joinpath("step-000004", "policy.safetensors").unlink()
    save(tmp_path, 5, keep_last=3)
    assert names(tmp_path) == [f"step-{step:06d}" for step in (2, 3, 4, 5, 9)]


def test_a_step_saved_again_takes_the_place_of_the_first(tmp_path):
    for mark in range(3):
        assert save(tmp_path, 3, **payload(3, mark), keep_last=3) == tmp_path / "step-000003"
        assert names(tmp_path) == ["step-000003"]
        assert_is(find_checkpoint(tmp_path), 3, mark)


def test_leftovers_of_killed_runs_are_removed(tmp_path):
    save(tmp_path, 1)
    for name in (".saving-step-000002-0123abcd", ".trash-step-000000-0123abcd"):
        shutil.copytree(tmp_path / "step-000001", tmp_path / name)
    assert_is(find_checkpoint(tmp_path), 1)
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_an_old_one_that_cannot_be_deleted_is_only_warned_of(tmp_path, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.warns(fastppo.FastPPOWarning, match="step 2 is saved, but") as caught:
        save(tmp_path, 2, keep_last=1)
    assert len(caught) == 1
    monkeypatch.undo()
    assert_is(find_checkpoint(tmp_path), 2)


# Damage


def test_nothing_there(tmp_path):
    assert find_checkpoint(tmp_path / "absent") is None
    assert find_checkpoint(tmp_path) is None
    tmp_path.joinpath("file").touch()
    with pytest.raises(CheckpointError, match="cannot be listed"):
        find_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot be read .*manifest\.json"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        save(tmp_path / "file" / "below", 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def cut(path):
    os.truncate(path, random.randrange(path.stat().st_size))


def grow(path):
    with path.open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize("harm", [flip, cut, grow, os.unlink], ids=lambda harm: harm.__name__)
def test_damage_is_named_and_passed_over(tmp_path, harm):
    for name in ("policy.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json"):
        root = tmp_path / name
        save(root, 1)
        harm(save(root, 2) / name)
        with pytest.warns(fastppo.FastPPOWarning, match="skipped a damaged checkpoint") as caught:
            assert_is(find_checkpoint(root), 1)
        [message] = [str(warning.message) for warning in caught]
        assert "step-000002" in message
        assert name in message
        assert harm not in (cut, grow) or name == "manifest.json" or "bytes were written" in message
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(root / "step-000002")
        harm(root / "step-000001" / name)
        with pytest.raises(CheckpointError, match=f"no checkpoint can be used; the newest: .*step-000002.*{name}"):
            find_checkpoint(root)
        # The run goes on from what is left, over the damaged ones.
        save(root, 2)
        assert_is(find_checkpoint(root), 2)


def test_any_flipped_bit_of_a_manifest_is_noticed(tmp_path):
    path = save(tmp_path, 1)
    manifest = path / "manifest.json"
    written = manifest.read_bytes()
    for at in range(len(written)):
        changed = bytearray(written)
        changed[at] ^= 1 << random.randrange(8)
        manifest.write_bytes(changed)
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(path)
    manifest.write_bytes(b"[" * 9)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)
    manifest.write_bytes(b"[]")
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(path)


def test_a_newer_format_is_named(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads(path.joinpath("manifest.json").read_bytes())
    del manifest["sha256"]
    path.joinpath("manifest.json").write_bytes(module._manifest_bytes({**manifest, "version": 2}))
    with pytest.raises(CheckpointError, match=r"fastppo-checkpoint version 2, this fastppo reads .* version 1"):
        load_checkpoint(path)


# Kills and full disks

CALLS = ("mkdir", "open", "fsync", "rename", "unlink", "rmdir")


class Killed(BaseException):
    pass


class Fault:
    """Counts the calls that change the disk; the one numbered `at` meets `failure`.

    After Killed every further call is refused too, as to a process that is gone; any other failure happens once.
    """

    def __init__(self, monkeypatch, at, failure):
        self.count, self.at, self.failure = 0, at, failure
        self.unsynced = set()  # inodes of files written to since their last fsync
        self.unnamed = set()  # inodes of folder and file, for files made since the last fsync of their folder
        self.renames = []  # those since the last fsync of a folder
        self.lock = threading.Lock()
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))
        monkeypatch.setattr(Path, "write_bytes", self.wrap_writer(Path.write_bytes))
        monkeypatch.setattr(module, "save_file", self.wrap_writer(module.save_file, self.as_safetensors_says_it))

    def fails(self):
        """Counts a call; whether it fails."""
        with self.lock:
            self.count += 1
            return self.count == self.at or (isinstance(self.failure, Killed) and self.count > self.at)

    def wrap(self, name, call):
        def wrapped(target, *args, **options):
            if self.fails():
                raise self.failure
            result = call(target, *args, **options)
            if name == "rename":
                self.renames.append((target, args[0]))
            if name == "fsync":
                status = os.fstat(target)
                self.unsynced.discard(status.st_ino)
                if stat.S_ISDIR(status.st_mode):
                    self.unnamed = {pair for pair in self.unnamed if pair[0] != status.st_ino}
                    self.renames.clear()
            return result

        return wrapped

    def wrap_writer(self, write, translate=lambda error: error):
        """`write` fails before it makes the file, or once half of the file is written."""

        def wrapped(*args, **options):
            path = next(argument for argument in args if isinstance(argument, Path))
            if self.fails():
                raise translate(self.failure)
            write(*args, **options)
            self.unsynced.add(path.stat().st_ino)
            self.unnamed.add((path.parent.stat().st_ino, path.stat().st_ino))
            if self.fails():
                os.truncate(path, path.stat().st_size // 2)
                raise translate(self.failure)

        return wrapped

    @staticmethod
    def as_safetensors_says_it(error):
        if not isinstance(error, OSError):
            return error
        return SafetensorError(f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})")

    @property
    def happened(self):
        return self.count >= self.at

    def lose_power(self, root):
        """Whatever no fsync has made durable is lost."""
        unnamed = {file for _, file in self.unnamed}
        for path in [path for path in root.rglob("*") if path.is_file()]:
            if path.stat().st_ino in unnamed:
                path.unlink()
            elif path.stat().st_ino in self.unsynced:
                os.truncate(path, path.stat().st_size // 2)
        for source, target in reversed(self.renames):
            if target.name.startswith("step-"):
                target.rename(source)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Steps 1 and 2, what a killed process left, and a step saved twice whose first copy a kill kept."""
    root = tmp_path_factory.mktemp("before")
    save(root, 1)
    save(root, 2)
    shutil.copytree(root / "step-000001", root / ".saving-step-000003-0123abcd")
    (root / "step-000002").rename(root / "step-000002.1")
    shutil.copytree(root / "step-000002.1", root / "step-000002")
    return root


@pytest.mark.parametrize("step", [2, 3], ids=["same step again", "next step"])
def test_killed_at_every_call(tmp_path, before, step):
    root = tmp_path / "root"
    seen = set()
    for at in itertools.count(1):
        shutil.copytree(before, root)
        with pytest.MonkeyPatch.context() as monkeypatch:
            fault = Fault(monkeypatch, at, Killed())
            try:
                save(root, step, **payload(step, mark=1), keep_last=1)
                finished = True
            except Killed:
                finished = False
        if not fault.happened:
            break
        fault.lose_power(root)
        found = find_checkpoint(root)
        new = found.state["mark"] == 1
        assert new or not finished
        assert_is(found, *((step, 1) if new else (2, 0)))
        seen.add(new)
        for path in root.glob("step-*"):
            load_checkpoint(path)  # what is being deleted is out of sight, too
        # The next save works and clears up.
        save(root, 4, keep_last=1)
        assert_is(find_checkpoint(root), 4)
        assert names(root) == ["step-000004"]
        shutil.rmtree(root)
    assert finished
    assert at > 40  # every file is written and synced, and folders are renamed and deleted
    assert seen == {False, True}


@pytest.mark.parametrize(
    ("step", "number"), [(2, errno.EIO), (3, errno.ENOSPC)], ids=["same step again", "next step, disk full"]
)
def test_every_call_may_fail(tmp_path, before, step, number):
    root = tmp_path / "root"
    outcomes = set()
    for at in itertools.count(1):
        shutil.copytree(before, root)
        refused = ""
        with pytest.MonkeyPatch.context() as monkeypatch, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            fault = Fault(monkeypatch, at, OSError(number, os.strerror(number)))
            try:
                path = save(root, step, **payload(step, mark=1), keep_last=2)
            except CheckpointError as error:
                refused = str(error)
        if not fault.happened:
            break
        found = find_checkpoint(root)
        if refused:
            assert f"step {step} could not be saved" in refused
            assert os.strerror(number) in refused
            assert "GB are free" not in refused  # there is room
            # Only the last fsync can fail with the new one already in place.
            assert_is(found, *((step, 1) if found.state["mark"] == 1 else (2, 0)))
            assert root.joinpath("step-000001").exists()
        else:
            assert found.path == path
            assert_is(found, step, 1)
        assert warned or not [name for name in names(root) if name.startswith(".saving")]
        outcomes.add((bool(refused), bool(warned)))
        shutil.rmtree(root)
    assert path == root / f"step-{step:06d}"
    assert not refused
    assert not warned
    assert {(True, False), (False, True)} <= outcomes


def test_ctrl_c_leaves_nothing_half_written(tmp_path):
    save(tmp_path, 1)
    for at in range(1, 12):
        with pytest.MonkeyPatch.context() as monkeypatch:
            Fault(monkeypatch, at, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, 2)
        assert names(tmp_path) == ["step-000001"]
    assert_is(find_checkpoint(tmp_path), 1)


KILLED_WHILE_SAVING = """
    import os, random, signal, sys, time, warnings
    from pathlib import Path
    sys.path[:0] = sys.argv[2:]
    import torch
    from fastppo.training.checkpoint import find_checkpoint, save_checkpoint

    warnings.simplefilter("error")

    def tensors(step):
        weight = torch.full((5000,), float(step))
        return {"policy": {"embed": weight, "head": weight}, "optimizer": {"moment": torch.full((9000,), -float(step))}}

    def save_for_ever(root, step, writer):
        while True:
            content = {"tensors": tensors(step), "state": {"at": step}, "config": {}}
            save_checkpoint(root, step, **content, keep_last=2)
            os.write(writer, step.to_bytes(8, "little"))
            step += 1

    torch.set_num_threads(1)  # fork copies only the calling thread
    root, newest, start = Path(sys.argv[1]), -1, time.monotonic()
    for trial in range(40):
        if trial >= 10 and time.monotonic() > start + 1:
            break
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(root, newest + 1, writer)
        os.close(writer)
        # A few whole saves, then somewhere within the next.
        reported, began = b"", time.monotonic()
        count = random.randrange(1, 4)
        for _ in range(count):
            reported += os.read(reader, 8)
        time.sleep(random.random() * (time.monotonic() - began) / count)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while part := os.read(reader, 1 << 16):
            reported += part
        os.close(reader)
        newest = int.from_bytes(reported[-8:], "little")
        found = find_checkpoint(root)
        assert newest <= found.step <= newest + 1, (newest, found.step)
        newest = found.step
        assert found.state == {"at": newest}
        for group, expected in tensors(newest).items():
            restored = found.tensors(group)
            assert restored.keys() == expected.keys()
            assert all(torch.equal(restored[name], tensor) for name, tensor in expected.items())
    left = [name for name in os.listdir(root) if not name.startswith(("step-", ".saving-", ".trash-"))]
    assert not left and len(os.listdir(root)) <= 6, os.listdir(root)
    print("survived", trial)
"""


@pytest.mark.slow
def test_killed_by_sigkill_at_random_moments(tmp_path):
    repository = Path(fastppo.__file__).parents[1]
    paths = [str(repository), str(repository / "kernels")]
    command = [sys.executable, "-c", textwrap.dedent(KILLED_WHILE_SAVING), str(tmp_path / "root"), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 10


def fill_up(root, reason):
    """Save until there is no more room; everything that had been saved stays whole."""
    small, large = ({"policy": {"weight": torch.randn(size)}} for size in (10_000, 1_000_000))
    save(root, 1, tensors=small)
    for _ in range(2):
        message = rf"step 2 could not be saved: .*{reason}\. Older checkpoints are untouched"
        with pytest.raises(CheckpointError, match=message):
            save(root, 2, tensors=large)
        assert names(root) == ["step-000001"]
    assert same_bits(find_checkpoint(root).tensors("policy")["weight"], small["policy"]["weight"])
    save(root, 3, tensors=small)
    assert names(root) == ["step-000001", "step-000003"]


def test_file_size_limit(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        fill_up(tmp_path, "File too large.*")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        # 1,000,000 float32 on 2 MiB, of which a little is taken.
        fill_up(tmp_path, r"No space left on device.* \(it needs 0\.004 GB, 0\.002 GB are free\)")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# Optimizers


class Everything(torch.optim.Optimizer):
    """Sign descent on a float32 copy of its parameters, with one state of every kind."""

    def __init__(self, params, lr, **options):
        super().__init__(params, {"lr": lr, "name": "everything", "pair": (0.5, (1, None)), "flag": False, **options})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["master"] = parameter.float() + 1e-6
                    state |= {
                        "count": 0,
                        "mask": parameter > 0,
                        "codes": torch.arange(300).to(torch.int16),
                        "none": None,
                    }
                    state["nested"] = {"history": [torch.zeros(3, dtype=torch.float64), (1.5, "x")], 7: {"$odd": True}}
                state["count"] += 1
                state["nested"]["history"][0] += parameter.double().mean() / 3
                state["master"] -= group["lr"] * parameter.grad.float().sign() * state["count"] * 1e-3
                parameter.copy_(state["master"])


def eight_bit(params, **options):
    # On a CPU bitsandbytes' import asks for optional kernels and prints that they are missing.
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.optim.AdamW8bit(params, **options)


def paged(params, **options):
    """PagedAdamW8bit as on a GPU: bitsandbytes marks the moments that it allocates, and prefetches them."""
    bitsandbytes = pytest.importorskip("bitsandbytes")

    class Paged(bitsandbytes.optim.PagedAdamW8bit):
        def get_state_buffer(self, p, dtype=torch.float32):
            buffer = torch.zeros_like(p, dtype=dtype)
            buffer.is_paged = True
            self.page_mng.paged_tensors.append(buffer)
            return buffer

        def prefetch_state(self, p):
            assert all(self.state[p][name].is_paged for name in ("state1", "state2"))

    Paged.__name__ = "AdamW8bit"  # of which `build_optimizer` makes it
    return Paged(params, **options)


OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw fused": lambda params: torch.optim.AdamW(params, fused=True),
    "adamw amsgrad": lambda params: torch.optim.AdamW(params, amsgrad=True, lr=torch.tensor(1e-2), foreach=False),
    "sgd": lambda params: torch.optim.SGD(params),
    "sgd momentum": lambda params: torch.optim.SGD(params, momentum=0.9, nesterov=True),
    "adafactor": lambda params: torch.optim.Adafactor(params),
    "everything": lambda params: Everything(params, lr=0.1),
    "8-bit": lambda params: eight_bit(params, betas=(0.8, 0.95), weight_decay=0.1),
    "8-bit paged": lambda params: paged(params, betas=(0.8, 0.95), weight_decay=0.1),
}


class Learner:
    """A model of odd shapes, dropout, an optimizer with two groups, and a schedule."""

    def __init__(self, dtype, make):
        # 97 x 83 is above bitsandbytes' 4,096 elements, below which states stay 32-bit; the bias is below.
        self.model = torch.nn.Sequential(
            torch.nn.Linear(83, 97), torch.nn.Dropout(0.2), torch.nn.Tanh(), torch.nn.Linear(97, 3, bias=False)
        ).to(dtype)
        self.frozen = torch.nn.Parameter(torch.zeros(5, dtype=dtype))
        first, last = list(self.model[0].parameters()), list(self.model[3].parameters())
        self.optimizer = make([{"params": [*first, self.frozen]}, {"params": last, "lr": 3e-3}])
        self.dtype = dtype

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.randn(6, 83, dtype=self.dtype)).square().mean().backward()
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * 0.9

    def save(self, root):
        tensors, meta = optimizer_tensors(self.optimizer)
        rng_tensors, rng_meta = rng_state()
        groups = {"policy": self.model.state_dict(), "optimizer": tensors, "rng": rng_tensors}
        save(root, 3, tensors=groups, state={"optimizer": meta, "rng": rng_meta})

    def load(self, root):
        found = find_checkpoint(root)
        self.model.load_state_dict(found.tensors("policy"))
        load_optimizer(self.optimizer, found.tensors("optimizer"), found.state["optimizer"])
        set_rng_state(found.tensors("rng"), found.state["rng"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_gives_the_same_bits(tmp_path, name, dtype):
    straight = Learner(dtype, OPTIMIZERS[name])
    for _ in range(3):
        straight.step()
    straight.save(tmp_path)
    resumed = Learner(dtype, OPTIMIZERS[name])
    seed_everything(random.randrange(2**40))
    resumed.step()  # a state to be replaced, not only filled
    resumed.load(tmp_path)
    saved_tensors, saved_meta = optimizer_tensors(straight.optimizer)
    tensors, meta = optimizer_tensors(resumed.optimizer)
    assert json.loads(json.dumps(meta)) == json.loads(json.dumps(saved_meta))
    assert [type(group.get("betas")) for group in resumed.optimizer.param_groups] == [
        type(group.get("betas")) for group in straight.optimizer.param_groups
    ]
    assert tensors.keys() == saved_tensors.keys()
    assert [key for key in tensors if not same_bits(tensors[key], saved_tensors[key])] == []
    if name.startswith("8-bit"):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.uint8, torch.float32}

    # Three more steps of each, from the same numbers, end in the same bytes on disk.
    generators = rng_state()
    manifests = []
    for learner, root in ((straight, tmp_path / "straight"), (resumed, tmp_path / "resumed")):
        set_rng_state(*generators)
        for _ in range(3):
            learner.step()
        learner.save(root)
        manifests.append((root / "step-000003" / "manifest.json").read_bytes())
    assert manifests[0] == manifests[1]
    assert manifests[0] != (tmp_path / "step-000003" / "manifest.json").read_bytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restoring_shares_no_memory_with_what_was_given(name):
    learner, other, third = (Learner(torch.bfloat16, OPTIMIZERS[name]) for _ in range(3))
    learner.step()
    tensors, meta = optimizer_tensors(learner.optimizer)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    load_optimizer(other.optimizer, tensors, meta)
    other.step()
    assert all(same_bits(tensors[key], kept[key]) for key in kept)
    load_optimizer(third.optimizer, tensors, meta)
    restored = optimizer_tensors(third.optimizer)[0]
    assert all(same_bits(restored[key], kept[key]) for key in kept)


def test_paged_moments_are_restored_into_paged_memory_that_is_used_again():
    first, learner = (Learner(torch.float32, OPTIMIZERS["8-bit paged"]) for _ in range(2))
    first.step()
    tensors, meta = optimizer_tensors(first.optimizer)
    pages = learner.optimizer.page_mng.paged_tensors  # of the process
    for new in (6, 0):  # two moments of each of three parameters with a gradient
        before = len(pages)
        load_optimizer(learner.optimizer, tensors, meta)
        assert len(pages) - before == new
        learner.step()
    pages.clear()


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_paged_optimizer_pages_on_a_gpu(on_gpu):
    pytest.importorskip("bitsandbytes")

    class Parameter(torch.nn.Parameter):
        is_cuda = on_gpu

    optimizer = build_optimizer(OptimConfig(name="paged_adamw_8bit"), [Parameter(torch.zeros(3))], [])
    assert optimizer.is_paged is on_gpu
    assert not build_optimizer(OptimConfig(name="adamw_8bit"), [Parameter(torch.zeros(3))], []).is_paged


def test_an_optimizer_over_other_parameters_is_refused():
    tensors, meta = optimizer_tensors(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3, 4))]))
    shapes = r"group 0, parameter 0 has shape \[4, 3\], was saved with shape \[3, 4\]"
    with pytest.raises(CheckpointError, match=shapes):
        load_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4, 3))]), tensors, meta)
    with pytest.raises(CheckpointError, match=r"group 0, parameter 1 has shape \[3, 4\], was saved with shape None"):
        load_optimizer(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(2)]), tensors, meta)


@pytest.mark.parametrize("schedule", typing.get_args(Schedule))
def test_a_warm_up_may_be_as_long_as_the_run_or_longer(schedule):
    for warmup in (0 if schedule == "constant" else steps for steps in range(6)):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = build_scheduler(OptimConfig(lr_scheduler_type=schedule, warmup_steps=warmup), optimizer, 3)
        rates = []
        for _ in range(3):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        assert rates[:warmup] == [(step + 1) / warmup for step in range(min(warmup, 3))]
        assert all(0 < rate <= 1 for rate in rates)


def test_missing_and_untaken_states_are_named():
    learner, other = (Learner(torch.float32, OPTIMIZERS["adamw"]) for _ in range(2))
    learner.step()
    tensors, meta = optimizer_tensors(learner.optimizer)
    lacking = {key: tensor for key, tensor in tensors.items() if key != "state.1.exp_avg"}
    with pytest.raises(CheckpointError, match=r"here: lacks 'state\.1\.exp_avg'"), restoring("here"):
        load_optimizer(other.optimizer, lacking, meta)
    with pytest.raises(CheckpointError, match=r"AdamW\) did not take the states stray"):
        load_optimizer(other.optimizer, {**tensors, "stray": torch.ones(1)}, meta)


def test_a_state_that_cannot_be_held_is_named():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))])
    optimizer.param_groups[0]["hook"] = [print]
    with pytest.raises(TypeError, match=r"param_groups\.0\.hook\.0 is a builtin_function_or_method"):
        optimizer_tensors(optimizer)


# Random numbers


@pytest.fixture
def _generators():
    kept, bit_generator = rng_state(), np.random.get_bit_generator()
    yield
    np.random.set_bit_generator(bit_generator)
    set_rng_state(*kept)


def draw():
    # Odd counts of normal numbers leave half of a pair in each generator: part of the state.
    python = [random.random(), random.gauss(0, 1), random.getrandbits(70), random.sample(range(99), 5)]
    numpy = [*np.random.standard_normal(3), *np.random.permutation(9), np.random.random()]
    return (
        python,
        numpy,
        torch.randn(5).tolist(),
        torch.randperm(11).tolist(),
        torch.nn.functional.dropout(torch.ones(9)),
    )


def same_draws(left, right):
    return left[:-1] == right[:-1] and same_bits(left[-1], right[-1])


@pytest.mark.usefixtures("_generators")
@pytest.mark.parametrize("bit_generator", [None, "PCG64"])
def test_random_numbers_go_on(tmp_path, bit_generator):
    if bit_generator:
        np.random.set_bit_generator(getattr(np.random, bit_generator)())
    draw()
    tensors, meta = rng_state()
    save(tmp_path, 1, tensors={"rng": tensors}, state={"rng": meta})
    expected = [draw() for _ in range(3)]
    assert not same_draws(expected[0], expected[1])
    draw()
    found = find_checkpoint(tmp_path)
    for _ in range(2):
        set_rng_state(found.tensors("rng"), found.state["rng"])
        assert all(same_draws(draw(), numbers) for numbers in expected)
    set_rng_state(tensors, meta)  # what rng_state returned has not changed since
    assert same_draws(draw(), expected[0])


@pytest.mark.usefixtures("_generators")
def test_seeds():
    draws = []
    for seed in (7, 7, 8, 2**63 + 7):
        seed_everything(seed)
        draws.append(draw())
    assert same_draws(draws[0], draws[1])
    assert not same_draws(draws[0], draws[2])
    assert draws[0][0] != draws[3][0]


@pytest.mark.usefixtures("_generators")
def test_states_that_do_not_fit_are_refused():
    tensors, meta = rng_state()
    for broken in (
        ({**tensors, "torch": tensors["torch"][:9]}, meta),
        ({key: tensor for key, tensor in tensors.items() if key != "python"}, meta),
        ({**tensors, "python": tensors["python"][1:]}, meta),
        (tensors, {**meta, "numpy": {**meta["numpy"], "bit_generator": "PCG64"}}),
        (tensors, {**meta, "numpy": {**meta["numpy"], "state": {"pos": 2**30}}}),  # numpy alone would read it there
        (tensors, {**meta, "python": {**meta["python"], "gauss_next": "x"}}),
    ):
        with pytest.raises(CheckpointError, match="rng"), restoring("rng"):
            set_rng_state(*broken)


@pytest.mark.usefixtures("_generators")
def test_every_gpu(monkeypatch):
    """With stand-ins for the driver's part: each device's state is kept and goes back to its own device."""
    states = [torch.randint(0, 256, (16,), dtype=torch.uint8) for _ in range(3)]
    restored = {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: states)
    tensors, meta = rng_state()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, index: restored.__setitem__(index, state))
    for count in (3, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        restored.clear()
        set_rng_state(tensors, meta)
        assert restored.keys() == {0, 1, 2}
        assert all(same_bits(restored[index], states[index]) for index in restored)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    restored.clear()
    with pytest.warns(fastppo.FastPPOWarning, match="states of 3 GPUs, 1 are here"):
        set_rng_state(tensors, meta)
    assert restored.keys() == {0}
