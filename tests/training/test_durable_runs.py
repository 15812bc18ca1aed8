"""What a run leaves in its folder when it is killed, refused, or out of space, and that a resume makes it whole."""

from __future__ import annotations

import contextlib
import copy
import errno
import io
import json
import os
import random
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from tiny import build_changed_config, make_tiny_model, metrics_of, same, weights_of

from fastppo.cli import main
from fastppo.training import metrics as metrics_module
from fastppo.training.checkpoint import CheckpointError
from fastppo.training.config import ConfigError
from fastppo.training.files import atomic_folder, atomic_write
from fastppo.training.metrics import MetricsLogger, read_alarms
from fastppo.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")


def vowels(prompts, completions, **_):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_tiny_model(folder / "model", hidden_size=8, layers=1)
    (folder / "prompts.txt").write_text("\n".join(f"The number {i} is" for i in range(12)))
    return folder


def config(world, out, **changes):
    tree = {
        "output_dir": str(out),
        "total_steps": 2,
        "report_to": "none",
        "model": {"name_or_path": str(world / "model")},
        "data": {"train": str(world / "prompts.txt"), "eval_size": 2},
        "rewards": [{"name": "vowels", "function": f"{__file__}:vowels"}],
        "rollout": {"num_prompts": 2, "num_generations": 1, "max_new_tokens": 3},
        "ppo": {"num_ppo_epochs": 1},
        "optim": {"learning_rate": 1e-2},
        "checkpoint": {"every": 1},
        "eval": {"every": 1},
        # Every evaluation raises an alarm, and the one after a step changes how the run goes on.
        "watch": {"rules": [{"metric": "eval/length", "above": 0.0, "action": "lower_lr"}]},
    }
    return build_changed_config(tree, changes)


def left(out):
    """All that a run leaves for people, without times."""
    texts = {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted((out / "samples").glob("*"))}
    return {"metrics": metrics_of(out), "alarms": (out / "alarms.jsonl").read_bytes(), **texts}


# Kills


class Killed(BaseException):
    """Like SIGKILL: nothing that the run does about it has an effect on the disk."""


class Kill:
    """From its call numbered `at` on, what changes the disk is refused. Counting begins with `armed`."""

    def __init__(self, monkeypatch, at):
        self.count, self.at, self.armed = 0, at, True
        for module, name in (
            *((os, name) for name in ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")),
            (io, "open"),  # by which a Path opens its file
        ):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, call):
        def wrapped(*args, **options):
            self.count += self.armed
            if self.armed and self.count >= self.at:
                raise Killed
            return call(*args, **options)

        return wrapped


@pytest.fixture(scope="module")
def whole(world, no_report, tmp_path_factory):
    """A run that was never killed, and a copy of it from before its last evaluation."""
    out = tmp_path_factory.mktemp("whole") / "run"
    before = out.with_name("before")
    trainer = Trainer(config(world, out))
    evaluate = trainer.scorer.evaluate

    def keep_and_evaluate(*arguments):
        if trainer.step == 2:
            shutil.copytree(out, before)
        return evaluate(*arguments)

    trainer.scorer.evaluate = keep_and_evaluate
    trainer.train()
    assert [alarm["outcome"] for alarm in read_alarms(out)] == ["learning rate times 0.5", "the run was over"]
    return out, before


def resumed(world, out, **changes):
    return Trainer(config(world, out, **changes), resume=True)


def kill_last_evaluation(world, before, out, at):
    """Resume before the last evaluation; kill at a call after it. Whether it was killed."""
    shutil.copytree(before, out)
    trainer = resumed(world, out)
    trainer.save_policy = lambda folder: folder  # it is there
    with pytest.MonkeyPatch.context() as patch:
        kill = Kill(patch, at)
        kill.armed = False
        evaluate = trainer.scorer.evaluate

        def arm(*arguments):
            result = evaluate(*arguments)
            kill.armed = True
            return result

        trainer.scorer.evaluate = arm
        try:
            trainer.train()
        except Killed:
            return True
    return False


