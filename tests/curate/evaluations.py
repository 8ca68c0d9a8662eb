"""Artifacts as an evaluate stage leaves them, from plain numbers."""

from __future__ import annotations

import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ftpipe.artifacts import Artifact
from ftpipe.evaluate.compare import items_schema
from ftpipe.pipeline.store import Store


def evaluation(workspace: Path, name: str, items: list[tuple[str, str, str, float, float, bool]]) -> Artifact:
    """An artifact with `items.parquet`. items: system, suite, metric, score, weight, whether higher is better."""
    store, key = Store(workspace), uuid.uuid4().hex * 2
    lines = [{"system": s, "suite": u, "metric": m, "item_id": f"i{i}", "slice": "", "score": v, "weight": w, "higher_is_better": h}
             for i, (s, u, m, v, w, h) in enumerate(items)]
    with store.building("evaluate", key) as out:
        pq.write_table(pa.Table.from_pylist(lines, schema=items_schema()), out / "items.parquet")
        return store.commit(out, kind="evaluate", name=name, key=key, material={}, inputs={}, counts={}, meta={}, notes={})


def loss_of(workspace: Path, name: str, loss: float) -> Artifact:
    """The evaluation of an adapter whose held-out loss a token is `loss`: two items of different weights, and others that must not be counted."""
    counted = [("adapter", "heldout_loss", "loss", loss + away, weight, False) for away, weight in ((-0.3, 1.0), (0.1, 3.0))]
    return evaluation(workspace, name, [*counted, ("base", "heldout_loss", "loss", 99.0, 1.0, False), ("adapter", "general_text", "loss", 77.0, 1.0, False)])
