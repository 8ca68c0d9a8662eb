"""How scores and lengths are distributed over the rows, and where on the plane of clusters the sampled rows lie."""

from __future__ import annotations

import hashlib
from typing import Any

from ftpipe.artifacts import DECISIONS, Artifact
from ftpipe.report.collect import RunData, table
from ftpipe.report.numbers import count, number
from ftpipe.report.plots.clusters import scatter
from ftpipe.report.plots.histograms import histogram

ANNOTATIONS, CLUSTERS, AUDIT = "annotations.parquet", "clusters.parquet", "audit.json"
PLOTS, POINTS = 8, 5000
TITLES = {"tokens": ("Length", "tokens in the row"), "trained_tokens": ("Trained length", "tokens trained on"), "loss": ("Loss", "nats per token"),
          "perplexity": ("Perplexity", "perplexity under the base model"), "learnability": ("Learnability", "1 − loss of the reference / loss of the base"),
          "loss_reference": ("Loss of the reference model", "nats per token")}
"""Columns whose meaning is known: heading and axis."""
SAME = {"loss": ("perplexity",), "nll": ("loss", "perplexity"), "loss_base": ("loss", "perplexity"), "trained_tokens": ("tokens",),
        "prompt_tokens": ("tokens",)}
"""Columns that say what another one already shows."""
SKIPPED = ("row_id", "cluster", "times", "x", "y", "sampling_weight")
FACTS = {"drawn": "drawn, with repeats", "distinct": "different rows drawn", "oracle_calls": "losses asked for"}


def build(run: RunData) -> dict[str, Any] | None:
    plots = _histograms(run)
    clusters = _clusters(run)
    return {"plots": plots, "clusters": clusters} if plots or clusters else None


def _histograms(run: RunData) -> list[dict[str, Any]]:
    import numpy as np

    plots, seen = [], set()
    for artifact in run.having(ANNOTATIONS):
        read = table(artifact, ANNOTATIONS)
        ids = read["row_id"].to_pylist()
        dropped_here = _dropped(artifact)
        eligible = np.array([i not in run.heldout_ids for i in ids], dtype=bool)
        trained = np.array([i in run.trained_ids for i in ids], dtype=bool)
        dropped = np.array([i in dropped_here for i in ids], dtype=bool) & ~trained
        for name in read.column_names:
            if name in SKIPPED or name in seen or len(plots) == PLOTS or any(other in seen or other in read.column_names for other in SAME.get(name, ())):
                continue
            values = _numbers(read[name])
            shown = eligible & np.isfinite(values) if values is not None else eligible & False
            if shown.sum() < 2 or np.ptp(values[shown]) == 0:
                continue
            seen.add(name)
            groups = [("adapter", values[shown & trained]), ("faint", values[shown & ~trained & ~dropped]), ("dropped", values[shown & dropped])]
            title, unit = TITLES.get(name, (name.replace("_", " ").capitalize(), name.replace("_", " ")))
            medians = [number(float(np.median(v))) if v.size else "" for v in (groups[0][1], values[shown & ~trained])]
            plots.append({"title": title, "step": artifact.name, "n": count(int(shown.sum())), "medians": medians, "audit": artifact.has(AUDIT),
                          "svg": histogram(groups, f"hist{len(plots)}", f"{title}: distribution over {shown.sum()} rows", unit)})
    return sorted(plots, key=lambda p: p["audit"])


def _dropped(artifact: Artifact) -> set[str]:
    """Rows that the artifact's own step dropped."""
    if not artifact.has(DECISIONS):
        return set()
    read = table(artifact, DECISIONS, ("row_id", "kept"))
    return {i for i, kept in zip(read["row_id"].to_pylist(), read["kept"].to_pylist()) if not kept}


def _numbers(column: Any) -> Any:
    """A column as float64, None for text and other things that have no histogram."""
    import numpy as np
    import pyarrow as pa

    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
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
    times = np.array(read["times"] if "times" in read else [i in run.trained_ids for i in read["row_id"]], dtype=np.float64)
    order = np.array(_drawn(read["row_id"], times > 0))
    x, y, cluster = (np.array(read[c], dtype=np.float64)[order] for c in ("x", "y", "cluster"))
    fine = np.isfinite(x) & np.isfinite(y)
    if not fine.any():
        return None
    stated = artifact.json("sensitivity.json") if artifact.has("sensitivity.json") else {}
    facts = [f"{title}: {count(stated[k])}" for k, title in FACTS.items() if isinstance(stated.get(k), int)]
    sizes = np.unique(read["cluster"], return_counts=True)[1]
    return {"step": artifact.name, "rows": count(len(times)), "sampled": count(int((times > 0).sum())), "clusters": count(len(sizes)), "facts": facts,
            "smallest": count(int(sizes.min())), "largest": count(int(sizes.max())), "shown": count(len(order)) if len(order) < len(times) else "",
            "svg": scatter(x[fine], y[fine], cluster[fine].astype(int), (times[order] > 0)[fine], "clusters", f"{len(times)} rows in {len(sizes)} clusters")}


def _drawn(ids: list[str], sampled: Any) -> list[int]:
    """At most `POINTS` indices in order: the same rows every time, the shares of sampled and other rows kept."""
    if len(ids) <= POINTS:
        return list(range(len(ids)))
    rank = sorted(range(len(ids)), key=lambda i: hashlib.sha256(ids[i].encode()).digest())
    groups = [[i for i in rank if bool(sampled[i]) == flag] for flag in (True, False)]
    first = min(max(round(POINTS * len(groups[0]) / len(ids)), min(len(groups[0]), 1)), POINTS)
    return sorted(groups[0][:first] + groups[1][:POINTS - first])
