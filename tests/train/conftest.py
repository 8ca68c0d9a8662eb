"""One process group for all tests of this folder that train in this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory):
    """torch.distributed and DeepSpeed, this process being the only rank."""
    import torch

    from tests.train.small import group

    threads, kept = torch.get_num_threads(), dict(os.environ)
    with group(tmp_path_factory.mktemp("group")):
        yield
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> Path:
    return tiny_model
