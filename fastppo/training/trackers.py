"""Report a run to experiment trackers, each through its own library.

    metrics.jsonl, samples/, config ──> tensorboard | trackio | wandb | mlflow

`metrics.jsonl` is the record, and a tracker's run is a copy of it. A kill loses what a tracker had in its buffers, and
a resume or a rollback undoes steps that it has already. So each of them makes the tracker's run anew from the record.

No tracker uses the network unless the environment asks for it: WANDB_MODE=online, MLFLOW_TRACKING_URI,
TRACKIO_SPACE_ID.
"""

from __future__ import annotations

import abc
import contextlib
import importlib
import io
import json
import os
import posixpath
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fastppo.errors import ConfigError, one_line
from fastppo.extras import install_command
from fastppo.training.files import atomic_write
from fastppo.training.metrics import TRACKERS_FILE, read_samples, samples_name

Rows = Sequence[Mapping[str, Any]]


def load_trackers(names: Sequence[str]) -> None:
    """Import the trackers' libraries.

    Raises:
        ConfigError: one is missing, or fails to load.
    """
    for name in names:
        tracker = TRACKERS[name]
        for key, value in tracker.environment.items():
            os.environ.setdefault(key, value)
        try:
            for module in tracker.modules:
                importlib.import_module(module)
        except Exception as error:  # a library that does not fit another one may raise anything
            missing = f"report_to: {name} needs the package {tracker.modules[-1]} ({one_line(error)})"
            raise ConfigError(f"{missing}; {install_command(tracker.extra)}, or leave it out of report_to") from None


@dataclass
class Trackers:
    """The trackers of one run. What one of them raises is printed once, and the run goes on without it."""

    names: Sequence[str]
    folder: Path
    """The run's output_dir."""
    project: str
    run_name: str
    config: Mapping[str, Any]
    """The configuration as a tree; the page of samples after the last step depends on its `total_steps`."""
    warn: Callable[[str], None] = print
    _open: dict[str, Tracker] = field(default_factory=dict, init=False)

    def open(self, rows: Rows) -> None:
        """Start every tracker's run, in place of an earlier one of this folder, with the rows of metrics.jsonl."""
        path = self.folder / TRACKERS_FILE
        try:
            earlier = dict(json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):  # there is none, or nothing that this module wrote
            earlier = {}
        earlier = {name: id for name, id in earlier.items() if re.fullmatch(r"[\w-]+", str(id))}
        start = time.time() - max((row.get("time", 0.0) for row in rows), default=0.0)
        for name in dict.fromkeys(self.names):
            with self._guard(name):
                tracker = self._open[name] = TRACKERS[name](self, earlier.get(name))
                atomic_write(path, json.dumps(earlier := {**earlier, name: tracker.id}).encode())
                for row in rows:
                    metrics = {key: value for key, value in row.items() if key not in ("step", "time")}
                    tracker.log(row["step"], metrics, start + row.get("time", 0.0))
                    if "eval/reward" in row:
                        samples = read_samples(self.folder, samples_name(row["step"], self.config["total_steps"]))
                        self._samples(tracker, row["step"], samples)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Report the metrics of a step or an evaluation."""
        for name, tracker in list(self._open.items()):
            with self._guard(name):
                tracker.log(step, metrics, time.time())

    def samples(self, step: int, rows: Rows) -> None:
        """Report an evaluation's samples, as `write_samples` takes them, as a table."""
        for name, tracker in list(self._open.items()):
            with self._guard(name):
                self._samples(tracker, step, rows)

    def close(self, *, failed: bool = False) -> None:
        """End the trackers' runs; `failed` marks them so."""
        while self._open:
            name, tracker = self._open.popitem()
            with self._guard(name):
                tracker.close(failed)

    def _samples(self, tracker: Tracker, step: int, rows: Rows) -> None:
        if rows:
            columns = ["prompt", "completion", "reward", *(f"reward/{name}" for name in rows[0]["rewards"])]
            values = ((row["prompt"], row["completion"], row["reward"], *row["rewards"].values()) for row in rows)
            columns, *data = ([_unicode(cell) for cell in row] for row in (columns, *values))
            tracker.samples(step, columns, data)

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            lost = "goes on without it; metrics.jsonl has all, and --resume reports it again"
            self.warn(f"report_to: {name} failed ({type(error).__name__}: {one_line(error)}); the run {lost}")


