from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.evaluate.world import World, install, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A base model and adapters of known worth; see `tests/evaluate/world.py`."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables, made once: creating them takes seconds."""
    from ftpipe.registry import server
    from ftpipe.stages.base import Environment

    workspace = tmp_path_factory.mktemp("mlflow")
    server.client(Environment(workspace, workspace, "tables"))
    return workspace / "mlflow.db"


@pytest.fixture
def workspace(tmp_path: Path, mlflow_tables: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with MLflow's tables, in which pipelines of planted stages run."""
    install(monkeypatch)
    (tmp_path / "ws").mkdir()
    shutil.copyfile(mlflow_tables, tmp_path / "ws" / "mlflow.db")
    return tmp_path / "ws"
