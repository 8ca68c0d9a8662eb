"""What the rows are like: lengths, sources, languages, openings, duplicates, personal data."""

from __future__ import annotations

from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.report.collect import RunData, table
from ftpipe.report.numbers import count, percent
from ftpipe.report.plots.histograms import histogram
from ftpipe.report.text import brief

SIDES = (("train", "base"), ("heldout", "control"))


def build(run: RunData) -> dict[str, Any] | None:
    described = [_described(a, f"data{i}") for i, a in enumerate(run.data)]
    return {"described": described} if described else None


def findings(found: dict[str, Any]) -> list[str]:
    """What a reader should know first, in sentences."""
    train = found["rows"]["train"] or 1
    said = [f"{count(found['rows']['train'])} train rows and {count(found['rows']['heldout'])} held out."]
    copies = found["duplicates"]
    if copies["rows"]:
        said.append(f"{count(copies['rows'])} train rows ({percent(copies['rows'] / train)}) say exactly what another one says.")
    if copies["heldout_in_train"]:
        said.append(f"{count(copies['heldout_in_train'])} held-out rows stand in the train rows too: decontaminate before you believe a score.")
    near = found.get("near")
    if near and near["rows"] > copies["rows"]:
        said.append(f"{count(near['rows'])} ({percent(near['rows'] / train)}) are near duplicates at a similarity of {near['threshold']:g} or more.")
    personal = found.get("personal_data")
    if personal and personal["rows_with"]:
        kinds = ", ".join(k.replace("_", " ") for k in personal["rows_by_kind"])
        said.append(f"{count(personal['rows_with'])} rows hold what looks like personal data ({kinds}).")
    prompts = found["openings"]["prompt"]
    if prompts["top"] and prompts["top"][0]["rows"] > 0.2 * prompts["rows"]:
        said.append(f"{percent(prompts['top'][0]['rows'] / prompts['rows'], 0)} of the prompts begin alike: “{brief(prompts['top'][0]['name'], 60)}”.")
    return said


def _described(artifact: Artifact, name: str) -> dict[str, Any]:
    found = artifact.json("description.json")
    lengths = table(artifact, "lengths.parquet")
    rows = found["rows"]["train"] + found["rows"]["heldout"]
    lists = [_bars("Sources", found["sources"], rows), _bars("Formats", found["formats"], rows)]
    if found["languages"]:
        lists.append(_bars(f"Languages (of {count(found['languages']['sample'])} rows)", found["languages"]["top"], found["languages"]["sample"]))
    for part, opened in found["openings"].items():
        if opened["top"]:
            lists.append(_bars(f"How {part}s begin ({percent(opened['shared'] / opened['rows'], 0)} share their opening)", opened["top"], opened["rows"]))
    if found.get("personal_data", {}).get("rows_by_kind"):
        kinds = sorted(found["personal_data"]["rows_by_kind"].items(), key=lambda item: -item[1])
        lists.append(_bars("Rows with personal data", [{"name": k.replace("_", " "), "rows": n} for k, n in kinds], found["rows"]["train"]))
    return {"name": artifact.name, "plots": _plots(lengths, name), "lists": lists, "lengths": _table(found["lengths"])}


def _plots(lengths: Any, name: str) -> list[dict[str, Any]]:
    import numpy as np

    split = np.asarray(lengths["split"].to_pylist())
    plots = []
    for column in lengths.column_names:
        if column == "split" or not len(split):
            continue
        values = lengths[column].to_numpy().astype(float)
        known = np.isfinite(values)
        groups = [(colour, values[known & (split == side)]) for side, colour in SIDES]
        if known.any() and values[known].any():
            plots.append({"title": column.capitalize(), "svg": histogram(groups, f"{name}-{len(plots)}", f"{column} of a row", column)})
    return plots


def _table(lengths: dict[str, dict[str, float]]) -> dict[str, Any]:
    quantiles = list(next((v for v in lengths.values() if v), {}))
    heads = [{"0": "least", "0.5": "median", "1": "most", "sum": "all together"}.get(q, f"{float(q):.0%}" if q != "sum" else q) for q in quantiles]
    return {"heads": heads, "lines": [{"name": name, "values": [count(v[q]) for q in quantiles]} for name, v in lengths.items() if v]}


def _bars(title: str, counted: list[dict[str, Any]], total: int) -> dict[str, Any]:
    widest = max((c["rows"] for c in counted), default=1)
    return {"title": title, "lines": [{"name": brief(str(c["name"]), 70), "rows": count(c["rows"]), "share": percent(c["rows"] / (total or 1)),
                                       "width": f"{100 * c['rows'] / widest:.1f}"} for c in counted]}