class Tracker(abc.ABC):
    """One run in one tracker."""

    modules: ClassVar[tuple[str, ...]]
    """What is imported; the last one names the package."""
    extra: ClassVar[str]
    """The extra that installs them."""
    environment: ClassVar[dict[str, str]] = {}
    """Variables that are set, if the user has not, before the import."""
    id: str | None = None
    """What a later process finds the run by."""

    @abc.abstractmethod
    def __init__(self, run: Trackers, earlier: str | None) -> None:
        """Start a run; `earlier` is the id of the one whose place it takes."""

    @abc.abstractmethod
    def log(self, step: int, metrics: Mapping[str, float], when: float) -> None:
        """Report metrics of a step; `when`, in seconds since 1970, is when they were measured."""

    @abc.abstractmethod
    def samples(self, step: int, columns: list[str], data: list[list[Any]]) -> None:
        """Report a table."""

    @abc.abstractmethod
    def close(self, failed: bool) -> None:
        """End the run."""


class TensorBoard(Tracker):
    """Event files in ``output_dir/tensorboard``."""

    modules = ("torch.utils.tensorboard", "tensorboard")
    extra = "train"

    def __init__(self, run: Trackers, earlier: str | None) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.folder / "tensorboard"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        # torch's SummaryWriter writes in a thread, which dies with a traceback on a full disk.
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("wb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        lines = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True).splitlines()
        self._add_text("config", "\n".join(f"    {line}" for line in lines), 0)  # a block of code in Markdown

    def log(self, step: int, metrics: Mapping[str, float], when: float) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in metrics.items():
            self._write(summary=scalar(name, value), step=step, wall_time=when)

    def samples(self, step: int, columns: list[str], data: list[list[Any]]) -> None:
        head, *rows = ([_markdown(cell) for cell in row] for row in [columns, *data])
        lines = (f"| {' | '.join(row)} |" for row in [head, ["---"] * len(columns), *rows])
        self._add_text("samples", "\n".join(lines), step)

    def close(self, failed: bool) -> None:
        self._file.close()

    def _add_text(self, tag: str, markdown: str, step: int) -> None:
        from torch.utils.tensorboard.summary import text

        self._write(summary=text(tag, markdown), step=step)

    def _write(self, **event: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(**{"wall_time": time.time(), **event}).SerializeToString())


class Trackio(Tracker):
    """A run in trackio's local database, which `trackio show` opens."""

    modules = ("trackio",)
    extra = "trackio"

    def __init__(self, run: Trackers, earlier: str | None) -> None:
        import trackio

        self._table, self._finish = trackio.Table, trackio.finish
        if earlier is not None:
            with contextlib.suppress(ValueError):  # there is no such project any more
                for old in trackio.Api().runs(run.project):
                    if old.id == earlier:
                        old.delete()
        with contextlib.redirect_stdout(io.StringIO()):
            self._run = trackio.init(run.project, name=run.run_name, config=dict(run.config), embed=False)
        self.id = self._run.id

    def log(self, step: int, metrics: Mapping[str, float], when: float) -> None:
        self._run.log(dict(metrics), step=step)

    def samples(self, step: int, columns: list[str], data: list[list[Any]]) -> None:
        self._run.log({"samples": self._table(columns=columns, data=data)}, step=step)

    def close(self, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._finish()


class WandB(Tracker):
    """A run in ``output_dir/wandb``, offline unless WANDB_MODE says otherwise; `wandb sync` uploads it."""

    modules = ("wandb",)
    extra = "wandb"
    environment: ClassVar = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}

    def __init__(self, run: Trackers, earlier: str | None) -> None:
        import wandb

        self._wandb, self.id = wandb, earlier or secrets.token_hex(4)
        for folder in run.folder.glob(f"wandb/offline-run-*-{self.id}"):
            shutil.rmtree(folder)
        # Online, the run of the same id goes on. The server has some of its steps, which wandb then leaves out.
        self._run = wandb.init(
            project=run.project,
            name=run.run_name,
            id=self.id,
            resume="allow",
            config=dict(run.config),
            dir=str(run.folder),
            reinit="create_new",  # beside a run that the caller may have
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, step: int, metrics: Mapping[str, float], when: float) -> None:
        self._run.log({**metrics, "_timestamp": when}, step=step)

    def samples(self, step: int, columns: list[str], data: list[list[Any]]) -> None:
        self._run.log({"samples": self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)}, step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
        if self._wandb.run is None:  # no run of the caller's
            self._wandb.teardown()  # waits for the process that writes the file, unlike finish()


class MLflow(Tracker):
    """A run in ``output_dir/mlflow.db``, or in the store that MLFLOW_TRACKING_URI names."""

    modules = ("sqlalchemy", "alembic", "mlflow")
    extra = "mlflow"
    environment: ClassVar = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "CRITICAL"}  # else a traceback

    def __init__(self, run: Trackers, earlier: str | None) -> None:
        import mlflow
        from mlflow.entities import Metric, Param
        from sqlalchemy.engine import URL

        folder, uri, artifacts = run.folder.resolve(), os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            database = URL.create("sqlite", database=str(folder / "mlflow.db"))  # quotes `?` and `%`
            uri, artifacts = database.render_as_string(), (folder / "mlflow-artifacts").as_uri()
        self._metric, self._client = Metric, mlflow.MlflowClient(uri)
        if earlier is not None:
            with contextlib.suppress(mlflow.exceptions.MlflowException):  # somebody has deleted it
                self._client.delete_run(earlier)
        experiment = self._client.get_experiment_by_name(run.project)
        experiment_id = experiment.experiment_id if experiment else None
        experiment_id = experiment_id or self._client.create_experiment(run.project, artifacts)
        self.id = self._client.create_run(experiment_id, run_name=run.run_name).info.run_id
        self._client.log_dict(self.id, dict(run.config), "config.yaml")
        parameters = [Param(_mlflow_name(key), str(value)[:500]) for key, value in _leaves(run.config)]
        for start in range(0, len(parameters), 100):  # what a server takes in one call
            self._client.log_batch(self.id, params=parameters[start : start + 100])

    def log(self, step: int, metrics: Mapping[str, float], when: float) -> None:
        values = [self._metric(_mlflow_name(key), value, round(when * 1e3), step) for key, value in metrics.items()]
        self._client.log_batch(self.id, metrics=values)

    def samples(self, step: int, columns: list[str], data: list[list[Any]]) -> None:
        table = {column: [row[index] for row in data] for index, column in enumerate(columns)}
        self._client.log_table(self.id, table, f"samples/step-{step:06d}.json")

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": WandB,
    "mlflow": MLflow,
}


def _unicode(cell: Any) -> Any:
    """The cell without lone surrogates, which no library takes."""
    return cell.encode("utf-8", "replace").decode() if isinstance(cell, str) else cell


def _markdown(cell: Any) -> str:
    """A table's cell that shows the text as it is, whatever Markdown or HTML it holds."""
    text = f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return re.sub(r"[^\w ]", lambda match: "<br>" if match[0] == "\n" else f"&#{ord(match[0])};", text)


def _mlflow_name(name: str) -> str:
    """A name as MLflow takes it: word characters, `/`, `.`, `-` and blanks, and no `..`."""
    name = re.sub(r"[^\w/.\- ]", "_", name)[:250]
    return posixpath.normpath(name).lstrip("./") or "_"


def _leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in a tree of dicts."""
    if not isinstance(tree, Mapping):
        yield key, tree
        return
    for name, value in tree.items():
        yield from _leaves(value, f"{key}.{name}" if key else str(name))