CALLS = 14  # six for the samples, six for the alarms, one for the row, one for the lock
QUICK = (6, 12, 13)


@pytest.mark.parametrize(
    "at", [pytest.param(at, marks=() if at in QUICK else pytest.mark.slow) for at in range(1, CALLS + 2)]
)
def test_an_evaluation_is_done_with_its_samples_and_alarms_or_not_at_all(world, whole, tmp_path, at):
    (out, before), killed = whole, tmp_path / "run"
    was_killed = kill_last_evaluation(world, before, killed, at)
    assert was_killed == (at <= CALLS)
    if any("eval/reward" in row and row["step"] == 2 for row in metrics_of(killed)):
        assert left(killed) == left(out)  # already
    resumed(world, killed).train()
    assert left(killed) == left(out)
    assert not list(killed.rglob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(12))
def test_killed_at_any_call_of_a_run_and_resumed(world, whole, tmp_path, trial):
    """Twice, at random calls from the construction of the Trainer to its end."""
    out, killed = whole[0], tmp_path / "run"
    for resume in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            Kill(patch, random.randrange(1, 100))
            with contextlib.suppress(Killed):
                Trainer(config(world, killed), resume=resume).train()
    finished = Trainer(config(world, killed), resume=True)
    finished.train()
    assert left(killed) == left(out)
    assert same(weights_of(killed), weights_of(out))
    assert not list(killed.rglob(".*"))


@pytest.mark.parametrize("at_once", [True, False])
def test_an_evaluation_whose_files_cannot_be_written_is_made_again(world, whole, tmp_path, monkeypatch, at_once):
    """Its observations are not in the checkpoint that the failure leaves, and its row is not in the log."""
    out, failed = whole[0], tmp_path / "run"
    trainer = Trainer(config(world, failed, checkpoint__every=10))

    def full(output_dir, name, rows):
        if name == "step-000001":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "samples")
        return metrics_module.write_samples(output_dir, name, rows)

    monkeypatch.setattr("fastppo.training.trainer.write_samples", full)
    with pytest.raises(OSError, match="No space"):
        trainer.train()
    monkeypatch.setattr("fastppo.training.trainer.write_samples", metrics_module.write_samples)
    again = resumed(world, failed, checkpoint__every=10)
    assert again.step == 1
    assert again.watch.alarms == []
    # What its alarm asked for is done, too, by a run that was killed between that evaluation and the next checkpoint.
    monkeypatch.setattr(again, "_checkpoint" if at_once else "train_step", Mock(side_effect=Killed))
    with pytest.raises(Killed):
        again.train()
    resumed(world, failed, checkpoint__every=10).train()
    assert left(failed) == left(out)
    assert same(weights_of(failed), weights_of(out))


def test_a_step_whose_row_cannot_be_written_is_made_again(world, whole, tmp_path, monkeypatch):
    out, failed = whole[0], tmp_path / "run"
    log = MetricsLogger.log

    def full(self, step, metrics):
        if step == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        log(self, step, metrics)

    monkeypatch.setattr(MetricsLogger, "log", full)
    with pytest.raises(OSError, match="No space"):
        Trainer(config(world, failed)).train()
    monkeypatch.setattr(MetricsLogger, "log", log)
    resumed(world, failed).train()
    assert left(failed) == left(out)


def test_a_prolonged_run_knows_the_last_evaluation_of_the_shorter_one(world, whole, tmp_path):
    """Its checkpoint was saved before that evaluation, whose alarms stay all the same."""
    longer = tmp_path / "run"
    shutil.copytree(whole[0], longer)
    trainer = resumed(world, longer, total_steps=3)
    assert [alarm.outcome for alarm in trainer.watch.alarms] == ["learning rate times 0.5", "the run was over"]
    shorter = copy.deepcopy(trainer.watch.state_dict())
    trainer.train()
    alarms = read_alarms(longer)
    assert [alarm["step"] for alarm in alarms] == [1, 2, 3]
    assert alarms[:2] == read_alarms(whole[0]) == json.loads(json.dumps(shorter["alarms"]))
    assert [row["step"] for row in metrics_of(longer) if "eval/reward" in row] == [0, 1, 2, 3]


