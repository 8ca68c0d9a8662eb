"""Ingest: ids, the split, the quarantine, and counts that add up."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter

import pyarrow.parquet as pq
import pytest
import yaml

from ftpipe.artifacts import DECISIONS
from ftpipe.data.forgotten import forget
from ftpipe.data.rows import ROWS, RowSet, rows_schema
from ftpipe.errors import ConfigError, DataError, FtpipeError
from ftpipe.pipeline import runner, spec


@pytest.fixture()
def ingest(tmp_path):
    """Run an ingest stage with these settings; gives its artifact."""

    def run(**settings):
        config = tmp_path / "c.yaml"
        seed = settings.pop("pipeline_seed", 0)
        config.write_text(yaml.safe_dump({"name": "t", "seed": seed, "workspace": str(tmp_path / "ws"), "stages": {"ingest": settings}}))
        return runner.run(spec.load(config)).artifacts["ingest"]

    return run


def put(folder, name, rows):
    (folder / name).write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))


def grouped(groups, each=5, start=0):
    return [{"prompt": f"question {g} {i}", "completion": f"answer {i}", "topic": f"g{g}"} for g in range(start, start + groups) for i in range(each)]


def sides(artifact, column="group"):
    table = RowSet(artifact).table(None)
    return dict(zip(table[column].to_pylist(), table["split"].to_pylist()))


def test_rows_have_the_schema_and_ids_of_their_content(tmp_path, ingest):
    row = {"prompt": "q", "completion": "a", "extra": 1}
    put(tmp_path, "d.jsonl", [row, {"text": "plain"}, row, row])
    artifact = ingest(source={"jsonl": {"path": "d.jsonl"}}, heldout={"share": 0})
    table = pq.read_table(artifact.file(ROWS))
    assert table.schema.equals(rows_schema())
    found = table.to_pylist()
    assert [r["line"] for r in found] == [1, 2, 3, 4]
    first = found[0]["content_id"]
    assert [r["row_id"] for r in found] == [first, found[1]["content_id"], f"{first}~2", f"{first}~3"]
    assert all(r["group"] == r["content_id"] for r in found)
    assert json.loads(found[0]["meta"]) == {"extra": 1}
    assert [r["format"] for r in found] == ["messages", "text", "messages", "messages"]


def test_ids_stay_with_their_rows_over_many_batches(tmp_path, ingest):
    """The ids come from a query over the whole set and meet the rows again batch by batch."""
    put(tmp_path, "d.jsonl", [{"text": f"row {i}", "n": i} for i in range(7001)])
    artifact = ingest(source={"jsonl": {"path": "d.jsonl"}})
    table = pq.read_table(artifact.file(ROWS))
    assert table["row_id"].equals(table["content_id"])
    assert table["line"].to_pylist() == list(range(1, 7002))


def test_ids_do_not_depend_on_the_order_of_files(tmp_path, ingest):
    rows = grouped(20) + grouped(3)  # some rows twice
    put(tmp_path, "a.jsonl", rows[:60])
    put(tmp_path, "b.jsonl", rows[60:])
    settings = {"group_by": "topic", "heldout": {"share": 0.3}}
    before = ingest(source={"jsonl": {"path": "*.jsonl"}}, **settings)
    random.Random(1).shuffle(rows)
    put(tmp_path, "a.jsonl", rows[:30])
    put(tmp_path, "b.jsonl", rows[30:])
    after = ingest(source={"jsonl": {"path": ["b.jsonl", "a.jsonl"]}}, **settings)
    assert sorted(RowSet(before).ids(None)) == sorted(RowSet(after).ids(None))
    assert sides(before, "row_id") == sides(after, "row_id")


def test_no_group_is_on_both_sides_and_new_groups_move_no_old_ones(tmp_path, ingest):
    put(tmp_path, "d.jsonl", grouped(200))
    settings = {"source": {"jsonl": {"path": "d.jsonl"}}, "group_by": "topic", "heldout": {"share": 0.2}}
    artifact = ingest(**settings)
    table = RowSet(artifact).table(None)
    by_group = Counter(zip(table["group"].to_pylist(), table["split"].to_pylist()))
    assert len(by_group) == 200 and set(by_group.values()) == {5}
    heldout = {g for g, s in by_group if s == "heldout"}
    assert 25 <= len(heldout) <= 55  # 40 expected, standard deviation 5.7
    put(tmp_path, "d.jsonl", grouped(100, start=200) + grouped(200))
    more = sides(ingest(**settings))
    assert {g for g in heldout if more[g] == "heldout"} == heldout
    before = sides(artifact)
    assert {g: s for g, s in more.items() if g in before} == before
    assert sides(ingest(**settings, pipeline_seed=1)) != more


def test_equal_rows_stay_together_when_rows_are_drawn(tmp_path, ingest):
    put(tmp_path, "d.jsonl", grouped(40) * 3)
    artifact = ingest(source={"jsonl": {"path": "d.jsonl"}}, group_by="topic", heldout={"by": "row", "share": 0.3})
    table = RowSet(artifact).table(None)
    per_content = Counter(zip(table["content_id"].to_pylist(), table["split"].to_pylist()))
    assert len(per_content) == 200 and set(per_content.values()) == {3}


def test_held_out_rows_beyond_the_limit_are_dropped_and_never_trained_on(tmp_path, ingest):
    put(tmp_path, "d.jsonl", grouped(100))
    settings = {"source": {"jsonl": {"path": "d.jsonl"}}, "group_by": "topic"}
    everything, limited = ingest(**settings, heldout={"share": 0.3}), ingest(**settings, heldout={"share": 0.3, "limit": 20})
    fewer = ingest(**settings, heldout={"share": 0.3, "limit": 7})
    assert RowSet(everything).ids("train") == RowSet(limited).ids("train")
    assert len(RowSet(limited).ids("heldout")) == 20
    assert set(RowSet(fewer).ids("heldout")) < set(RowSet(limited).ids("heldout")) < set(RowSet(everything).ids("heldout"))
    decisions = pq.read_table(limited.file(DECISIONS)).to_pylist()
    dropped = {d["row_id"] for d in decisions if not d["kept"]}
    assert dropped == set(RowSet(everything).ids("heldout")) - set(RowSet(limited).ids("heldout"))
    assert limited.counts == {"rows_in": 500, "rows_kept": 500 - len(dropped), "dropped: held out beyond the limit": len(dropped)}
    assert RowSet(ingest(**settings, heldout={"share": 0.3, "limit": 400})).ids("heldout") == RowSet(everything).ids("heldout")


def test_named_groups_are_held_out_exactly(tmp_path, ingest):
    put(tmp_path, "d.jsonl", grouped(10))
    settings = {"source": {"jsonl": {"path": "d.jsonl"}}, "group_by": "topic"}
    found = sides(ingest(**settings, heldout={"groups": ["g3", "g7"]}))
    assert {g for g, s in found.items() if s == "heldout"} == {"g3", "g7"}
    with pytest.raises(DataError, match="names 'g33', which no row belongs to"):
        ingest(**settings, heldout={"groups": ["g33"]})


@pytest.mark.parametrize("groups, heldout, message", [
    (1, {"share": 0.5}, "all 1 groups are held out|none of the 1 groups"),
    (3, {"share": 0.0001}, "none of the 3 groups fell to the held-out side"),
    (2, {"groups": ["g0", "g1"]}, "all 2 groups are held out"),
])
def test_a_split_with_an_empty_side_is_an_error(tmp_path, ingest, groups, heldout, message):
    put(tmp_path, "d.jsonl", grouped(groups))
    with pytest.raises(DataError, match=message):
        ingest(source={"jsonl": {"path": "d.jsonl"}}, group_by="topic", heldout=heldout)


def test_what_cannot_be_read_goes_to_quarantine_and_every_line_is_accounted_for(tmp_path, ingest):
    bad = ['{"prompt": "cut he\n', '[1, 2]\n', json.dumps({"prompt": "q", "completion": ""}) + "\n", json.dumps({"who": "knows"}) + "\n",
           json.dumps({"prompt": "no topic", "completion": "a"}) + "\n"]
    put(tmp_path, "d.jsonl", grouped(20) + bad)
    artifact = ingest(source={"jsonl": {"path": "d.jsonl"}}, group_by="topic", heldout={"share": 0.3})
    aside = pq.read_table(artifact.file("quarantine.parquet")).to_pylist()
    assert [(r["source"], r["line"], r["reason"]) for r in aside] == [
        ("d.jsonl", 101, "the JSON is cut off"), ("d.jsonl", 102, "not a JSON object"), ("d.jsonl", 103, "completion is empty"),
        ("d.jsonl", 104, "no known format"), ("d.jsonl", 105, "group field 'topic' is missing")]
    assert aside[0]["raw"] == '{"prompt": "cut he' and json.loads(aside[2]["raw"]) == {"prompt": "q", "completion": ""}
    assert artifact.counts["rows_in"] == 105 and artifact.counts["rows_kept"] == 100
    assert artifact.counts["dropped: quarantined: the JSON is cut off"] == 1
    decisions = {d["row_id"]: d for d in pq.read_table(artifact.file(DECISIONS)).to_pylist()}
    assert len(decisions) == 105 and all(not decisions[r["row_id"]]["kept"] and r["row_id"].startswith("q:") for r in aside)
    summary = artifact.json("ingest.json")
    assert summary["rows"] + summary["quarantined"] == sum(summary["sources"].values()) == 105
    assert summary["reasons"] == {r["reason"]: 1 for r in aside}


def test_too_much_in_quarantine_stops_the_stage_with_the_reasons(tmp_path, ingest):
    put(tmp_path, "d.jsonl", grouped(2) + ["{\n"] * 4)
    settings = {"source": {"jsonl": {"path": "d.jsonl"}}, "heldout": {"share": 0}}
    with pytest.raises(DataError, match=r"only 10 of 14 rows can be used \(quarantine_limit is 0.2\):\n     4 x the JSON is cut off; first d.jsonl:11"):
        ingest(**settings)
    assert ingest(**settings, quarantine_limit=0.5).counts["rows_kept"] == 10
    put(tmp_path, "d.jsonl", [{"who": i} for i in range(9000)])
    with pytest.raises(DataError, match=r"none of the rows read so far can be used .*\n     2000 x no known format; first d\.jsonl:1: the row has"):
        ingest(**settings, quarantine_limit=1)


@pytest.mark.parametrize("settings, error, message", [
    ({"source": {"jsonl": {"path": "none.jsonl"}}}, ConfigError, "'none.jsonl' does not exist"),
    ({"source": {"jsonl": {"path": "empty.jsonl"}}}, DataError, "empty.jsonl: the file is empty"),
    ({"source": {"jsonl": {"path": "blank.jsonl"}}}, DataError, "the sources hold no rows"),
    ({}, ConfigError, "give either `source` or `sources`"),
    ({"source": {"jsonl": {"path": "d.jsonl"}}, "fields": {"promt": "q"}, "format": "prompt_completion"}, ConfigError, "'promt', which is no field"),
    ({"source": {"jsonll": {"path": "d.jsonl"}}}, ConfigError, "no method 'jsonll'"),
    ({"source": {"jsonl": {"path": "d.jsonl", "encodng": "x"}}}, ConfigError, "unknown key 'encodng'"),
    ({"source": {"jsonl": {"path": "d.jsonl"}}, "heldout": {"by": "row", "groups": ["g"]}}, ConfigError, "`groups` needs `by: group`"),
])
def test_what_cannot_work_is_said_before_any_work(tmp_path, ingest, settings, error, message):
    put(tmp_path, "d.jsonl", grouped(3))
    put(tmp_path, "empty.jsonl", [])
    put(tmp_path, "blank.jsonl", ["\n\n"])
    with pytest.raises(error) as caught:
        ingest(**settings)
    assert message in str(caught.value)
    assert not list((tmp_path / "ws").glob("store/*"))


def test_several_sources_and_mapped_fields(tmp_path, ingest):
    put(tmp_path, "d.jsonl", [{"q": f"q{i}", "a": f"a{i}"} for i in range(30)])
    (tmp_path / "d.csv").write_text("q,a\nx,y\n")
    artifact = ingest(sources=[{"jsonl": {"path": "d.jsonl"}}, {"csv": {"path": "d.csv"}}], fields={"prompt": "q", "completion": "a"}, heldout={"share": 0.3})
    assert artifact.json("ingest.json")["sources"] == {"d.csv": 1, "d.jsonl": 30}
    assert RowSet(artifact).table(None)["messages"].to_pylist()[30] == [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]


def test_the_artifact_has_the_same_bytes_each_time(tmp_path, ingest):
    put(tmp_path, "d.jsonl", [*grouped(900), "{\n", *grouped(10)])
    config = {"source": {"jsonl": {"path": "d.jsonl"}}, "group_by": "topic", "heldout": {"limit": 50}}
    first = ingest(**config).manifest["files"]
    for path in (tmp_path / "ws").glob("store/*"):
        path.rename(tmp_path / "first")
    assert ingest(**config).manifest["files"] == first


def test_python_documentation_is_split_by_module(ingest):
    artifact = ingest(source={"python_docs": {"limit": 600}}, heldout={"share": 0.2, "limit": 30})
    table = RowSet(artifact).table(None)
    train, heldout = ({g for g, s in zip(table["group"].to_pylist(), table["split"].to_pylist()) if s == side} for side in ("train", "heldout"))
    assert train and heldout and not train & heldout
    assert artifact.counts["rows_in"] == 600
    assert json.loads(table["meta"][0].as_py())["kind"] in ("function", "class")


def test_a_large_source_is_never_held_in_memory(tmp_path, ingest):
    rng = random.Random(0)
    with (tmp_path / "big.jsonl").open("w") as f:
        for i in range(25_000):
            f.write(json.dumps({"text": f"{i} " + "x" * 2000, "n": rng.random()}) + "\n")
    assert (tmp_path / "big.jsonl").stat().st_size > 50e6
    tracemalloc.start()
    try:
        artifact = ingest(source={"jsonl": {"path": "big.jsonl"}})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert artifact.counts["rows_kept"] == 25_000
    assert peak < 25e6  # a batch of 2,000 rows is 4 MB of text


def test_forgotten_rows_are_left_out_wherever_they_stand(tmp_path, ingest):
    put(tmp_path, "d.jsonl", [*grouped(20), {"prompt": "secret", "completion": "x", "topic": "g3"}, {"prompt": "secret", "completion": "x", "topic": "new"}])
    config = {"source": {"jsonl": {"path": "d.jsonl"}}, "group_by": "topic", "heldout": {"share": 0.3}}
    before = ingest(**config)
    table = RowSet(before).table(None)
    secret = [c for c, m in zip(table["content_id"].to_pylist(), table["messages"].to_pylist()) if m[0]["content"] == "secret"]
    heldout = [c for c, s in zip(table["content_id"].to_pylist(), table["split"].to_pylist()) if s == "heldout"]
    assert len(secret) == 2 and len(set(secret)) == 1
    assert forget(tmp_path / "ws", [secret[0], heldout[0]], "asked to") == [secret[0], heldout[0]]
    assert forget(tmp_path / "ws", [secret[0]]) == []
    after = ingest(**config)
    assert after.counts["dropped: forgotten: named by `ftpipe forget`"] == 3 and after.counts["rows_in"] == before.counts["rows_in"]
    rest = RowSet(after).table(None)
    assert rest.num_rows == table.num_rows - 3 and not {secret[0], heldout[0]} & set(rest["content_id"].to_pylist())
    assert {k: v for k, v in sides(before).items() if k != "new"} == {k: v for k, v in sides(after).items() if k != "new"}, "the others stay on their side"
    (tmp_path / "ws" / "forgotten.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="cannot be read"):
        ingest(**config)


def test_what_a_row_says_and_the_model_will_not_see_is_a_warning(tmp_path, ingest):
    put(tmp_path, "d.jsonl", [*grouped(10), {"prompt": "q", "completion": "a", "tools": "[{}]"}, {"prompt": "q", "completion": "b", "label": False}])
    warnings = ingest(source={"jsonl": {"path": "d.jsonl"}}).json("ingest.json")["warnings"]
    assert {text.split("`")[1]: n for text, n in warnings.items()} == {"tools": 1, "label: false": 1}


def test_quarantined_rows_have_ids_that_never_meet_real_ones(tmp_path, ingest):
    put(tmp_path, "a.jsonl", [*grouped(20), "{\n"])
    put(tmp_path, "b.jsonl", [*grouped(20, start=20), "{\n"])
    artifact = ingest(source={"jsonl": {"path": "*.jsonl"}})
    decisions = pq.read_table(artifact.file(DECISIONS))
    assert len(set(decisions["row_id"].to_pylist())) == decisions.num_rows == 202


def test_errors_are_of_this_program(tmp_path, ingest):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 this is no Parquet file PAR1")
    with pytest.raises(FtpipeError, match="the Parquet file cannot be read"):
        ingest(source={"parquet": {"path": "d.parquet"}})


def test_parts_read_side_by_side_make_the_same_artifact(tmp_path, ingest, monkeypatch):
    from ftpipe.data import reading
    from ftpipe.data.sources import jsonl

    put(tmp_path, "d.jsonl", [*grouped(300), "{\n", *grouped(300, start=300), *grouped(3)])
    put(tmp_path, "e.jsonl", grouped(40, start=1000))
    config = {"sources": [{"jsonl": {"path": "d.jsonl"}}, {"jsonl": {"path": "e.jsonl"}}], "group_by": "topic", "heldout": {"limit": 50}}
    alone = ingest(**config).manifest
    (tmp_path / "ws").rename(tmp_path / "first")
    monkeypatch.setattr(jsonl, "PART", 20_000)
    monkeypatch.setattr(reading, "LARGE", 1)
    beside = ingest(**config).manifest
    assert beside["files"] == alone["files"] and beside["counts"] == alone["counts"]


def test_parts_that_were_read_before_a_kill_are_not_read_again(tmp_path, ingest, monkeypatch):
    from ftpipe.data import reading
    from ftpipe.data.sources import jsonl

    put(tmp_path, "d.jsonl", grouped(300))
    monkeypatch.setattr(jsonl, "PART", 5_000)
    read, inner = [], reading.Task.read

    def some(task, progress):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(task.part.start)
        return inner(task, progress)

    monkeypatch.setattr(reading.Task, "read", some)
    with pytest.raises(KeyboardInterrupt):
        ingest(source={"jsonl": {"path": "d.jsonl"}})
    monkeypatch.setattr(reading.Task, "read", lambda task, progress: (read.append(task.part.start), inner(task, progress)))
    assert ingest(source={"jsonl": {"path": "d.jsonl"}}).counts["rows_in"] == 1500
    assert len(read) == len(set(read)) > 5
