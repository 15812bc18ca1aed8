"""The trackers, each read back through its own library: what is in them is what is in metrics.jsonl."""

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
from html import unescape
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
import torch
import yaml

from fastppo.errors import ConfigError
from fastppo.training.metrics import TRACKERS_FILE, MetricsLogger, read_metrics, samples_name, write_samples
from fastppo.training.rng import rng_state
from fastppo.training.trackers import TRACKERS, Tracker, Trackers, load_trackers

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert('x')</script> ![x](http://evil.example/a.png) | $x{|長さ//.. *b* `c`\n# d"
CONFIG = {"total_steps": 9, "optim": {"learning_rate": 1e-5, "name": HOSTILE}, "rewards": [{"name": HOSTILE}]}
SAMPLES = [
    {"prompt": HOSTILE, "completion": "lone \ud800", "reward": 0.5, "rewards": {"v": math.nan, HOSTILE: 1.0}},
    {"prompt": "", "completion": HOSTILE, "reward": -1.0, "rewards": {"v": 0.25, HOSTILE: 2.0}},
]
TRACKER = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "tensorboard" else pytest.mark.slow) for name in TRACKERS]
)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Nothing of the user's reaches a tracker."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb-data"))


def trackers(names, folder, **changes) -> Trackers:
    arguments = {"project": "a-project", "run_name": "a run", "config": CONFIG, "warn": pytest.fail}
    return Trackers(names, folder, **arguments | changes)


def log_steps(logger: MetricsLogger, trackers: Trackers, folder: Path, steps: range, offset: float = 0.0) -> None:
    """Steps, with an evaluation and its samples after every third."""
    for step in steps:
        nan = math.nan if step == 2 else 1e-5
        logger.log(step, {"reward/mean": step + offset, "lr": nan, f"reward/{HOSTILE}": 1.0, "loss/policy": math.inf})
        if step % 3 == 0:
            logger.log(step, {"eval/reward": 10 * step + offset})
            write_samples(folder, samples_name(step, CONFIG["total_steps"]), SAMPLES)
            trackers.samples(step, SAMPLES)


# Each returns {metric: [(step, value)]}, {step: the samples' columns and rows}, and the text of the configuration.


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    text = {name: events.Tensors(f"{name}/text_summary") for name in ("config", "samples")}
    tables = {}
    for event in text["samples"]:
        html = markdown_to_safe_html(event.tensor_proto.string_val[0])
        assert not re.search("<(script|img|a|em|h1|code)", html)  # what TensorBoard's page shows
        cells = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in html.split("<tr>")[1:]]
        plain = [[unescape(cell.replace("<br>", "\n")) for cell in row] for row in cells]
        tables[event.step] = plain[0], [[*row[:2], *map(float, row[2:])] for row in plain[1:]]
    scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return scalars, tables, text["config"][0].tensor_proto.string_val[0].decode()


def read_trackio(folder):
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    [run] = [run for run in trackio.Api().runs("a-project") if run.name == "a run"]
    scalars, tables = {}, {}
    for row in SQLiteStorage.get_logs("a-project", run.name, run_id=run.id):
        for name, value in row.items():
            if name == "samples":
                rows = [[math.nan if cell == "NaN" else cell for cell in line.values()] for line in value["_value"]]
                tables[row["step"]] = list(value["_value"][0]), rows
            elif name not in ("step", "timestamp"):
                scalars.setdefault(name, []).append((row["step"], value))
    return scalars, tables, json.dumps(run.config, ensure_ascii=False)


