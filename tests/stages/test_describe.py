"""Describe: planted lengths, copies, openings and languages come back."""

from __future__ import annotations

import json

import pytest
import yaml

from ftpipe.pipeline import runner, spec
from ftpipe.report.sections.data import findings

GERMAN = "Das ist ein Satz auf Deutsch, und er handelt von nichts Besonderem, nur von Tag {}."


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    folder = tmp_path_factory.mktemp("describe")
    about = "It is the item number {}, which stands on the shelf in the hall. "
    rows = [{"prompt": f"Please tell me about item number {i}", "completion": about.format(i) * 4} for i in range(60)]
    rows += [{"prompt": f"Frage {i}: was ist das?", "completion": " ".join(GERMAN.format(i + k) for k in range(3))} for i in range(20)]
    rows += rows[:5]  # exact copies
    rows += [{"prompt": "Please tell me about item number 7", "completion": rows[7]["completion"] + "Indeed."},
             {"prompt": "mail?", "completion": "jane@acme.io"}]
    (folder / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    stages = {"ingest": {"source": {"jsonl": {"path": "d.jsonl"}}, "heldout": {"share": 0}},
              "data": {"kind": "describe", "rows": "ingest"}, "page": {"kind": "report", "data": ["data"]}}
    (folder / "c.yaml").write_text(yaml.safe_dump({"name": "t", "workspace": str(folder / "ws"), "stages": stages}))
    return runner.run(spec.load(folder / "c.yaml")).artifacts


def test_what_was_planted_is_told(described):
    found = described["data"].json("description.json")
    assert found["rows"] == {"train": 87, "heldout": 0} and found["duplicates"] == {"rows": 5, "heldout_in_train": 0}
    assert found["near"]["rows"] >= 6, "the exact copies and the one with a word more"
    assert found["lengths"]["prompt words"]["0.5"] == 7 and found["lengths"]["answer words"]["0"] == 1
    assert found["openings"]["prompt"]["top"][0] == {"name": "please tell me about", "rows": 61}
    assert found["sources"] == [{"name": "d.jsonl", "rows": 87}] and found["formats"] == [{"name": "messages", "rows": 87}]
    by_language = {e["name"]: e["rows"] for e in found["languages"]["top"]}
    assert by_language["de"] == 20 and by_language["en"] >= 60
    assert found["personal_data"]["rows_by_kind"] == {"email": 1}
    said = " ".join(findings(found))
    assert "5 train rows" in said and "personal data (email)" in said and "begin alike" in said


def test_the_page_draws_it_and_nothing_was_changed(described):
    page = described["page"].file("report.html").read_text()
    assert "What the rows are like" in page and "please tell me about" in page and page.count("<svg") >= 2 and "jane@" not in page
    assert not described["data"].has("kept.parquet")
