"""One deduplication in a process of its own: ftpipe, rensa or datatrove.

    python _dedup_arm.py ARM TASK.json RESULT.json

TASK names a Parquet file with row_id and text, and the settings. RESULT gets the seconds and the name of a file with the ids of the rows that stay.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import uuid
from pathlib import Path

Found = tuple[list[str], tuple[float, float], dict]
"""Ids of the rows that stay; seconds, and seconds of processor time of the process and its children; notes."""


def clock(since: tuple[float, float] = (0.0, 0.0)) -> tuple[float, float]:
    """Seconds, and seconds of processor time, since another reading of it."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter() - since[0], sum(u.ru_utime + u.ru_stime for u in used) - since[1]


def step(work: Path, rows: Path, settings: dict):
    """The artifact of ftpipe's minhash step on a file of rows."""
    from ftpipe.pipeline.store import Store
    from ftpipe.stages.base import Environment, Listener, StageContext
    from ftpipe.stages.curate_step import CurateStepStage

    store, key = Store(work), uuid.uuid4().hex * 2
    with store.building("ingest", key) as out:
        (out / "rows.parquet").symlink_to(rows)
        source = store.commit(out, kind="ingest", name="rows", key=key, material={}, inputs={}, counts={}, meta={}, notes={})
    stage, key = CurateStepStage(rows="rows", step={"minhash": settings}), uuid.uuid4().hex * 2
    scratch = store.work("curate_step", key)
    scratch.mkdir(parents=True)
    began = clock()
    with store.building("curate_step", key) as out:
        ctx = StageContext(name="minhash", key=key, out=out, work=scratch, inputs={"rows": source}, env=Environment(work, work, ""),
                           log=logging.getLogger("ftpipe"), listener=Listener())
        stage.run(ctx)
        spent = clock(began)
        return store.commit(out, kind="curate_step", name="minhash", key=key, material={}, inputs={"rows": source}, counts=ctx.counts, meta=ctx.meta,
                            notes=ctx.notes), spent, ctx.notes


def text_rows(ids: list[str], texts: list[str]):
    """Texts as ftpipe's rows."""
    import pyarrow as pa

    from ftpipe.data.rows import rows_schema

    n = len(ids)
    known = {"row_id": ids, "content_id": ids, "format": ["text"] * n, "text": texts, "group": ids, "source": ["made"] * n, "line": range(n),
             "split": ["train"] * n, "meta": ["{}"] * n}
    return pa.table([pa.array(known[f.name], f.type) if f.name in known else pa.nulls(n, f.type) for f in rows_schema()], schema=rows_schema())


def ftpipe_decisions(work: Path, texts: list[str], threshold: float) -> dict[int, tuple[int, float]]:
    """For each text that ftpipe's minhash drops (by number): its keeper and the similarity."""
    import pyarrow.parquet as pq

    pq.write_table(text_rows([f"{i:08d}" for i in range(len(texts))], texts), work / "given.parquet")
    made, _, _ = step(work, work / "given.parquet", {"threshold": threshold})
    found = pq.read_table(made.file("decisions.parquet"), filters=[("kept", "=", False)]).to_pylist()
    return {int(d["row_id"]): (int(d["keeper"]), d["score"]) for d in found}


def ftpipe(task: dict) -> Found:
    import pandas  # noqa: F401  (Arrow asks for it once; imports are not part of the time)
    import pyarrow.compute  # noqa: F401
    import pyarrow.parquet as pq

    import ftpipe.curate.verdicts  # noqa: F401
    from ftpipe.slots import find
    from ftpipe.tables import connect

    find("curate", "minhash")
    with connect():
        pass
    settings = {"threshold": task["threshold"], "ngram": task["ngram"], "bands": task["bands"], "band_size": task["size"]}
    made, spent, notes = step(Path(task["work"]), Path(task["rows"]), settings)
    return pq.read_table(made.file("kept.parquet"), columns=["row_id"])["row_id"].to_pylist(), spent, notes


