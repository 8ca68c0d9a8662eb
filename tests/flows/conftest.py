"""One Prefect server for all tests of flows and tasks: it takes ten seconds to start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.stages_for_tests import install


@pytest.fixture(scope="session")
def stage_kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Makes the kinds of `tests/stages_for_tests.py` known, here and under the returned environment."""
    folder = tmp_path_factory.mktemp("stage-kinds")
    env = install(folder)
    sys.path.insert(0, str(folder))
    yield env
    sys.path.remove(str(folder))


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory):
    """A Prefect server with a database of its own; the flows of this process use it."""
    import flows  # noqa: F401  sets Prefect's environment before it is imported

    mp = pytest.MonkeyPatch()
    mp.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect-home")))
    mp.setattr("prefect.testing.utilities._find_available_port", free_port)
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
    mp.undo()


@pytest.fixture
def client(prefect_server):
    from prefect import get_client

    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path, stage_kinds) -> Path:
    """A folder for a pipeline, with the test's stage kinds known."""
    return tmp_path
