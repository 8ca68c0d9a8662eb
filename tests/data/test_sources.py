"""Each source on broken input: what can be read is read, and what cannot is told with its place."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tracemalloc

import pytest

from ftpipe.data.sources.csv import Csv
from ftpipe.data.sources.hf_dataset import HfDataset
from ftpipe.data.sources.json import Json
from ftpipe.data.sources.jsonl import Jsonl
from ftpipe.data.sources.parquet import Parquet
from ftpipe.data.sources.python_docs import PythonDocs, shorten
from ftpipe.data.sources.text import Text
from ftpipe.errors import ConfigError, DataError
from ftpipe.stages.base import Environment


@pytest.fixture()
def env(tmp_path):
    return Environment(workspace=tmp_path / "ws", base=tmp_path, pipeline="t")


def put(env, name: str, data: bytes | str):
    path = env.base / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def faults(records):
    return [(r.line, r.error) for r in records if r.error]


def rows(records):
    return [r.raw for r in records if r.error is None]


def test_jsonl_lines_fail_one_by_one(env):
    put(env, "d.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n{"a": "caf\xe9"}\n[1]\n{"a": 2,}\n' + b'[' * 200_000 + b'\n{"a": "h\xc3\xa9"}\r\n{"a": "cut he')
    records = list(Jsonl(path="d.jsonl").records(env))
    assert rows(records) == [{"a": 1}, {"a": "hé"}]
    assert faults(records) == [(3, "not valid utf-8"), (4, "not a JSON object"), (5, "not valid JSON"), (6, "not valid JSON"), (8, "the JSON is cut off")]
    assert "0xe9 at position 10" in records[1].detail
    assert records[1].text == '{"a": "caf\\xe9"}\n'
    assert records[-1].text == '{"a": "cut he'


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-be", "shift_jis"])
def test_other_encodings_when_told(env, encoding):
    text = "é" if encoding != "shift_jis" else "テスト"
    line = json.dumps({"text": text}, ensure_ascii=False)
    put(env, "d.jsonl", f"{line}\n{line}\n".encode(encoding))
    put(env, "d.json", f"[{line}, {line}]".encode(encoding))
    put(env, "d.csv", f"text,n\n{text},1\n{text},2\n".encode(encoding))
    put(env, "d.txt", f"{text}\n\n{text}\n".encode(encoding))
    for found in (Jsonl(path="d.jsonl", encoding=encoding), Json(path="d.json", encoding=encoding), Csv(path="d.csv", encoding=encoding),
                  Text(path="d.txt", encoding=encoding)):
        assert [r.raw and r.raw["text"] for r in found.records(env)] == [text, text], found


def test_an_unknown_encoding_is_a_configuration_error():
    with pytest.raises(ValueError, match="no encoding is called 'utf-88'"):
        Jsonl(path="x", encoding="utf-88")


def test_a_compressed_file_that_was_cut_off(env):
    data = "".join(json.dumps({"text": f"row {i} {i * 7919 % 104729}"}) + "\n" for i in range(20_000))
    path = put(env, "d.jsonl.gz", gzip.compress(data.encode()))
    assert len(rows(Jsonl(path="d.jsonl.gz").records(env))) == 20_000
    path.write_bytes(path.read_bytes()[:-20_000])
    records = list(Jsonl(path="d.jsonl.gz").records(env))
    assert 1000 < len(rows(records)) < 20_000
    assert records[-1].error in ("the compressed file is damaged", "the JSON is cut off")


def test_a_large_jsonl_file_is_streamed(env):
    line = json.dumps({"text": "x" * 980}) + "\n"
    with (env.base / "big.jsonl").open("w") as f:
        for _ in range(50):
            f.write(line * 1000)
    tracemalloc.start()
    count = sum(1 for r in Jsonl(path="big.jsonl").records(env) if r.error is None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 50_000 and (env.base / "big.jsonl").stat().st_size > 45e6
    assert peak < 2e6


def test_json_that_was_cut_off_keeps_the_items_before(env):
    put(env, "d.json", '[{"a": 1}, {"a": 2}, 7, {"a": "hal')
    records = list(Json(path="d.json").records(env))
    assert rows(records) == [{"a": 1}, {"a": 2}]
    assert faults(records) == [(3, "not a JSON object"), (4, "the JSON is cut off")]
    put(env, "d.json", '[{"a": 1} {"a": 2}]')
    assert faults(Json(path="d.json").records(env)) == [(2, "not valid JSON")]
    put(env, "d.json", b'[{"a": "caf\xe9"}, {"a": "fine"}]')
    records = list(Json(path="d.json").records(env))
    assert rows(records) == [{"a": "fine"}] and faults(records) == [(1, "not valid utf-8")]


def test_json_with_the_list_inside(env):
    put(env, "d.json", '{"version": 1, "data": {"rows": [{"a": 1}]}}')
    assert rows(Json(path="d.json", key="data.rows").records(env)) == [{"a": 1}]
    with pytest.raises(DataError, match=r"no 'data.row'"):
        list(Json(path="d.json", key="data.row").records(env))
    with pytest.raises(DataError, match="an object, not a list") as caught:
        list(Json(path="d.json").records(env))
    assert "version, data" in caught.value.remedy


def test_csv_rows_fail_one_by_one(env):
    put(env, "d.csv", b'prompt,completion\nq1,"two\nlines"\nq2\nq3,caf\xe9\nq4,"bad"quote\nq5,\nq6,fine\n')
    records = list(Csv(path="d.csv").records(env))
    assert rows(records) == [{"prompt": "q1", "completion": "two\nlines"}, {"prompt": "q5", "completion": None}, {"prompt": "q6", "completion": "fine"}]
    assert faults(records) == [(4, "wrong number of columns"), (5, "not valid utf-8"), (6, "not valid CSV")]
    put(env, "open.csv", 'a,b\n1,2\n3,"never closed\n5,6\n')
    assert faults(Csv(path="open.csv").records(env)) == [(3, "not valid CSV")]
    put(env, "d.tsv", "a\tb\n1\t2\n")
    assert rows(Csv(path="d.tsv").records(env)) == [{"a": "1", "b": "2"}]
    put(env, "twice.csv", "a,a\n1,2\n")
    with pytest.raises(DataError, match="repeated names: a, a"):
        list(Csv(path="twice.csv").records(env))


def test_parquet_that_is_damaged_or_lacks_a_column(env):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b"], "n": [1, 2]}), env.base / "d.parquet")
    assert rows(Parquet(path="d.parquet", columns=["text"]).records(env)) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(ConfigError, match="no column 'txt'") as caught:
        list(Parquet(path="d.parquet", columns=["txt"]).records(env))
    assert "did you mean 'text'" in caught.value.remedy
    put(env, "bad.parquet", (env.base / "d.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read after row 0"):
        list(Parquet(path="bad.parquet").records(env))


def test_text_units_and_where_they_start(env):
    put(env, "a.txt", b"One\ntwo.\n\n\nThree.\n\ncaf\xe9\n")
    records = list(Text(path="a.txt").records(env))
    assert [(r.line, r.raw["text"], r.group) for r in records if not r.error] == [(1, "One\ntwo.", "a.txt"), (5, "Three.", "a.txt")]
    assert faults(records) == [(7, "not valid utf-8")]
    put(env, "b.txt", "One\ntwo.\n\nThree.\n")
    assert rows(Text(path="b.txt", unit="file").records(env)) == [{"text": "One\ntwo.\n\nThree."}]
    assert rows(Text(path="b.txt", unit="line").records(env)) == [{"text": "One"}, {"text": "two."}, {"text": "Three."}]
    assert rows(Text(path="b.txt", min_chars=10).records(env)) == [{"text": "One\ntwo.\n\nThree."}]


def test_patterns_folders_and_lists_come_in_stable_order(env):
    for name in ("b/2.jsonl", "a/1.jsonl", "b/10.jsonl"):
        put(env, name, json.dumps({"text": name}) + "\n")
    put(env, "b/empty.jsonl", "")
    order = ["a/1.jsonl", "b/10.jsonl", "b/2.jsonl"]
    for path in ("**/*.jsonl", ".", ["b", "a/1.jsonl"], ["b/*.jsonl", "a", "b/2.jsonl"]):
        assert [r.source for r in Jsonl(path=path).records(env)] == order, path
    with pytest.raises(ConfigError, match="no file matches 'c/\\*"):
        Jsonl(path="c/*.jsonl").files(env)
    with pytest.raises(ConfigError, match="does not exist") as caught:
        Jsonl(path="a/11.jsonl").files(env)
    assert "did you mean '1.jsonl'" in caught.value.remedy
    with pytest.raises(ConfigError, match=r"holds no \.parquet"):
        Parquet(path="a").files(env)


def test_files_elsewhere_of_one_name_stay_apart(env, tmp_path_factory):
    other = tmp_path_factory.mktemp("elsewhere")
    for name in ("x/data/d.jsonl", "y/data/d.jsonl"):
        (other / name).parent.mkdir(parents=True)
        (other / name).write_text(json.dumps({"text": name}) + "\n")
    found = list(Jsonl(path=[str(other / "x"), str(other / "y")]).records(env))
    assert sorted(r.source for r in found) == ["data/d.jsonl", "y/data/d.jsonl"]
    assert {r.raw["text"] for r in found} == {"x/data/d.jsonl", "y/data/d.jsonl"}


def test_a_dataset_saved_to_disk(env):
    import datasets

    data = datasets.Dataset.from_list([{"text": f"t{i}"} for i in range(4)])
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(env.base / "saved")
    assert rows(HfDataset(path="saved").records(env)) == [{"text": f"t{i}"} for i in range(4)]
    assert len(rows(HfDataset(path="saved", split="test").records(env))) == 1
    with pytest.raises(ConfigError, match="no split 'dev'"):
        list(HfDataset(path="saved", split="dev").records(env))


def test_a_hub_dataset_that_cannot_be_reached(env, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="neither a folder nor in the hub's local cache"):
        HfDataset(path="nobody/nothing").identity(env)
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert HfDataset(path="nobody/nothing", revision=commit).identity(env) == {"nobody/nothing": commit}


def test_the_standard_library_is_documented_and_the_same_in_every_process(env):
    records = list(PythonDocs().records(env))
    names = [r.meta["name"] for r in records]
    assert 2000 < len(records) < 4000
    assert len(set(names)) == len(names)
    assert {"json.dumps", "textwrap.dedent", "collections.OrderedDict", "os.getcwd"} <= set(names)
    dedent = records[names.index("textwrap.dedent")]
    assert dedent.raw["prompt"] == "What does `textwrap.dedent(text)` do in Python?"
    assert dedent.raw["completion"].startswith("Remove any common leading whitespace from every line in `text`.")
    assert dedent.group == "textwrap"
    assert not any(" at 0x" in r.raw["prompt"] + r.raw["completion"] for r in records)
    assert all(0 < len(r.raw["completion"]) <= 1200 for r in records)
    code = ("import hashlib; from pathlib import Path; from ftpipe.stages.base import Environment; from ftpipe.data.sources.python_docs import PythonDocs;"
            "found = list(PythonDocs(kinds=['function', 'class', 'method']).records(Environment(Path('.'), Path('.'), 't')));"
            "print(hashlib.sha256(repr(found).encode()).hexdigest())")
    hashes = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd, timeout=60,
                             env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HOME": home}).stdout
              for seed, home, cwd in (("1", "/tmp", env.base), ("2", "/", "/"))}
    assert len(hashes) == 1 and hashes != {""}


def test_a_sample_of_the_documentation_is_stable(env):
    everything = [r.raw for r in PythonDocs(kinds=["function", "class", "method"]).records(env)]
    small = [r.raw for r in PythonDocs(limit=100, seed=3).records(env)]
    large = [r.raw for r in PythonDocs(limit=200, seed=3).records(env)]
    assert len(small) == 100 and len(large) == 200
    assert all(r in large for r in small)
    assert small == [r for r in everything if r in small], "a sample keeps the order"
    assert small != [r.raw for r in PythonDocs(limit=100, seed=4).records(env)]
    with pytest.raises(DataError, match="limit is 99999, but only"):
        list(PythonDocs(limit=99999).records(env))
    with pytest.raises(ConfigError, match="no package 'pydantik'") as caught:
        PythonDocs(packages=["stdlib", "pydantik"]).identity(env)
    assert "did you mean 'pydantic'" in caught.value.remedy


@pytest.mark.parametrize("text, limit, short", [
    ("a b\n\nc d", 100, "a b\n\nc d"), ("a b\n\nc d", 8, "a b\n\nc d"), ("a b\n\nc d", 7, "a b"), ("line one\nline two", 10, "line one"),
    ("word another", 6, "word"), ("unbreakable", 4, "unbr"),
])
def test_long_answers_end_where_a_paragraph_does(text, limit, short):
    assert shorten(text, limit) == short


@pytest.mark.parametrize("size", [1, 7, 40, 64, 700])
def test_parts_of_a_file_hold_each_line_once_under_its_number(tmp_path, monkeypatch, size):
    """Whatever the parts: lines of all lengths, empty ones, Windows' line ends, broken ones, and no line feed at the end."""
    from ftpipe.data.sources import jsonl

    lines = [json.dumps({"text": "x" * (i * i % 90)}) for i in range(40)]
    lines[5], lines[9], lines[20] = "", '{"text": "cut', "  "
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines[:20]).encode() + b"\n" + "\n".join(lines[20:]).encode())
    env = Environment(tmp_path, tmp_path, "t")
    source = jsonl.Jsonl(path="a.jsonl")
    monkeypatch.setattr(jsonl, "PART", 10**9)
    whole = list(source.records(env))
    monkeypatch.setattr(jsonl, "PART", size)
    parts = source.parts(env)
    assert len(parts) > 1 and sum(p.size for p in parts) == (tmp_path / "a.jsonl").stat().st_size
    assert list(source.records(env)) == whole and len(whole) == 38 and whole[-1].line == 40
