"""What the UI is shown of each kind of artifact, from artifacts written by hand in the documented formats."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftpipe.artifacts import Artifact


def artifact(folder: Path, kind: str, counts: dict | None = None, tables: dict[str, pa.Table] | None = None, **files) -> Artifact:
    path = folder / kind
    path.mkdir()
    (path / "manifest.json").write_text(json.dumps({"key": "k" * 64, "kind": kind, "name": kind, "counts": counts or {}, "meta": {}}))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    for name, table in (tables or {}).items():
        pq.write_table(table, path / f"{name}.parquet")
    return Artifact(path)


@pytest.fixture
def shown(monkeypatch):
    """Everything that would be sent to the UI: (what, key, content)."""
    import prefect.artifacts

    found: list[tuple[str, str, object]] = []
    monkeypatch.setattr(prefect.artifacts, "create_markdown_artifact", lambda markdown, key, description: found.append(("markdown", key, markdown)))
    monkeypatch.setattr(prefect.artifacts, "create_table_artifact", lambda table, key, description: found.append(("table", key, table)))
    monkeypatch.setattr(prefect.artifacts, "create_link_artifact", lambda link, link_text, key, description: found.append(("link", key, link)))
    return found


def show(a: Artifact) -> None:
    from tasks.publish import publish

    publish.__wrapped__("My_Pipe", a)  # without the courtesy that hides errors


def test_a_curation_step_is_a_funnel(shown, tmp_path):
    show(artifact(tmp_path, "curate_step", {"rows_in": 10, "rows_kept": 4, "dropped: near duplicate": 5, "dropped: too long": 1}))
    (what, key, rows), = shown
    assert (what, key) == ("table", "my-pipe-curate-step")
    assert [(r["rows"], r["count"], r["share"]) for r in rows] == [("in", 10, "100.0%"), ("kept", 4, "40.0%"), ("dropped: near duplicate", 5, "50.0%"),
                                                                   ("dropped: too long", 1, "10.0%")]


def test_quarantine_is_counted_by_reason(shown, tmp_path):
    bad = pa.table({"source": ["a.jsonl"] * 3 + ["b.csv"], "line": [7, 9, 2, 1], "reason": ["cut", "cut", "no text", "cut"], "raw": ["x"] * 4})
    show(artifact(tmp_path, "ingest", {"rows_in": 9, "rows_kept": 9}, {"quarantine": bad}))
    assert [k for _, k, _ in shown] == ["my-pipe-ingest", "my-pipe-ingest-quarantine"]
    assert [tuple(row.values()) for row in shown[1][2]] == [("a.jsonl", "cut", 2, 7), ("a.jsonl", "no text", 1, 2), ("b.csv", "cut", 1, 1)]


@pytest.mark.parametrize("n", [1, 2, 20, 21, 500])
def test_a_curve_keeps_its_ends(n, shown, tmp_path):
    metrics = pa.table({"step": pa.array(range(1, n + 1), pa.int64()), "loss": [1 / (i + 1) for i in range(n)], "grad_norm": [None] * n})
    show(artifact(tmp_path, "train", tables={"metrics": metrics}))
    rows = shown[0][2]
    assert len(rows) == min(n, 20) and rows[0]["step"] == "1" and rows[-1]["step"] == f"{n:,}" and rows[0]["grad_norm"] == "–"


def test_comparisons_carry_their_interval(shown, tmp_path):
    base = {"suite": "heldout_loss", "metric": "loss", "a": "adapter", "b": "base", "n": 60, "mean_a": 2.8123, "mean_b": 3.4, "difference": 0.5877, "low": 0.41,
            "high": 0.77, "confidence": 0.95, "higher_is_better": False, "better": True}
    show(artifact(tmp_path, "evaluate", comparisons=[base, base | {"b": "random", "low": -0.1, "high": 0.2}, base | {"low": -0.3, "high": -0.1}]))
    first, second, third = shown[0][2]
    assert first["systems"] == "adapter against base" and first["interval (95%)"] == "0.41 to 0.77" and first["better"] == "adapter"
    assert first["means"] == "2.812 / 3.4"
    assert second["better"] == "undecided" and third["better"] == "base"


def test_a_verdict_names_the_rule_that_failed(shown, tmp_path):
    rule = {"name": "gain", "text": "adapter | base", "required": True, "passed": False, "value": 0.01, "low": -0.02, "high": 0.04, "limit": 0.0}
    other = rule | {"name": "forgetting", "passed": True, "low": None}
    skipped = rule | {"name": "champion", "passed": None, "low": None, "value": None, "limit": None}
    show(artifact(tmp_path, "gate", verdict={"passed": False, "candidate": "adapter", "rules": [rule, other, skipped]}))
    text = shown[0][2]
    assert text.startswith("## Refused: adapter") and "* **gain**: adapter \\| base" in text
    assert "| gain | **not met** | yes | 0.01 | -0.02 to 0.04 | 0 |" in text and "| forgetting | met |" in text
    assert "| champion | skipped | yes | – | – | – |" in text


def test_a_registration_says_what_it_replaced(shown, tmp_path):
    done = {"registered": True, "name": "docs", "version": "4", "alias": "champion", "champion_before": "3", "uri": "file:///m", "reason": None}
    show(artifact(tmp_path, "register", registration=done))
    assert "## docs version 4" in shown[0][2] and "took the place of version 3" in shown[0][2]
    (tmp_path / "no").mkdir()
    show(artifact(tmp_path / "no", "register", registration=done | {"registered": False, "reason": "the gate refused it"}))
    assert shown[1][2] == "## Nothing was registered\n\nthe gate refused it"


def test_a_report_is_linked(shown, tmp_path):
    a = artifact(tmp_path, "report")
    (a.path / "report.html").write_text("<p>")
    show(a)
    assert shown[0] == ("link", "my-pipe-report", (a.path / "report.html").as_uri()) and str(a.path / "report.html") in shown[1][2]


def test_kinds_with_nothing_to_show_are_passed_over(shown, tmp_path):
    show(artifact(tmp_path, "merge"))
    show(artifact(tmp_path, "publish"))  # a module of tasks, but no kind of stage
    assert shown == []


def test_a_long_table_is_cut_and_says_so(shown):
    from tasks.publish import ROWS_SHOWN, table

    table.__wrapped__("k", [{"i": i, "odd": {1}} for i in range(ROWS_SHOWN + 5)], "rows")
    assert len(shown[0][2]) == ROWS_SHOWN and shown[0][2][0]["odd"] == "{1}"
