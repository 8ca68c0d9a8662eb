from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ftpipe.stages.base import Environment
from tests.registry.helpers import environment


@pytest.fixture(scope="session")
def mlflow_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables, made once."""
    from ftpipe.registry import server

    workspace = tmp_path_factory.mktemp("mlflow")
    server.client(environment(workspace))
    return workspace / "mlflow.db"


@pytest.fixture
def env(tmp_path: Path, mlflow_tables: Path) -> Environment:
    shutil.copyfile(mlflow_tables, tmp_path / "mlflow.db")
    return environment(tmp_path)
