from __future__ import annotations

from pathlib import Path

import pytest

from tests.curate.taught import make_taught


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that knows a few facts; see `tests/curate/taught.py`."""
    return make_taught(tmp_path_factory.mktemp("taught"))
