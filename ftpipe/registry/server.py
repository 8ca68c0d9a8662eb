"""MLflow as the registry: one client a registry, made safely by several processes at once, and calls that wait for a busy database."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from ftpipe.errors import DATABASE, ConfigError, InfrastructureError
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

T = TypeVar("T")
PATIENCE = 120.0
"""Seconds that a call waits for a busy database or server before it gives up."""
CONTENT, MANIFEST_SHA = "ftpipe.content", "ftpipe.manifest"
log = logging.getLogger("ftpipe.registry")


def tracking_uri(env: Environment) -> str:
    """Where runs and curves are tracked: the configured server, or a SQLite file in the workspace."""
    return env.tracking_uri or f"sqlite:///{env.workspace / 'mlflow.db'}"


def registry_uri(env: Environment) -> str:
    """Where versions and aliases live: the configured registry, else where runs are tracked."""
    return env.registry_uri or tracking_uri(env)


def local_database(env: Environment) -> str | None:
    """Path of the registry's SQLite file, None if the registry is a server."""
    uri = registry_uri(env)
    return uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None


def served(uri: str) -> bool:
    """Whether an MLflow server answers there, which takes files too; a database takes none."""
    return not uri.startswith(("sqlite:", "postgres", "mysql", "mssql", "file:"))


def check(env: Environment) -> None:
    """Raise ConfigError for addresses of servers and databases that cannot work here, before anything is run."""
    from importlib.util import find_spec

    for setting, uri in (("tracking", env.tracking_uri), ("registry", env.registry_uri)):
        kind, _, driver = (uri or "").partition(":")[0].partition("+")
        if kind == "postgres":
            raise ConfigError("a PostgreSQL address begins with postgresql://", where=setting, remedy="write postgresql:// in place of postgres://")
        if kind == "postgresql" and find_spec(driver or "psycopg2") is None:
            raise ConfigError(f"PostgreSQL is spoken to through {driver or 'psycopg2'}, which is not installed", where=setting,
                              remedy="pip install 'ftpipe[postgres]'" if driver in ("", "psycopg2") else f"pip install {driver}")
    if served(registry_uri(env)) and not served(tracking_uri(env)):
        raise ConfigError("a registry on a server takes its files from the tracking server, and none is set", where="registry",
                          remedy="set `tracking:` to an MLflow server too")


@contextmanager
def turn(env: Environment, name: str) -> Iterator[None]:
    """Hold the only right, among all workspaces that share the registry's database, to change a model: nobody moves an alias between compare and swap.

    An MLflow server has nothing to hold: of two workspaces that promote in the same fraction of a second the later one wins, and `reconcile` writes into
    the other's history what it found.
    """
    with _held(registry_uri(env), name):
        yield


@contextmanager
def _held(uri: str, what: str) -> Iterator[None]:
    """Hold a lock in a database that several workspaces share; a killed holder gives it back. PostgreSQL lends it to a connection, SQLite's is a file beside
    it; for anything else there is none."""
    from filelock import FileLock

    if not uri.startswith("postgresql"):
        with FileLock(f"{uri.removeprefix('sqlite:///')}.ftpipe-lock") if uri.startswith("sqlite:///") else nullcontext():
            yield
        return
    import hashlib

    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool

    key = {"key": int.from_bytes(hashlib.sha256(f"ftpipe/{what}".encode()).digest()[:8], "big", signed=True)}
    with call(create_engine(uri, poolclass=NullPool, isolation_level="AUTOCOMMIT").connect) as connection:
        connection.execute(text("select pg_advisory_lock(:key)"), key)
        try:
            yield
        finally:
            with suppress(SQLAlchemyError):  # if the connection broke the lock is gone with it
                connection.execute(text("select pg_advisory_unlock(:key)"), key)


def client(env: Environment) -> MlflowClient:
    """The MLflow client of this workspace. The first call creates a SQLite database, once, however many processes call it."""
    return _client(tracking_uri(env), registry_uri(env), str(env.workspace))


@lru_cache
def _client(tracking: str, registry: str, workspace: str) -> MlflowClient:
    from filelock import FileLock

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    os.makedirs(workspace, exist_ok=True)
    # Of two processes that create a database's tables at once, one would fail.
    with FileLock(os.path.join(workspace, ".mlflow.lock")), _held(tracking, "tables"):
        made = call(MlflowClient, tracking_uri=tracking, registry_uri=registry)
        call(made.search_registered_models, max_results=1)
    return made


def call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call MLflow; wait and try again while its database is locked or its server is away, `PATIENCE` seconds at most.

    Raises InfrastructureError when patience runs out, and at once what MLflow raises for any other reason.
    """
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    began, pause = time.monotonic(), 0.05
    while True:
        try:
            return function(*args, **kwargs)
        except (MlflowException, requests.RequestException, OSError, OperationalError) as error:
            if not _passing(error):
                raise
            if time.monotonic() - began > PATIENCE:
                raise InfrastructureError(f"the MLflow registry did not answer within {PATIENCE:.0f} s: {error}",
                                          remedy="see whether its server runs or another process holds the database, then run the same command") from error
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(pause * 2, 2.0)


def _passing(error: Exception) -> bool:
    """Whether an error is the kind that goes away by itself."""
    text = str(error).lower()
    return any(w in text for w in (*DATABASE, "connection reset", "max retries exceeded", "temporarily unavailable", "timed out"))


def ensure_model(mlflow: MlflowClient, name: str, tags: dict[str, str]) -> None:
    """Create the registered model unless it exists."""
    from mlflow.exceptions import MlflowException

    try:
        call(mlflow.create_registered_model, name, tags=tags)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def model_aliases(mlflow: MlflowClient, name: str) -> dict[str, int] | None:
    """Aliases of a registered model by name, as MLflow has them; None if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return {alias: int(version) for alias, version in call(mlflow.get_registered_model, name).aliases.items()}
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def model_versions(mlflow: MlflowClient, name: str) -> list[ModelVersion]:
    """Every version of a model, oldest first."""
    quoted = name.replace("'", "\\'")
    found, token = [], None
    while True:
        page = call(mlflow.search_model_versions, f"name='{quoted}'", max_results=1000, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return sorted(found, key=lambda v: int(v.version))


def source_of(mlflow: MlflowClient, env: Environment, name: str, path: Any, run_name: str) -> tuple[str, str | None]:
    """Where MLflow is told that a version's files are, and the run that holds them, if any.

    A database takes no files and is pointed at the version's own folder, which other workspaces then read. A server cannot: the files are uploaded as
    they are to a run of the experiment `<name>`, without MLflow's model flavours (nothing is pickled).
    """
    if not served(tracking_uri(env)):
        return path.as_uri(), None
    experiment = call(mlflow.get_experiment_by_name, name)
    experiment_id = experiment.experiment_id if experiment else call(mlflow.create_experiment, name)
    run = call(mlflow.create_run, experiment_id, run_name=run_name)
    call(mlflow.log_artifacts, run.info.run_id, str(path), artifact_path="version")
    call(mlflow.set_terminated, run.info.run_id)
    return f"{run.info.artifact_uri}/version", run.info.run_id
