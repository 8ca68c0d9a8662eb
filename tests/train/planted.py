"""A train stage run on planted rows, outside any pipeline, and methods that go wrong on request."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.data.rows import content_id, rows_schema
from ftpipe.stages.base import Environment, Listener, StageContext
from ftpipe.stages.train import Train

ROOT = Path(__file__).parents[2]
log = logging.getLogger("ftpipe.test.train")


def messages(question: str, answer: str) -> dict[str, Any]:
    return {"format": "messages", "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lessons(n: int = 24) -> list[dict[str, Any]]:
    """Questions of different lengths with answers that can be learnt: a letter repeated as often as its number says."""
    return [messages(f"repeat {'abcdefgh'[i % 8]} {'x' * (i % 5)}", "abcdefgh"[i % 8] * (3 + i % 7)) for i in range(n)]


def rows_artifact(folder: Path, rows: list[dict[str, Any]], times: list[int] | None = None) -> Artifact:
    """An artifact of kind ingest with these rows; `row_id` is r0, r1, ... so that tests can name them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ftpipe.data.rows import write_kept

    folder.mkdir(parents=True)
    whole = []
    for i, row in enumerate(rows):
        given = {k: row.get(k) for k in rows_schema().names}
        whole.append(given | {"row_id": f"r{i}", "content_id": content_id(given), "group": "g", "source": "planted", "line": i + 1, "split": "train"})
    pq.write_table(pa.Table.from_pylist(whole, schema=rows_schema()), folder / "rows.parquet")
    if times is not None:
        write_kept(folder, pa.table({"row_id": [f"r{i}" for i in range(len(rows))], "times": times}))
    (folder / "manifest.json").write_text(json.dumps({"name": "rows", "kind": "ingest", "key": "k", "content": "c", "meta": {}, "inputs": {}, "files": {}}))
    return Artifact(folder)


class Told(Listener):
    """Remembers what it hears; `at` is called with each step."""

    def __init__(self, at=lambda step: None):
        self.steps: list[dict[str, float]] = []
        self.at = at

    def metrics(self, name: str, values: dict[str, float], step: int) -> None:
        self.steps.append(values | {"step": step})
        self.at(step)


def context(folder: Path, rows: list[dict[str, Any]], *, times: list[int] | None = None, listener: Listener | None = None) -> StageContext:
    """A context whose work folder is there again when asked for again with the same folder."""
    import shutil

    source = folder / "rows"
    artifact = Artifact(source) if source.exists() else rows_artifact(source, rows, times)
    out, work = folder / "out", folder / "work"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    work.mkdir(exist_ok=True)
    env = Environment(workspace=folder / "workspace", base=folder, pipeline="test")
    return StageContext(name="adapter", key="k", out=out, work=work, inputs={"rows": artifact}, env=env, log=log, listener=listener or Told())


def train(folder: Path, model: Path, rows: list[dict[str, Any]] | None = None, *, times: list[int] | None = None, listener: Listener | None = None,
          **settings: Any) -> StageContext:
    """Run a train stage; the context's `out` holds its payload."""
    folder.mkdir(parents=True, exist_ok=True)
    ctx = context(folder, rows if rows is not None else lessons(), times=times, listener=listener)
    stage(model, **settings).run(ctx)
    return ctx


def in_process(folder: Path, model: Path, monkeypatch: Any, rows: list[dict[str, Any]] | None = None, *, report: Any = None, **settings: Any) -> Path:
    """What rank 0 of one does, in this process (needs the fixture `alone`): rows rendered, `loop.train`. Returns the folder with the result."""
    from contextlib import nullcontext

    from ftpipe.data.rows import RowSet
    from ftpipe.train import loop, rendering
    from ftpipe.train.lifeline import Reporter

    folder.mkdir(parents=True, exist_ok=True)
    ctx, wanted = context(folder, rows if rows is not None else lessons()), stage(model, **{"ranks": 1, "zero": 0} | settings)
    job = wanted._job(ctx, wanted.externals(ctx.env)["model"])
    rendering.render(wanted, ctx, RowSet(ctx.inputs["rows"]).table(), Path(job.tokens))
    Path(job.checkpoints).mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "process_group", lambda job, report: nullcontext())
        loop.train(job, report or Reporter())
    return Path(job.result)


def stage(folder: Path, **settings: Any) -> Train:
    return Train(**({"rows": "rows", "model": str(folder), "seed": 1, "dtype": "float32", "batch_tokens": 128, "rows_per_step": 8, "learning_rate": 1e-2,
                     "adapt": {"lora": {"r": 4}}, "heartbeat": 60} | settings))


def adapter_hash(ctx: StageContext) -> str:
    from ftpipe.canonical import file_digest

    return file_digest(ctx.out / "adapter" / "adapter_model.safetensors")


def payload(ctx: StageContext) -> dict[str, str]:
    """SHA-256 of every file of the payload."""
    from ftpipe.artifacts import hash_files

    return {n: e["sha256"] for n, e in hash_files(ctx.out).items()}


def losses(ctx: StageContext) -> list[float]:
    import pyarrow.parquet as pq

    return pq.read_table(ctx.out / "metrics.parquet")["loss"].to_pylist()


def tensors(ctx: StageContext) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(ctx.out / "adapter" / "adapter_model.safetensors")


def left(folder: Path) -> list[int]:
    """Ranks of the runs in a folder that are still there."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if "ftpipe.train.rank" in line and str(folder) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def environment(**more: str) -> dict[str, str]:
    """An environment for a child process that runs tests' code. It has as many threads as this process would give a rank: their number changes rounding."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | more
