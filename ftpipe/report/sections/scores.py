"""How scores and lengths are distributed over the rows, and where on the plane of clusters the sampled rows lie."""

from __future__ import annotations

import hashlib
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.report.collect import RunData, table
from ftpipe.report.numbers import count, number, setting
from ftpipe.report.plots.clusters import scatter
from ftpipe.report.plots.histograms import histogram

ANNOTATIONS, CLUSTERS = "annotations.parquet", "clusters.parquet"
PLOTS, POINTS = 8, 5000
LENGTHS = ("tokens", "trained_tokens", "prompt_tokens")
SKIPPED = ("row_id", "cluster", "times", "x", "y", "prompt_tokens")
UNITS = {"tokens": "tokens in the row", "trained_tokens": "tokens trained on", "loss": "nats per token", "nll": "nats per token",
         "perplexity": "perplexity", "learnability": "1 − loss of the reference / loss of the base"}


def build(run: RunData) -> dict[str, Any] | None:
    plots = _histograms(run)
    clusters = _clusters(run)
    return {"plots": plots, "clusters": clusters} if plots or clusters else None


def _histograms(run: RunData) -> list[dict[str, Any]]:
    import numpy as np

    plots, seen = [], set()
    for artifact in run.having(ANNOTATIONS):
        read = table(artifact, ANNOTATIONS)
        chosen = np.array([i in run.trained_ids for i in read["row_id"].to_pylist()], dtype=bool)
        eligible = _train_rows(artifact, read["row_id"].to_pylist())
        for name in read.column_names:
            if name in SKIPPED or name in seen or len(plots) == PLOTS:
                continue
            values = _numbers(read[name])
            if values is None:
                continue
            finite = np.isfinite(values) & eligible
            if finite.sum() < 2 or np.ptp(values[finite]) == 0:
                continue
            seen.add(name)
            kept, dropped = values[finite & chosen], values[finite & ~chosen]
            plots.append({"title": name.replace("_", " "), "step": artifact.name, "n": count(int(finite.sum())),
                          "median_kept": number(float(np.median(kept))) if kept.size else "", "median_dropped": number(float(np.median(dropped))) if dropped.size else "",
                          "length": name in LENGTHS,
                          "svg": histogram(kept, dropped, f"hist{len(plots)}", f"Distribution of {name} over {finite.sum()} rows", UNITS.get(name, name.replace("_", " ")))})
    return sorted(plots, key=lambda p: p["length"])


def _train_rows(artifact: Artifact, ids: list[str]) -> Any:
    """Which of the rows the step decided on: held-out rows are annotated too, but nobody chose among them."""
    import numpy as np

    if not artifact.has("decisions.parquet"):
        return np.ones(len(ids), dtype=bool)
    heldout: set[str] = set()
    if artifact.has("kept.parquet"):
        kept = table(artifact, "kept.parquet", ("row_id", "split")).to_pydict()
        heldout = {i for i, split in zip(kept["row_id"], kept["split"]) if split == "heldout"}
    return np.array([i not in heldout for i in ids], dtype=bool)


def _numbers(column: Any) -> Any:
    """A column as float64, None for text and other things that have no histogram."""
    import numpy as np
    import pyarrow as pa

    if pa.types.is_boolean(column.type) or not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        return None
    return np.array([float("nan") if v is None else v for v in column.to_pylist()], dtype=np.float64)


def _clusters(run: RunData) -> dict[str, Any] | None:
    import numpy as np

    found = run.having(CLUSTERS)
    if not found:
        return None
    artifact = found[0]
    read = table(artifact, CLUSTERS).to_pydict()
    if not {"x", "y", "cluster", "row_id"} <= set(read) or not read["row_id"]:
        return None
    times = np.array(read.get("times") or [i in run.trained_ids for i in read["row_id"]], dtype=np.float64)
    order = np.array(_drawn(read["row_id"], times > 0))
    x, y, cluster = (np.array(read[c], dtype=np.float64)[order] for c in ("x", "y", "cluster"))
    fine = np.isfinite(x) & np.isfinite(y)
    stated = artifact.json("sensitivity.json") if artifact.has("sensitivity.json") else {}
    facts = [(k.replace("_", " "), number(v) if isinstance(v, float) else setting(v)) for k, v in stated.items() if isinstance(v, (int, float, str)) and not isinstance(v, bool)]
    sizes = np.unique(read["cluster"], return_counts=True)[1]
    return {"step": artifact.name, "rows": count(len(times)), "sampled": count(int((times > 0).sum())), "clusters": count(len(sizes)), "facts": facts[:8],
            "smallest": count(int(sizes.min())), "largest": count(int(sizes.max())), "shown": count(len(order)) if len(order) < len(times) else "",
            "svg": scatter(x[fine], y[fine], cluster[fine].astype(int), (times[order] > 0)[fine], "clusters", f"{len(times)} rows in {len(sizes)} clusters")}


def _drawn(ids: list[str], sampled: Any) -> list[int]:
    """At most `POINTS` indices in order: the same rows every time, the shares of sampled and other rows kept."""
    if len(ids) <= POINTS:
        return list(range(len(ids)))
    rank = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    share = POINTS / len(ids)
    chosen = []
    for flag in (True, False):
        group = [i for i in rank if bool(sampled[i]) == flag]
        chosen += group[:max(round(share * len(group)), min(len(group), 1))]
    return sorted(chosen)
