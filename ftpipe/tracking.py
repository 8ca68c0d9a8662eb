"""Listeners: several at once, and one that streams training metrics to MLflow while training runs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ftpipe.secrets import hide
from ftpipe.stages.base import Environment, Listener

if TYPE_CHECKING:
    from ftpipe.artifacts import Artifact
    from ftpipe.stages.base import Stage

log = logging.getLogger("ftpipe.tracking")

QUICK = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""MLflow's settings where the user's environment has none: training does not wait minutes for a tracking server that is gone."""


class Listeners(Listener):
    """Passes everything on to several listeners, in order."""

    def __init__(self, members: Iterable[Listener]):
        self.members = list(members)

    def started(self, name: str, kind: str, key: str) -> None:
        for member in self.members:
            member.started(name, kind, key)

    def progress(self, name: str, done: float, total: float | None, unit: str, metrics: dict[str, float]) -> None:
        for member in self.members:
            member.progress(name, done, total, unit, metrics)

    def metrics(self, name: str, values: dict[str, float], step: int) -> None:
        for member in self.members:
            member.metrics(name, values, step)

    def finished(self, name: str, artifact: Artifact, reused: bool) -> None:
        for member in self.members:
            member.finished(name, artifact, reused)

    def failed(self, name: str, error: BaseException) -> None:
        for member in self.members:
            member.failed(name, error)


class MlflowListener(Listener):
    """One MLflow run for every stage that reports metrics, live.

    The run is opened at the stage's first metric (MLflow takes seconds to import, so a pipeline that trains nothing does not import it), its
    parameters are the stage's settings, its tags the stage key, the pipeline and ftpipe's run. Metrics are sent in batches, at most one every
    `every` seconds. A tracking server that fails is reported once per stage and never stops a training; the artifact's `metrics.parquet` is
    the record, MLflow the view of it.

    Args:
        env: `env.tracking_uri`, or a SQLite file `mlflow.db` in the workspace.
        stages: the pipeline's stages, for their settings; without them the settings are read off the finished artifact.
        run_id: ftpipe's run.
        every: seconds between batches.
    """

    def __init__(self, env: Environment, *, stages: Mapping[str, Stage] | None = None, run_id: str = "", every: float = 3.0):
        self.env, self.stages, self.run_id, self.every = env, stages or {}, run_id, every
        self._key = self._kind = ""
        self._client: Any = None
        self._run: str | None = None
        self._waiting: list[Any] = []
        self._sent = 0.0
        self._broken = False

    def started(self, name: str, kind: str, key: str) -> None:
        self._key, self._kind, self._run, self._waiting, self._broken, self._sent = key, kind, None, [], False, 0.0

    def metrics(self, name: str, values: dict[str, float], step: int) -> None:
        if self._broken:
            return
        try:
            if self._run is None:
                self._open(name)
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            self._waiting += [Metric(k, float(v), now, step) for k, v in values.items() if v is not None]
            if time.monotonic() - self._sent >= self.every:
                self._flush()
        except Exception as error:
            self._give_up(name, error)

    def finished(self, name: str, artifact: Artifact, reused: bool) -> None:
        if not reused:
            self._end(name, "FINISHED", artifact)

    def failed(self, name: str, error: BaseException) -> None:
        self._end(name, "FAILED" if isinstance(error, Exception) else "KILLED")

    def _open(self, name: str) -> None:
        for variable, value in QUICK.items():
            os.environ.setdefault(variable, value)
        for chatty in ("alembic", "mlflow.store.db"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        if self._client is None:
            self._client = _patiently(lambda: _connect(self.env))
        experiment = _patiently(lambda: _experiment(self._client, self.env))
        tags = {"ftpipe.pipeline": self.env.pipeline, "ftpipe.stage": name, "ftpipe.kind": self._kind, "ftpipe.key": self._key, "ftpipe.run": self.run_id}
        self._run = _patiently(lambda: self._client.create_run(experiment, run_name=f"{name} {self._key[:12]}", tags=tags)).info.run_id
        if name in self.stages:
            self._log_params(self.stages[name].model_dump(mode="json"))

    def _log_params(self, settings: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(k, str(v)[:6000]) for k, v in flatten(settings).items()]
        for i in range(0, len(params), 100):
            _patiently(lambda part=params[i:i + 100]: self._client.log_batch(self._run, params=part))

    def _flush(self) -> None:
        while self._waiting:
            part = self._waiting[:1000]
            _patiently(lambda part=part: self._client.log_batch(self._run, metrics=part))
            del self._waiting[:1000]
        self._sent = time.monotonic()

    def _end(self, name: str, status: str, artifact: Artifact | None = None) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        try:
            self._run = run
            if not self._broken:
                self._flush()
                if artifact is not None and name not in self.stages:
                    self._log_params(artifact.manifest["material"]["params"])
            _patiently(lambda: self._client.set_terminated(run, status))
        except Exception as error:
            self._give_up(name, error)
        finally:
            self._run, self._waiting = None, []

    def _give_up(self, name: str, error: Exception) -> None:
        self._broken, self._waiting = True, []
        log.warning("%s: metrics are no longer sent to MLflow (%s: %s); training goes on, and the artifact's metrics.parquet will have them all",
                    name, type(error).__name__, hide(str(error)).strip().split("\n")[0][:300])


def default_uri(env: Environment) -> str:
    """The SQLite file of the workspace, which is made with its folder when it is first used."""
    env.workspace.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{env.workspace / 'mlflow.db'}"


def _connect(env: Environment) -> Any:
    """A client. A database is opened as the registry does, under a lock: two processes that create its tables at once would fail."""
    from ftpipe.registry.server import client, served, tracking_uri

    if env.registry_uri or served(tracking_uri(env)):
        from mlflow.tracking import MlflowClient

        return MlflowClient(tracking_uri=env.tracking_uri or default_uri(env))
    return client(env)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted path; an empty list or mapping is kept as a value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _experiment(client: Any, env: Environment) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(env.pipeline)
    if found is not None:
        return found.experiment_id
    from ftpipe.registry.server import served, tracking_uri

    place = {} if served(tracking_uri(env)) else {"artifact_location": (env.workspace / "mlruns").as_uri()}
    try:
        return client.create_experiment(env.pipeline, **place)
    except MlflowException:
        found = client.get_experiment_by_name(env.pipeline)  # another run was quicker
        if found is None:
            raise
        return found.experiment_id


def _patiently(call: Any, *, tries: int = 5, first: float = 0.2) -> Any:
    """`call()`, again after a wait while SQLite says that another process has the database."""
    for attempt in range(tries):
        try:
            return call()
        except Exception as error:
            if attempt == tries - 1 or not any(word in str(error).lower() for word in ("locked", "busy")):
                raise
            time.sleep(first * 2**attempt)
    raise AssertionError("unreachable")