def test_what_a_killed_run_left_is_deleted_by_the_next(world, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[1], out)
    (out / "plots").mkdir()
    for name in (".saving-metrics.jsonl", "samples/.saving-after.jsonl", "plots/.saving-kl.png", ".saving-report.html"):
        (out / name).write_text("half")
    for name in (
        ".saving-final",
        ".trash-final",
        "checkpoints/.saving-step-000003-0f",
        "checkpoints/.trash-step-1-0f",
    ):
        shutil.copytree(out / "checkpoints" / "step-000001", out / name)
    (out / ".lock").write_text("process 1 on another machine")
    (out / ".mine").write_text("not ours")
    resumed(world, out).train()
    assert [path.name for path in out.rglob(".*")] == [".mine"]


# One run a folder


def test_a_run_holds_its_folder_from_its_construction_to_its_end(world, tmp_path):
    out, calls = tmp_path / "run", []

    def held(completions, **_):
        calls.append(1)
        if len(calls) == 1:
            with pytest.raises(CheckpointError, match="a Trainer of this process has a run in this folder"):
                Trainer(config(world, out), resume=True)
        return [0.0] * len(completions)

    Trainer(config(world, out), rewards=[held]).train()
    assert calls
    assert not (out / ".lock").exists()
    with pytest.raises(CheckpointError, match="holds an earlier run"):
        Trainer(config(world, out))
    trainer = resumed(world, out)  # a failed construction has let go
    trainer.scorer.evaluate = lambda *_: pytest.fail("evaluated again")
    trainer.train()

    class Broken(Exception):
        pass

    trainer = resumed(world, out, total_steps=3)
    trainer.train_step = lambda: (_ for _ in ()).throw(Broken)
    with pytest.raises(Broken):
        trainer.train()
    assert resumed(world, out, total_steps=3).step == 2  # and so has a failed run


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}


def write_yaml(world, out, **changes):
    import yaml

    from fastppo.training.config import to_dict

    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(to_dict(config(world, out, **changes))))
    return str(path)


