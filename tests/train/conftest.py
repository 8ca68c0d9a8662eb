"""Fixtures of the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.fixtures import alone  # noqa: F401


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> Path:
    return tiny_model
