"""Sources that lie on a server: the same rows, by parts and after a kill, keys that follow the content, and errors before any work."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import sys
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ftpipe import slots
from ftpipe.data import files, reading
from ftpipe.data.rows import ROWS
from ftpipe.data.sources import jsonl
from ftpipe.errors import ConfigError, DataError, FtpipeError, InfrastructureError
from ftpipe.pipeline import runner, spec
from ftpipe.pipeline.plan import plan
from ftpipe.pipeline.store import Store
from ftpipe.stages.base import Environment
from tests.data.serving import serving

ROWS_ = [{"prompt": f"question {i}", "completion": f"answer {'x' * (i * i % 70)} {i}"} for i in range(300)]
LINES = "".join(json.dumps(r) + "\n" for r in ROWS_)


@pytest.fixture()
def store(tmp_path):
    (tmp_path / "far").mkdir()
    with serving(tmp_path / "far") as server:
        yield server


@pytest.fixture()
def env(tmp_path):
    return Environment(tmp_path / "ws", tmp_path, "t")


def config(tmp_path, url, workspace="ws", **settings):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"name": "t", "workspace": str(tmp_path / workspace), "stages": {
        "ingest": {"source": {"jsonl": {"path": url}}, "heldout": {"share": 0.1}, **settings}}}))
    return spec.load(path)


def said(artifact) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "source"} for row in pq.read_table(artifact.file(ROWS)).to_pylist()]


def write_all(folder):
    (folder / "d.jsonl").write_text(LINES)
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    (folder / "e.jsonl.bz2").write_bytes(bz2.compress(LINES.encode()))
    (folder / "d.json").write_text(json.dumps(ROWS_))
    (folder / "d.csv").write_text("prompt,completion\n" + "".join(f"{r['prompt']},{r['completion']}\n" for r in ROWS_))
    (folder / "d.txt").write_text("\n\n".join(r["prompt"] for r in ROWS_))
    pq.write_table(pa.Table.from_pylist(ROWS_), folder / "d.parquet", row_group_size=50)


def test_every_format_is_read_from_a_server_as_from_the_disk(store, env, monkeypatch):
    write_all(store.folder)
    monkeypatch.setattr(files, "BLOCK", 4096)
    for method, name in [("jsonl", "d.jsonl"), ("jsonl", "d.jsonl.gz"), ("jsonl", "e.jsonl.bz2"), ("json", "d.json"), ("csv", "d.csv"), ("text", "d.txt"),
                         ("parquet", "d.parquet")]:
        near = slots.parse("data/sources", {method: {"path": str(store.folder / name)}})
        far = slots.parse("data/sources", {method: {"path": f"{store.url}/{name}"}})
        rows = list(far.records(env))
        assert [replace(r, source="", group=None) for r in rows] == [replace(r, source="", group=None) for r in near.records(env)], name
        assert len(rows) == 300 and {r.source for r in rows} == {f"{store.url}/{name}"}
        assert list(slots.parse("data/sources", {method: {"path": f"file://{store.folder}/{name}"}}).records(env)) == list(near.records(env))


def test_patterns_and_folders_on_a_server(store, env):
    (store.folder / "in").mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt"):
        (store.folder / "in" / name).write_bytes(gzip.compress(LINES.encode()) if name.endswith("gz") else LINES.encode())
    (store.folder / "in" / "empty.jsonl").touch()
    both = [f"{store.url}/in/a.jsonl", f"{store.url}/in/b.jsonl.gz"]
    assert list(jsonl.Jsonl(path=f"{store.url}/in/").files(env)) == both
    assert list(jsonl.Jsonl(path=f"{store.url}/in/*.jsonl*").files(env)) == both
    assert list(jsonl.Jsonl(path=[both[1], both[0]]).files(env)) == both
    with pytest.raises(DataError, match="the file is empty"):
        jsonl.Jsonl(path=f"{store.url}/in/empty.jsonl").files(env)
    with pytest.raises(ConfigError, match="no file matches"):
        jsonl.Jsonl(path=f"{store.url}/in/*.csv").files(env)
    with pytest.raises(ConfigError, match=r"holds no \.csv"):
        slots.parse("data/sources", {"csv": {"path": f"{store.url}/in/"}}).files(env)


def test_each_byte_of_a_large_file_is_asked_for_about_once_and_none_again_after_a_kill(tmp_path, store, monkeypatch):
    (store.folder / "d.jsonl").write_text(LINES * 8)
    size = len(LINES) * 8
    monkeypatch.setattr(files, "BLOCK", 2048)
    monkeypatch.setattr(jsonl, "SEEN", 256)
    monkeypatch.setattr(jsonl, "PART", size // 10)
    read, inner = [], reading.Task.read

    def some(task, progress):
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(task.part.start)
        return inner(task, progress)

    monkeypatch.setattr(reading.Task, "read", some)
    with pytest.raises(KeyboardInterrupt):
        runner.run(config(tmp_path, f"{store.url}/d.jsonl"))
    assert store.served["d.jsonl"] < 0.6 * size  # four parts of ten, and the places where the file is parted
    monkeypatch.setattr(reading.Task, "read", lambda task, progress: (read.append(task.part.start), inner(task, progress)))
    far = runner.run(config(tmp_path, f"{store.url}/d.jsonl")).artifacts["ingest"]
    assert len(read) == len(set(read)) == 10 and size < store.served["d.jsonl"] < 1.4 * size
    monkeypatch.undo()
    near = runner.run(config(tmp_path, str(store.folder / "d.jsonl"), "near")).artifacts["ingest"]
    assert said(far) == said(near) and max(row["line"] for row in said(near)) > 2300


def test_parts_are_read_by_processes_with_credentials_that_nobody_writes_down(tmp_path, store, monkeypatch):
    """Rows, lines and ids are those of the file on the disk, broken lines among them; keys come from the environment and stay in it."""
    import fsspec.config

    options = {"client_kwargs": {"headers": {"Authorization": "Bearer open-sesame"}}}
    (store.folder / "d.jsonl").write_text(LINES * 2 + "{broken\n\n" + LINES + "[1]\n" + LINES)
    store.token = options["client_kwargs"]["headers"]["Authorization"]
    with pytest.raises(ConfigError, match="access is refused"):
        config(tmp_path, f"{store.url}/d.jsonl").check()
    monkeypatch.setenv("FSSPEC_HTTP", json.dumps(options))  # for the child processes, whose fsspec reads it
    monkeypatch.setitem(fsspec.config.conf, "http", options)
    monkeypatch.setattr(jsonl, "PART", 20_000)
    monkeypatch.setattr(reading, "LARGE", 1)
    far = runner.run(config(tmp_path, f"{store.url}/d.jsonl")).artifacts["ingest"]
    monkeypatch.setattr(jsonl, "PART", 10**9)
    near = runner.run(config(tmp_path, str(store.folder / "d.jsonl"), "near")).artifacts["ingest"]
    assert said(far) == said(near) and far.counts == near.counts
    aside = [pq.read_table(a.file("quarantine.parquet")).to_pylist() for a in (far, near)]
    assert [[(r["line"], r["reason"], r["raw"]) for r in a] for a in aside] == [[(601, "not valid JSON", "{broken"), (903, "not a JSON object", "[1]")]] * 2
    assert [r["row_id"] for r in aside[0]] == [reading._aside_id(f"{store.url}/d.jsonl", line) for line in (601, 903)]
    written = [p for p in (tmp_path / "ws").rglob("*") if p.is_file()]
    assert len(written) > 8 and not [p for p in written if b"open-sesame" in p.read_bytes()]


@pytest.mark.parametrize("tags", ["strong", "weak", ""])
def test_the_key_follows_the_content_of_an_object(tmp_path, store, tags):
    """Of equal length, and whatever its date says; a strong ETag costs no reading, and without one the content is read once."""
    store.tags, store.age = tags, 3600
    path = store.folder / "d.jsonl"
    path.write_text(LINES)
    made = config(tmp_path, f"{store.url}/d.jsonl")
    runner.run(made)
    read = store.served["d.jsonl"]
    assert read == len(LINES) * (1 if tags == "strong" else 2)

    def planned():
        return plan(made, Store(made.env.workspace))[0]

    assert not planned().run and store.served["d.jsonl"] == read
    path.write_text(LINES.replace("question 7", "Question 7"))
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 5))
    assert planned().run and "changed" in planned().reason
    path.write_text(LINES)
    if tags == "strong":
        os.utime(path, (0, 0))
    assert not planned().run


def test_a_young_file_without_a_tag_is_read_again_each_time(store, env):
    """Its date could not tell a second write within the same second."""
    store.tags = ""
    path = store.folder / "d.jsonl"
    path.write_text(LINES)
    source = jsonl.Jsonl(path=f"{store.url}/d.jsonl")
    stat, first = path.stat(), source.identity(env)
    path.write_text(LINES.replace("question 7", "Question 7"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert source.identity(env) != first


def test_what_cannot_be_read_is_said_before_any_work(tmp_path, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    cases = [("s3://bucket/d.jsonl", ConfigError, r"reading s3:// needs a package.*\n.*pip install s3fs 'fsspec=="),
             ("s4://bucket/d.jsonl", ConfigError, "nothing here reads s4"),
             (f"{store.url}/not/here.jsonl", ConfigError, "does not exist"), ("http://127.0.0.1:9/d.jsonl", InfrastructureError, "cannot be reached"),
             (f"{store.url}/d.jsonl?X-Signature=abc", ConfigError, "signature"), ("http://me:hunter2@host/d.jsonl", ConfigError, "holds a password")]
    for url, kind, words in cases:
        with pytest.raises(kind, match=words) as caught:
            config(tmp_path, url).check()
        assert caught.value.where and caught.value.remedy
    assert not (tmp_path / "ws").exists()


def test_a_file_that_ends_early_or_a_server_that_goes_away_is_no_row(store, env, monkeypatch):
    """What the network does is an error that a retry may mend; it is never taken for the end of the data, or for a damaged file."""
    path = store.folder / "d.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    source = jsonl.Jsonl(path=f"{store.url}/d.jsonl.gz")
    part, = source.parts(env)
    monkeypatch.setattr(files, "BLOCK", 256)
    with part.file.open() as f:
        path.write_bytes(path.read_bytes()[:500])
        with pytest.raises(InfrastructureError, match="ended after 500 of"):
            f.read()
    with pytest.raises(InfrastructureError, match="was replaced"):
        list(source.part(part, env))
    path.unlink()
    with pytest.raises(FtpipeError, match="does not exist"):
        list(source.part(part, env))
    with pytest.raises(InfrastructureError) as caught:
        list(source.part(replace(part, file=replace(part.file, path="http://127.0.0.1:9/d.jsonl.gz")), env))
    assert caught.value.retryable


def test_errors_of_a_part_reach_the_stage_from_its_process(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("a,a\n1,2\n")
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    monkeypatch.setattr(reading, "LARGE", 1)
    settings = {"source": {"csv": {"path": str(tmp_path / "*.csv")}}}
    with pytest.raises(DataError, match="the header has empty or repeated names") as caught:
        runner.run(config(tmp_path, "", **settings))
    assert caught.value.where.endswith("a.csv:1") and caught.value.remedy


def test_no_row_is_lost_where_one_file_of_several_cannot_be_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("broken\n" * 5000)
    (tmp_path / "b.jsonl").write_text(LINES * 20)
    made = runner.run(config(tmp_path, str(tmp_path / "*.jsonl"), quarantine_limit=0.9)).artifacts["ingest"]
    assert made.counts["rows_in"] == 5000 + 300 * 20
