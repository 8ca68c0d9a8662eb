from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluate.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def env(tmp_path: Path):
    from ftpipe.stages.base import Environment

    return Environment(tmp_path, tmp_path, "test")
