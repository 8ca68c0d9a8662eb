"""Questions to the store: what was decided about a row, and which rows made an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftpipe.artifacts import DECISIONS, Artifact
from ftpipe.errors import ConfigError
from ftpipe.pipeline.adapters import trained
from ftpipe.pipeline.store import Store
from ftpipe.tables import connect


def why(workspace: Path, row: str, pipeline: str | None = None) -> list[dict[str, Any]]:
    """What each step of the latest run decided about the rows whose id starts with `row`.

    Returns one entry per pipeline and row: pipeline, row_id, source, line, split, group, text, decisions (step, kept, reason, score, keeper, in the
    pipeline's order) and seen (stage, key, times). Raises ConfigError if no row has this id.
    """
    found = []
    for name, artifacts in Store(workspace).current(pipeline).items():
        with connect() as con:
            for origin in _rows(con, [a for a in artifacts if a.has("rows.parquet")], row):
                exact = origin["row_id"]
                decisions = [d for a in artifacts if a.has(DECISIONS) for d in _where(con, a.file(DECISIONS), exact)]
                seen = [{"stage": a.name, "key": a.key, "times": s["times"]} for a in artifacts if a.has("seen.parquet")
                        for s in _where(con, a.file("seen.parquet"), exact)]
                found.append({"pipeline": name, **origin, "decisions": decisions, "seen": seen})
            if not found:
                for a in artifacts:
                    if a.has("quarantine.parquet"):
                        found += _quarantined(con, name, a, row)
    if not found:
        raise ConfigError(f"no row with id {row!r} in {workspace}", remedy="`ftpipe trace ADAPTER` lists the rows of an adapter")
    return found


def trace(workspace: Path, adapter: str) -> dict[str, Any]:
    """The rows that made an adapter.

    Args:
        adapter: as `adapters.find` reads it.

    Returns:
        stage, key, and rows: row_id, times, source, line, group, text, most seen first.
    """
    artifact = trained(workspace, adapter)
    rows = [str(a.file("rows.parquet")) for a in artifact.ancestors() if a.has("rows.parquet")]
    with connect() as con:
        listed = _dicts(con.sql(
            f"select s.row_id, s.times::bigint as times, r.source, r.line, r.\"group\", {_TEXT} as text from read_parquet($seen) s "
            "join read_parquet($rows, union_by_name = true) r using (row_id) order by s.times desc, s.row_id",
            params={"seen": str(artifact.file("seen.parquet")), "rows": rows}))
    return {"stage": artifact.name, "key": artifact.key, "rows": listed}


def contents(workspace: Path, rows: list[str]) -> dict[str, dict[str, Any]]:
    """By content id, the text of each row whose id is given or begins so, and the row ids that later steps dropped as duplicates of it (`copies`).

    All artifacts of the store are looked through, not only those of the latest runs. Raises ConfigError for an id that no row has.
    """
    artifacts = Store(workspace).all()
    found: dict[str, dict[str, Any]] = {}
    with connect() as con:
        made = [a for a in artifacts if a.has("rows.parquet")]
        decided = [str(a.file(DECISIONS)) for a in artifacts if a.has(DECISIONS)]
        for row in rows:
            same = _rows(con, made, row)
            if not same:
                raise ConfigError(f"no row with id {row!r} in {workspace}", remedy="`ftpipe trace ADAPTER` lists the rows of an adapter")
            for r in same:
                copies = con.execute("select distinct row_id from read_parquet($files) where keeper = $row order by 1", {"files": decided, "row": r["row_id"]})
                entry = found.setdefault(r["content_id"], {"text": r["text"], "rows": [], "copies": []})
                entry["rows"] = sorted({*entry["rows"], r["row_id"]})
                entry["copies"] = sorted({*entry["copies"], *(c for c, in copies.fetchall())})
    return found


def which(workspace: Path, row: str) -> list[dict[str, Any]]:
    """The adapters that were trained on a row (or on another with the same content), those merged or compressed from them included.

    Returns stage, kind, key, made (when), times (how often the row was shown; null for an adapter made of others) and versions (registered, NAME:VERSION
    and its aliases), oldest first. Every adapter that is still in the store is looked at.
    """
    from ftpipe.registry.ledger import adapter_content, list_models, list_versions
    from ftpipe.stages.base import Environment

    store = Store(workspace)
    wanted = {r for entry in contents(workspace, [row]).values() for r in entry["rows"]}
    env = Environment(workspace=workspace.absolute(), base=workspace.absolute(), pipeline="")
    registered: dict[str, list[str]] = {}
    for name in list_models(env):
        for v in list_versions(env, name):
            registered.setdefault(v["content"], []).append(f"{name}:{v['version']}" + "".join(f" @{a}" for a in v["aliases"]))
    adapters = {a.key: a for a in store.all() if a.has("adapter")}
    times: dict[str, int | None] = {}
    with connect() as con:
        for key, artifact in adapters.items():
            if artifact.has("seen.parquet"):
                n = con.execute("select sum(times)::bigint from read_parquet($file) where row_id in $rows",
                                {"file": str(artifact.file("seen.parquet")), "rows": sorted(wanted)}).fetchone()[0]
                if n:
                    times[key] = n
    while more := [k for k, a in adapters.items() if k not in times and any(e["key"] in times for e in a.manifest["inputs"].values())
                   and not a.has("seen.parquet")]:
        times |= dict.fromkeys(more)
    found = [{"stage": a.name, "kind": a.kind, "key": key, "made": a.manifest["notes"].get("started"), "times": times[key],
              "versions": registered.get(adapter_content(a), [])} for key, a in adapters.items() if key in times]
    return sorted(found, key=lambda f: (f["made"] or "", f["stage"]))


_TEXT = "coalesce(r.text, array_to_string(list_transform(r.messages, lambda m: m.role || ': ' || m.content), chr(10)))"


def _rows(con, artifacts: list[Artifact], prefix: str) -> list[dict[str, Any]]:
    if not artifacts or len(prefix) < 8:
        if artifacts:
            raise ConfigError(f"{prefix!r} is too short for a row id", remedy="give at least 8 digits")
        return []
    return _dicts(con.sql(
        f"select row_id, content_id, source, line, split, \"group\", {_TEXT} as text from read_parquet($files, union_by_name = true) r "
        "where row_id = $row or starts_with(row_id, $row) order by row_id limit 20",
        params={"files": [str(a.file("rows.parquet")) for a in artifacts], "row": prefix}))


def _where(con, path: Path, row_id: str) -> list[dict[str, Any]]:
    return _dicts(con.sql("select * from read_parquet($file) where row_id = $row", params={"file": str(path), "row": row_id}))


def _quarantined(con, pipeline: str, artifact: Artifact, prefix: str) -> list[dict[str, Any]]:
    """A row that could not be read has a decision and a place in quarantine, but no text of its own."""
    decisions = _dicts(con.sql("select * from read_parquet($file) where starts_with(row_id, $row) limit 20",
                               params={"file": str(artifact.file(DECISIONS)), "row": prefix}))
    return [{"pipeline": pipeline, "row_id": d["row_id"], "source": artifact.name, "line": 0, "split": "none", "group": "", "text": "(could not be read)",
             "decisions": [d], "seen": []} for d in decisions]


def _dicts(result) -> list[dict[str, Any]]:
    return result.to_arrow_table().to_pylist()
