"""Personal data: planted ones are found and removed, what only looks like them is left alone."""

from __future__ import annotations

import json

import pytest

from ftpipe.curate.filter._patterns import KINDS, matches, redact
from ftpipe.curate.filter.personal_data import PersonalData
from ftpipe.data.rows import RowSet
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_step, text

FOUND = {
    "email": ["write to jane.doe+x@mail.acme.co.uk now", "<a.b@acme.io>"],
    "telephone": ["call +49 30 1234567", "call (415) 555-2671.", "at +1-415-555-2671", "415-555-2671"],
    "card": ["4111 1111 1111 1111", "card 5500005555555559."],
    "iban": ["DE89 3704 0044 0532 0130 00", "to GB82WEST12345698765432"],
    "ip_address": ["from 8.8.8.8 to", "2001:4860:4860:0000:0000:0000:0000:8888"],
    "social_security": ["SSN 123-45-6789"],
    "api_key": ["AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "sk-proj-" + "x" * 24],
    "private_key": ["-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----"],
}
CLEAN = ["user@example.com", "version 1.2.3.4567", "127.0.0.1 and 192.168.0.1 and 203.0.113.7", "4111 1111 1111 1112",
         "DE00 3704 0044 0532 0130 00", "3.14159265358979",
         "2026-11-21", "10.5281/zenodo.1234567", "@decorator.call", "000-12-3456", "a+b@c", "range(1000000, 2000000)",
         "0x7ffee4b5c6d7", "1 2 3 4 5 6 7 8 9 10 11 12 13",
         "111-111-1111", "12:30:45:00"]


@pytest.mark.parametrize(("kind", "said"), [(k, s) for k, all_ in FOUND.items() for s in all_])
def test_each_kind_is_found_and_redacted(kind, said):
    assert [m.kind for m in matches(said, tuple(KINDS))] == [kind]
    clean = redact(said, tuple(KINDS))
    assert f"[{kind.upper()}]" in clean and not matches(clean, tuple(KINDS))
    assert not matches(said, tuple(k for k in KINDS if k != kind)) or kind in ("card", "iban")


@pytest.mark.parametrize("said", CLEAN)
def test_what_only_looks_like_it_is_left_alone(said):
    assert matches(said, tuple(KINDS)) == []


@pytest.fixture
def rows():
    return complete([chat("who?", "jane@acme.io"), chat("at 8.8.8.8?", "yes"), chat("what?", "nothing"), text("plain ghp_" + "a1B2" * 9),
                     chat("held", "john@acme.io", split="heldout")])


def test_it_reports_and_keeps_by_default(tmp_path, rows):
    made = run_step(tmp_path, rows_artifact(tmp_path, rows), PersonalData())
    assert len(kept_ids(made)) == 4 and [d["score"] for d in decisions(made).values()].count(1.0) == 3
    report = made.json("personal_data.json")
    assert report["found"] == {"api_key": 1, "email": 1, "ip_address": 1} and report["rows_with"] == 3
    assert "jane" not in json.dumps(report)


def test_drop_and_redact(tmp_path, rows):
    source = rows_artifact(tmp_path, rows)
    dropped = run_step(tmp_path, source, PersonalData(action="drop", kinds=["email"]))
    assert [d["reason"] for d in decisions(dropped).values() if not d["kept"]] == ["personal data: email"] and len(kept_ids(dropped)) == 3
    clean = run_step(tmp_path, source, PersonalData(action="redact"))
    said = [(r["messages"] or [{"content": r["text"]}]) for r in RowSet(clean).table().to_pylist()]
    texts = sorted(" ".join(t["content"] for t in turns) for turns in said)
    assert texts == ["at [IP_ADDRESS]? yes", "plain [API_KEY]", "what? nothing", "who? [EMAIL]"]
    assert clean.counts["made"] == 3
