"""What the UI shows of an ingest: how many rows of each source, and what was put in quarantine."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ftpipe.artifacts import Artifact
from tasks.publish import funnel, table


def show(key: str, artifact: Artifact) -> None:
    if "rows_in" in artifact.counts:
        table(key, funnel(artifact), "Rows read")
    if artifact.has("quarantine.parquet") and (rows := quarantine(artifact)):
        table(f"{key}-quarantine", rows, "Rows that could not be read; the artifact's quarantine.parquet has them all")


def quarantine(artifact: Artifact) -> list[dict[str, Any]]:
    """Rows in quarantine by source and reason, most first, with the first line each was found at."""
    import pyarrow.parquet as pq

    found = pq.read_table(artifact.file("quarantine.parquet"), columns=["source", "line", "reason"]).to_pylist()
    count = Counter((r["source"], r["reason"]) for r in found)
    first: dict[tuple[str, str], Any] = {}
    for r in found:
        first.setdefault((r["source"], r["reason"]), r["line"])
    return [{"source": s, "reason": reason, "rows": n, "first line": first[s, reason]} for (s, reason), n in sorted(count.items(), key=lambda i: (-i[1], i[0]))]