def shingles(said: str, n: int) -> list[str]:
    words = said.lower().split()
    return [" ".join(words[i:i + n]) for i in range(max(len(words) - n + 1, 1))]


def rensa(task: dict, batch: int = 1) -> Found:
    """The loop that people write: sign, ask the index, compare with what it gives by the estimate of the signatures, else keep and add."""
    import pandas  # noqa: F401  (as above)
    import pyarrow.parquet as pq
    from rensa import RMinHash, RMinHashLSH

    n, threshold = task["bands"] * task["size"], task["threshold"]
    began = clock()
    table = pq.read_table(task["rows"], columns=["row_id", "text"]).sort_by("row_id")
    ids, texts = table["row_id"].to_pylist(), table["text"].to_pylist()
    index = RMinHashLSH(threshold=threshold, num_perm=n, num_bands=task["bands"])
    kept, signed = [], {}
    for start in range(0, len(texts), batch):
        some = [shingles(t, task["ngram"]) for t in texts[start:start + batch]]
        if batch == 1:
            one = RMinHash(num_perm=n, seed=42)
            one.update(some[0])
            signatures = [one]
        else:
            signatures = RMinHash.from_token_sets(some, num_perm=n, seed=42)
        for i, signature in enumerate(signatures, start):
            if not any(signature.jaccard(signed[k]) >= threshold for k in index.query(signature)):
                index.insert(i, signature)
                signed[i] = signature
                kept.append(ids[i])
    return kept, clock(began), {}


def datatrove(task: dict) -> Found:
    """The four stages as datatrove's own example has them, on as many processes as threads were given."""
    import pyarrow.parquet as pq
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    work, threads = Path(task["work"]), task["threads"]
    table = pq.read_table(task["rows"], columns=["row_id", "text"])
    shards = work / "shards"
    shards.mkdir()
    files = [(shards / f"{i}.jsonl").open("w") for i in range(threads)]  # a file for each process, as its readers want it
    for i, (row, said) in enumerate(zip(table["row_id"].to_pylist(), table["text"].to_pylist())):
        files[i % threads].write(json.dumps({"id": row, "text": said}) + "\n")
    for f in files:
        f.close()
    config = MinhashConfig(n_grams=task["ngram"], num_buckets=task["bands"], hashes_per_bucket=task["size"])

    def run(name: str, tasks: int, *pipeline) -> None:
        LocalPipelineExecutor(pipeline=list(pipeline), tasks=tasks, workers=min(threads, tasks), logging_dir=str(work / "logs" / name)).run()

    began = clock()
    reader = JsonlReader(str(shards))
    run("1", threads, reader, MinhashDedupSignature(output_folder=str(work / "sig"), config=config))
    run("2", task["bands"], MinhashDedupBuckets(input_folder=str(work / "sig"), output_folder=str(work / "buckets"), config=config))
    run("3", 1, MinhashDedupCluster(input_folder=str(work / "buckets"), output_folder=str(work / "remove"), config=config))
    run("4", threads, reader, MinhashDedupFilter(input_folder=str(work / "remove")), JsonlWriter(str(work / "left"), compression=None))
    spent = clock(began)[0], 0.0  # its processes belong to a server of their own, whose processor time is not seen here
    return [json.loads(line)["id"] for f in sorted((work / "left").glob("*.jsonl")) for line in f.open()], spent, {}


def main(arm: str, task: dict) -> dict:
    found = {"ftpipe": ftpipe, "rensa": rensa, "rensa_batch": lambda t: rensa(t, 2048), "datatrove": datatrove}[arm](task)
    kept, spent, notes = found
    path = Path(task["work"]) / "kept.txt"
    path.write_text("\n".join(kept))
    return {"seconds": spent[0], "cpu": spent[1], "kept": str(path), "notes": {k: v for k, v in notes.items() if k.startswith("seconds")}}


if __name__ == "__main__":
    with open(sys.argv[2], encoding="utf-8") as f:
        result = main(sys.argv[1], json.load(f))
    with open(sys.argv[3], "w", encoding="utf-8") as f:
        json.dump(result, f)
