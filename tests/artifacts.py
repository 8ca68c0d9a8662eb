"""Artifacts of rows made from plain dicts, and curation steps run on them, without any other stage."""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ftpipe import slots
from ftpipe.artifacts import Artifact
from ftpipe.canonical import digest
from ftpipe.data.rows import RowSet, content_id, rows_schema, write_annotations, write_kept
from ftpipe.pipeline.store import Store
from ftpipe.stages.base import Environment, Listener, Stage, StageContext


def chat(prompt: str, answer: str, **fields: Any) -> dict[str, Any]:
    """A row of format `messages` with one question and one answer."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"format": "messages", "messages": turns, **fields}


def text(said: str, **fields: Any) -> dict[str, Any]:
    """A row of format `text`."""
    return {"format": "text", "text": said, **fields}


def complete(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with what ingest would add: content_id, row_id, group (one for each row), source, line, split (train)."""
    found, seen = [], {}
    for i, row in enumerate(rows):
        said = content_id({"format": "messages", **row})
        seen[said] = n = seen.get(said, 0) + 1
        defaults = {"format": "messages", "row_id": said if n == 1 else f"{said}~{n}", "content_id": said, "group": f"g{i}", "source": "test.jsonl",
                    "line": i + 1, "split": "train", "meta": "{}"}
        found.append({k: v for k, v in (defaults | row).items() if k in rows_schema().names})
    return found


def rows_artifact(tmp_path: Path, rows: list[dict[str, Any]], *, name: str = "rows", annotations: dict[str, list[Any]] | None = None) -> Artifact:
    """An artifact as `ingest` leaves it.

    Args:
        tmp_path: workspace.
        rows: see `complete`; `times` and `position` in a row make it an artifact with `kept.parquet`.
        name: the stage's name.
        annotations: columns of `annotations.parquet`, a value for each row.
    """
    store = Store(tmp_path)
    full = complete(rows)
    key = uuid.uuid4().hex * 2
    with store.building("ingest", key) as out:
        pq.write_table(pa.Table.from_pylist(full, schema=rows_schema()), out / "rows.parquet")
        if any("times" in r or "position" in r for r in rows):
            write_kept(out, pa.table({"row_id": [r["row_id"] for r in full], "split": [r["split"] for r in full],
                                      "times": [r.get("times", 1) for r in rows], "position": [r.get("position", i) for i, r in enumerate(rows)]}))
        if annotations:
            write_annotations(out, pa.table({"row_id": [r["row_id"] for r in full], **annotations}))
        return store.commit(out, kind="ingest", name=name, key=key, material={}, inputs={}, counts={}, meta={}, notes={})


def run_stage(tmp_path: Path, stage: Stage, inputs: dict[str, Artifact], *, name: str = "stage", pipeline: str = "test") -> Artifact:
    """Run one stage object on artifacts, past plan and keys, and commit what it makes."""
    store = Store(tmp_path)
    key = digest([stage.dump(), {k: a.content for k, a in inputs.items()}, uuid.uuid4().hex])
    work = store.work(stage.name(), key)
    work.mkdir(parents=True)
    with store.building(stage.name(), key) as out:
        ctx = StageContext(name=name, key=key, out=out, work=work, inputs=inputs, env=Environment(tmp_path, tmp_path, pipeline),
                           log=logging.getLogger("test"), listener=Listener())
        stage.run(ctx)
        return store.commit(out, kind=stage.name(), name=name, key=key, material={}, inputs=inputs, counts=ctx.counts, meta=ctx.meta, notes=ctx.notes)


def run_step(tmp_path: Path, artifact: Artifact, step: Any, *, seed: int = 0, model: str = "", **inputs: Artifact) -> Artifact:
    """Run one curation step, written as in YAML (`{"minhash": {"threshold": 0.7}}`), on the rows of `artifact`.

    Further `inputs` are artifacts that the step's own references name.
    """
    stage = slots.slots()["stages"].get("curate_step")(rows=artifact.name, step=step, seed=seed, model=model)
    return run_stage(tmp_path, stage, {artifact.name: artifact, **inputs}, name=f"step-{uuid.uuid4().hex[:6]}")


def decisions(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Decisions of an artifact by row_id; fails if a row has two."""
    lines = pq.read_table(artifact.file("decisions.parquet")).to_pylist()
    found = {line["row_id"]: line for line in lines}
    assert len(found) == len(lines), "a row was decided on twice"
    return found


def kept_ids(artifact: Artifact, split: str = "train") -> list[str]:
    """Row ids that an artifact passes on, in order."""
    return RowSet(artifact).ids(split)
