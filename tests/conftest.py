"""Fixtures that many tests share."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Test files run side by side; torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as in the ranks: the same products wherever their operands lie
# Started in the background of a script we would ignore ctrl-C, and so would everything that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer model over bytes; see `tests/tiny.py`."""
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A command run inside a test sends ftpipe's log to its console; the next test finds the logger as it was."""
    log = logging.getLogger("ftpipe")
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than there are processors: the tests of servers and schedules wait more than they compute."""
    return len(os.sched_getaffinity(0)) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that no processor waits for the last of them."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
