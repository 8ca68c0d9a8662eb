from __future__ import annotations

from pathlib import Path

import pytest

from tests import kinds


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with numbers.txt, pipeline.yaml and the test kinds of stage; the current folder of the test."""
    kinds.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numbers.txt").write_text("1\n5\n9\n12\n")
    (tmp_path / "pipeline.yaml").write_text(
        "name: demo\n"
        "stages:\n"
        "  numbers:\n"
        "    path: numbers.txt\n"
        "  big:\n"
        "    kind: above\n"
        "    rows: numbers\n"
        "    threshold: 4\n"
        "  bigger:\n"
        "    kind: chain\n"
        "    rows: big\n"
        "    thresholds: [5, 10]\n"
        "  total:\n"
        "    kind: sum\n"
        "    of: [big, bigger]\n")
    return tmp_path