def test_the_command_line_says_who_holds_the_folder(world, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    path = write_yaml(world, out)
    trainer = resumed(world, out)
    before = snapshot(out)
    assert main(["train", path, "--resume"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "a Trainer of this process has a run in this folder" in line
    assert snapshot(out) == before
    trainer._lock.release()


# Resumes


def test_a_resume_with_fewer_steps_than_done_is_refused_and_one_with_as_many_is_a_finished_run(
    world, whole, tmp_path, capsys
):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    before = snapshot(out)
    assert main(["train", write_yaml(world, out, total_steps=1), "--resume"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"total_steps: 1 is less than the 2 steps that {out} has done; give at least 2" in line
    assert snapshot(out) == before
    result = resumed(world, out).train()
    assert (result.step, result.final) == (2, out / "final")
    assert left(out) == left(whole[0])


def test_a_run_that_is_shortened_to_what_is_done_is_finished(world, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    resumed(world, out, total_steps=4)._lock.release()
    result = resumed(world, out, total_steps=2).train()
    assert (result.step, result.interrupted_by) == (2, None)


def test_a_checkpoint_from_before_a_key_was_there_is_resumed_on_another_device(world, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    path = out / "checkpoints" / "step-000002"
    saved = json.loads((path / "config.json").read_text())
    assert saved["device"] == "auto"
    del saved["rollout"]["temperature"], saved["ppo"]["dual_clip"]
    saved["ppo"]["reward_clip"] = None
    (path / "config.json").write_text(json.dumps(saved))
    from test_hostile_checkpoints import seal

    seal(path)
    changes = {"device": "cpu", "rollout__generation_batch_size": 1, "ppo__gradient_accumulation_steps": 2}
    assert resumed(world, out, **changes).step == 2


def test_a_rollback_too_many_reads_no_checkpoint(world, tmp_path, monkeypatch):
    rule = {"metric": "completion/length", "above": 0.0, "action": "rollback"}
    trainer = Trainer(config(world, tmp_path / "run", watch__rules=[rule], watch__max_rollbacks=0))
    monkeypatch.setattr(
        "fastppo.training.trainer.find_checkpoint", lambda *_, **__: pytest.fail("a checkpoint was read")
    )
    assert trainer.train().stopped.startswith("completion/length")


# Folders that cannot be used, and full disks


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("FOLDER/file/run", "Not a directory"),
        ("FOLDER/file", "File exists"),
        ("FOLDER/" + "a" * 300, "File name too long"),
        ("FOLDER/" + "a/" * 3000, "File name too long"),
        ("/proc/run", "No such file"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_in_one_line(world, tmp_path, monkeypatch, name, problem):
    monkeypatch.setattr(Trainer, "_build", lambda *_: pytest.fail("something was loaded"))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"^output_dir: .* cannot be written to \(.*{problem}") as caught:
        Trainer(config(world, name.replace("FOLDER", str(tmp_path))))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(world, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        Trainer(config(world, tmp_path / "run"))


FILES = ["config.yaml", "metrics.jsonl", "samples/before.jsonl", "alarms.jsonl", "checkpoints", "final-value", "final"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FILES[:2] else pytest.mark.slow) for name in FILES]
)
def test_a_full_disk_is_named_with_the_file(world, tmp_path, monkeypatch, capsys, name):
    """In the error of the system itself, which has no file name where a write fails."""
    out, call = tmp_path / "run", os.fsync

    def full(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}").replace(".saving-", "")
        if path.startswith(str(out / name)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        call(descriptor)

    if name != "final":
        monkeypatch.setattr(os, "fsync", full)
    else:
        save = Path.mkdir
        monkeypatch.setattr(os, "makedirs", lambda path, *a, **o: full_or(path, save, a, o))

        def full_or(path, save, a, o):
            if "saving-final" in str(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            Path(path).mkdir(parents=True, exist_ok=True)

    assert main(["train", write_yaml(world, out)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert str(out / name) in line.replace(".saving-", "")
    assert "No space left on device" in line


def test_files_and_folders_are_on_disk_before_they_have_their_names(tmp_path, monkeypatch):
    """A power cut leaves whatever is not synced empty, or nameless."""
    synced, call, rename = set(), os.fsync, os.rename

    def fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        call(descriptor)

    def rename_synced(source, target):
        assert {path.stat().st_ino for path in (source, *source.rglob("*"))} <= synced
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename_synced)
    with atomic_folder(tmp_path / "run" / "final") as folder:
        (folder / "value").mkdir()
        for name in ("config.json", "value/model.safetensors"):
            (folder / name).write_text("{}")
    atomic_write(tmp_path / "run" / "samples" / "before.jsonl", b"{}")
    assert {path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*"))} <= synced


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_a_folder_is_replaced_and_what_it_points_to_stays(tmp_path, there):
    if there:
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "final").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "final") as folder:
        (folder / "config.json").touch()
    assert not (tmp_path / "final").is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["config.json", *(["elsewhere"] * there), "final"]


def test_what_libraries_raise_for_a_full_disk_names_the_file():
    from safetensors import SafetensorError

    from fastppo.training.files import naming

    for error in (SafetensorError("No space left (os error 28)"), Exception("No space left (os error 28)")):
        with pytest.raises(OSError, match="No space left") as caught, naming("there"):
            raise error
        assert caught.value.filename == "there"
    with pytest.raises(ValueError, match="other"), naming("there"):
        raise ValueError("other")