def read_wandb(folder):
    """wandb itself reads an offline run only to upload it; so this reads the records of the file."""
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, chunks, scalars, tables, config = path.read_bytes(), 7, b"", {}, {}, ""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        chunks += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (1, 4):  # the record goes on in the next chunk
            continue
        record, chunks = wandb_internal_pb2.Record.FromString(chunks), b""
        if record.WhichOneof("record_type") == "run":
            assert (record.run.project, record.run.display_name) == ("a-project", "a run")
            config += json.dumps({item.key: json.loads(item.value_json) for item in record.run.config.update})
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name in row.keys() - {"_step", "_timestamp", "_runtime"}:
            if not name.startswith("samples/"):
                scalars.setdefault(name, []).append((row["_step"], float(row[name])))
        if "samples/path" in row:
            table = json.loads((path.parent / "files" / row["samples/path"]).read_text())
            tables[row["_step"]] = table["columns"], [[math.nan if c == "NaN" else c for c in r] for r in table["data"]]
    return scalars, tables, json.loads(json.dumps(config))


def read_mlflow(folder):
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{quote(str(folder.resolve()))}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("a-project").experiment_id])
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    artifacts = Path(unquote(run.info.artifact_uri.removeprefix("file://")))
    scalars, tables = {}, {}
    for name in run.data.metrics:
        history = client.get_metric_history(run.info.run_id, name)
        scalars[name] = [(m.step, math.inf if m.value > 1e308 else m.value) for m in history]
    for path in (artifacts / "samples").iterdir():
        table = json.loads(path.read_text())
        rows = [[math.nan if cell is None else cell for cell in row] for row in table["data"]]
        tables[int(path.stem.removeprefix("step-"))] = table["columns"], rows
    assert run.data.params["optim.learning_rate"] == "1e-05"
    return scalars, tables, str(yaml.safe_load((artifacts / "config.yaml").read_text()))


READ = {"tensorboard": read_tensorboard, "trackio": read_trackio, "wandb": read_wandb, "mlflow": read_mlflow}


@TRACKER
def test_a_tracker_has_what_the_record_has_after_a_kill_a_resume_and_a_rollback(name, tmp_path):
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        from pathlib import Path
        from training.test_trackers import *

        def forbid(event, arguments):
            local = event == "socket.connect" and isinstance(arguments[1], str | bytes)  # wandb's own process
            if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto") and not local:
                os._exit(3)

        sys.addaudithook(forbid)
        folder = Path(sys.argv[1])
        load_trackers([{name!r}])
        run = trackers([{name!r}], folder)
        log_steps(MetricsLogger(folder, resume_step=None, trackers=run), run, folder, range(1, 8))
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    tmp_path = tmp_path / "50%25 or more?"
    tmp_path.mkdir()
    if name == "tensorboard":  # which starts no thread or process that outlives a run that is only left alone
        left = trackers([name], tmp_path)
        log_steps(MetricsLogger(tmp_path, resume_step=None, trackers=left), left, tmp_path, range(1, 8))
    else:
        environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
        killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=False)
        assert killed.returncode == -signal.SIGKILL

    load_trackers([name])
    generators = rng_state()
    run = trackers([name], tmp_path)
    with MetricsLogger(tmp_path, resume_step=4, trackers=run) as logger:
        log_steps(logger, run, tmp_path, range(5, 9), 100.0)
        logger.rewind(7)
        log_steps(logger, run, tmp_path, range(8, 10), 200.0)
    # Whether a run reports to a tracker never changes it.
    tensors, numbers = rng_state()
    assert numbers == generators[1]
    assert all(torch.equal(tensors[key], generators[0][key]) for key in tensors)

    scalars, tables, config = READ[name](tmp_path)
    rewards = [1.0, 2.0, 3.0, 4.0, 105.0, 106.0, 107.0, 208.0, 209.0]
    assert scalars["reward/mean"] == list(enumerate(rewards, 1))
    assert scalars["eval/reward"] == [(3, 30.0), (6, 160.0), (9, 290.0)]
    assert [step for step, value in scalars["lr"] if math.isnan(value)] == [2]
    assert [math.isfinite(value) for _, value in scalars["loss/policy"]] == [False] * 9
    assert scalars.keys() - {"reward/mean", "eval/reward", "lr", "loss/policy"} == {
        f"reward/{HOSTILE}" if name != "mlflow" else next(key for key in scalars if "長さ" in key)
    }
    written = [row["reward/mean"] for row in read_metrics(tmp_path / "metrics.jsonl") if "reward/mean" in row]
    assert written == rewards
    assert sorted(tables) == [3, 6, 9]
    for columns, rows in tables.values():
        assert columns == ["prompt", "completion", "reward", "reward/v", f"reward/{HOSTILE}"]
        assert rows[0][:2] == [HOSTILE, "lone ?"]
        assert rows[1] == ["", HOSTILE, -1.0, 0.25, 2.0]
        assert math.isnan(rows[0][3])
    for word in ("learning_rate", "長さ", "total_steps"):
        assert word in config or word.encode("unicode_escape").decode() in config


