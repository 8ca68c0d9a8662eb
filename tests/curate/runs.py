"""Artifacts as short training runs and their evaluations leave them, with planted numbers."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ftpipe.artifacts import Artifact
from ftpipe.pipeline.store import Store
from ftpipe.registry.ledger import adapter_content
from tests.artifacts import rows_artifact, text


def domains(folder: Path, names: list[str], rows: int = 4) -> Artifact:
    """Rows of each domain (column `source`), and two held-out ones of each."""
    return rows_artifact(folder, [text(f"{d} {split} {i}", source=d, split=split) for d in names for split, n in (("train", rows), ("heldout", 2))
                                  for i in range(n)], name="domains")


def trained(folder: Path, rows: Artifact, tokens: dict[str, int], name: str) -> Artifact:
    """A train stage that saw so many tokens of each domain: half of them in its first row, shown once, the rest in two showings of the second."""
    from ftpipe.data.rows import RowSet

    of: dict[str, list[str]] = {}
    for row in RowSet(rows).table(columns=["row_id", "source"]).to_pylist():
        of.setdefault(row["source"], []).append(row["row_id"])
    seen = [(of[d][k], k + 1, n // (2 * (k + 1))) for d, n in tokens.items() if n for k in range(2)]
    store, key = Store(folder), uuid.uuid4().hex * 2
    with store.building("train", key) as out:
        (out / "adapter").mkdir()
        (out / "adapter" / "adapter_model.safetensors").write_text(uuid.uuid4().hex)
        pq.write_table(pa.table({"row_id": [s[0] for s in seen], "times": [s[1] for s in seen], "tokens": [s[2] for s in seen]}), out / "seen.parquet")
        return store.commit(out, kind="train", name=name, key=key, material={}, inputs={rows.name: rows}, counts={}, meta={}, notes={})


def evaluated(folder: Path, rows: Artifact, systems: dict[str, tuple[Artifact | None, dict[str, float]]], name: str) -> Artifact:
    """An evaluate stage with these losses by system and domain: `base` has no adapter, `adapter` is the candidate. Each domain's two held-out rows have
    losses on both sides of the mean, of different weights."""
    from ftpipe.data.rows import RowSet

    held: dict[str, list[str]] = {}
    for row in RowSet(rows).table("heldout", ["row_id", "source"]).to_pylist():
        held.setdefault(row["source"], []).append(row["row_id"])
    items = [{"system": s, "suite": "heldout_loss", "metric": "loss", "item_id": item, "slice": "", "score": loss + off, "weight": weight,
              "higher_is_better": False}
             for s, (_, losses) in systems.items() for d, loss in losses.items() for item, off, weight in zip(held[d], (-0.1, 0.3), (30.0, 10.0))]
    items += [{**i, "suite": "general_text", "score": 99.0} for i in items]
    adapters = {a.name: a for a, _ in systems.values() if a}
    store, key = Store(folder), uuid.uuid4().hex * 2
    with store.building("evaluate", key) as out:
        pq.write_table(pa.Table.from_pylist(items), out / "items.parquet")
        (out / "evaluation.json").write_text(json.dumps({"systems": {s: {"adapter": a and adapter_content(a)} for s, (a, _) in systems.items()}}))
        return store.commit(out, kind="evaluate", name=name, key=key, material={}, inputs={rows.name: rows, **adapters}, counts={}, meta={}, notes={})
