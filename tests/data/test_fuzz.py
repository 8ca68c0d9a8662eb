"""Whatever a row holds, it becomes a row that Arrow and the hashes can take, or a fault with a reason; never another exception."""

from __future__ import annotations

import json

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftpipe.data.formats import FIELDS, ROLES, FormatError, convert
from ftpipe.data.rows import content_id, rows_schema
from ftpipe.data.sources.jsonl import parse
from ftpipe.stages.ingest import Ingest, Reading

TEXT = st.text(st.characters(), max_size=8)  # every code point, lone surrogates too
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ANY = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)
TURN = st.fixed_dictionaries({}, optional={"role": st.sampled_from(sorted(ROLES)) | ANY, "from": st.sampled_from(sorted(ROLES)) | ANY, "content": TEXT | ANY,
                                           "value": TEXT | ANY, "tool_calls": ANY})
NAMES = sorted({f for fields in FIELDS.values() for f in fields} | {"question", "answer", "query", "response"})
VALUE = TEXT | st.lists(TURN, max_size=3) | TURN | ANY
ROW = st.dictionaries(st.sampled_from(NAMES) | TEXT, VALUE, max_size=5)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROW, st.sampled_from(["auto", *FIELDS]))
def test_convert_gives_a_row_or_a_format_error(raw, name):
    try:
        row = convert(raw, name)
    except FormatError as error:
        assert error.reason
        (error.reason + error.detail).encode()
        return
    assert len(content_id(row)) == 32
    json.dumps(row.pop("meta"), ensure_ascii=False, allow_nan=False).encode()
    pa.Table.from_pylist([row], rows_schema())
    said = [row["text"]] if row["text"] else [t["content"] for t in (row["messages"] or []) + (row["chosen"] or [])]
    assert any(s.strip() for s in said)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ROW | ANY, st.none() | st.sampled_from(NAMES))
def test_a_line_becomes_a_row_or_a_quarantined_one(value, group_by):
    """The whole way of a JSON line: parsed, converted, grouped, and taken by Arrow on either side."""
    reading = Reading(Ingest(source={"jsonl": {"path": "x"}}, group_by=group_by))
    row = reading.row(parse(json.dumps(value), "x", 1))
    if "reason" in row:
        pa.Table.from_pylist([row], reading.aside_schema())
        assert reading.good == 0 and sum(reading.faults.values()) == 1
    else:
        pa.Table.from_pylist([row], reading.staging_schema())
        assert reading.good == 1 and not reading.faults
    json.dumps(reading.examples, ensure_ascii=False).encode()


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_line_of_text_gives_a_record(text):
    record = parse(text, "x", 1)
    assert (record.raw is None) == (record.error is not None)