class Fragile(Tracker):
    """A tracker whose service dies at some point."""

    modules, extra, breaks = ("json",), "train", ""
    calls: tuple = ()

    def __init__(self, run, earlier):
        self.call("init")
        self.earlier = earlier

    def call(self, name):
        type(self).calls += (name,)
        if name == self.breaks:
            raise OSError(28, "No space\nleft on device")

    def log(self, step, metrics, when):
        self.call("log")

    def samples(self, step, columns, data):
        self.call("samples")

    def close(self, failed):
        self.call("failed" if failed else "close")


@pytest.mark.parametrize("breaks", ["init", "log", "samples", "close"])
def test_a_tracker_that_fails_is_dropped_with_one_warning_and_the_others_go_on(tmp_path, monkeypatch, breaks):
    failing, sound = (type(name, (Fragile,), {"breaks": at, "calls": ()}) for name, at in (("A", breaks), ("B", "")))
    monkeypatch.setitem(TRACKERS, "failing", failing)
    monkeypatch.setitem(TRACKERS, "sound", sound)
    warnings = []
    run = trackers(["failing", "sound"], tmp_path, warn=warnings.append)
    with MetricsLogger(tmp_path, resume_step=None, trackers=run) as logger:
        log_steps(logger, run, tmp_path, range(1, 4))
    [warning] = warnings
    assert "report_to: failing failed (OSError: [Errno 28] No space left on device); the run goes on" in warning
    assert failing.calls[-1] == breaks
    assert failing.calls.count(breaks) == 1
    assert sound.calls == ("init", "log", "log", "log", "log", "samples", "close")
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4
    with pytest.raises(RuntimeError), MetricsLogger(tmp_path, resume_step=3, trackers=run):
        raise RuntimeError
    assert sound.calls[-1] == "failed"


def test_a_full_disk_drops_tensorboard_without_a_traceback(tmp_path, monkeypatch, capfd):
    warnings = []
    run = trackers(["tensorboard"], tmp_path, warn=warnings.append)
    run.open([])
    monkeypatch.setattr(run._open["tensorboard"]._records, "_writer", open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    for step in (1, 2):
        run.log(step, {"reward/mean": 1.0})
    run.close()
    assert len(warnings) == 1
    assert "No space left" in warnings[0]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("saved", "earlier"),
    [
        ('{"sound": "a1-b2"}', "a1-b2"),
        ('{"sound": "*"}', None),
        ('{"sound": "../.."}', None),
        ("[3]", None),
        ("", None),
    ],
)
def test_only_what_can_be_an_id_names_an_earlier_run(tmp_path, monkeypatch, saved, earlier):
    """W&B's folder has the id in its name, and is deleted."""
    monkeypatch.setitem(TRACKERS, "sound", Fragile)
    (tmp_path / TRACKERS_FILE).write_text(saved)
    run = trackers(["sound"], tmp_path)
    run.open([])
    assert run._open["sound"].earlier == earlier


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_named_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, TRACKERS[name].modules[-1], None)
    monkeypatch.setattr(TRACKERS[name], "modules", TRACKERS[name].modules[-1:])
    with pytest.raises(
        ConfigError, match=rf"^report_to: {name} needs the package {name} \(.*\); pip install .*\[\w+\]"
    ):
        load_trackers([name])
    extras = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf"^{TRACKERS[name].extra} = \[$", extras, re.MULTILINE)
