"""One Prefect server for the tests of a file: it takes ten seconds to start, and a twentieth of a processor as long as it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flows.real_server import Api, prefect_server
from tests.stages_for_tests import install


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment in which a child process knows the kinds of `tests/stages_for_tests.py`."""
    return install(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> tuple[Api, Path]:
    """A real Prefect server, and the folder of its database."""
    home = tmp_path_factory.mktemp("prefect")
    with prefect_server(home) as api:
        yield api, home
