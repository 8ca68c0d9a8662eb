"""What the UI shows of a training: how it began and ended."""

from __future__ import annotations

from typing import Any

from ftpipe.artifacts import Artifact
from tasks.publish import number, table

POINTS = 20


def show(key: str, artifact: Artifact) -> None:
    table(key, curve(artifact), "Training, at evenly spaced steps")


def curve(artifact: Artifact) -> list[dict[str, Any]]:
    """Up to 20 evenly spaced rows of `metrics.parquet`, the first and last among them."""
    import pyarrow.parquet as pq

    metrics = pq.read_table(artifact.file("metrics.parquet"))
    n = metrics.num_rows
    shown = sorted({round(i * (n - 1) / max(1, min(POINTS, n) - 1)) for i in range(min(POINTS, n))})
    return [{name: number(value) for name, value in row.items()} for row in metrics.take(shown).to_pylist()]
