"""What every source must do: yield rows with their origin, the same ones each time, and know its content from its dates."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftpipe.errors import FtpipeError
from ftpipe.slots import parse, slots
from ftpipe.stages.base import Environment

ROWS = [{"prompt": f"q{i}", "completion": f"a{i}", "group": "g"} for i in range(5)]


def write_jsonl(base: Path, rows: list[dict]) -> dict:
    (base / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"path": "d.jsonl"}


def write_json(base: Path, rows: list[dict]) -> dict:
    (base / "d.json").write_text(json.dumps(rows))
    return {"path": "d.json"}


def write_csv(base: Path, rows: list[dict]) -> dict:
    (base / "d.csv").write_text("prompt,completion,group\n" + "".join(f"{r['prompt']},{r['completion']},{r['group']}\n" for r in rows))
    return {"path": "d.csv"}


def write_parquet(base: Path, rows: list[dict]) -> dict:
    pq.write_table(pa.Table.from_pylist(rows), base / "d.parquet")
    return {"path": "d.parquet"}


def write_text(base: Path, rows: list[dict]) -> dict:
    (base / "d.txt").write_text("\n\n".join(r["prompt"] for r in rows))
    return {"path": "d.txt"}


def write_folder(base: Path, rows: list[dict]) -> dict:
    (base / "set").mkdir(exist_ok=True)
    (base / "set" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"path": "set"}


def write_package(base: Path, rows: list[dict]) -> dict:
    name = f"planted_{abs(hash(str(base))) % 10**8}"
    code = "".join(f'def f_{r["prompt"]}(x: int = 1):\n    """Return {r["completion"]}, which nobody else would ever return here."""\n\n' for r in rows)
    (base / name).mkdir(exist_ok=True)
    (base / name / "__init__.py").write_text(code)
    if str(base) not in sys.path:
        sys.path.insert(0, str(base))
    sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return {"packages": [name]}


INPUTS: dict[str, Callable[[Path, list[dict]], dict]] = {
    "jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet, "text": write_text, "hf_dataset": write_folder,
    "python_docs": write_package,
}
NAMES = slots()["data/sources"].files()


@pytest.fixture()
def env(tmp_path):
    yield Environment(workspace=tmp_path / "ws", base=tmp_path, pipeline="t")
    sys.path[:] = [p for p in sys.path if p != str(tmp_path)]


def source(name: str, fields: dict):
    return parse("data/sources", {name: fields})


def age(base: Path, by: float) -> None:
    """Move every file's date back."""
    for path in base.rglob("*"):
        if path.is_file() and "ws" not in path.parts:
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - by))


def test_every_source_has_an_input_here():
    assert set(NAMES) == set(INPUTS), "give a new source a small input in INPUTS"


@pytest.mark.parametrize("name", NAMES)
def test_rows_carry_their_origin_and_nothing_of_this_machine(name, env):
    records = list(source(name, INPUTS[name](env.base, ROWS)).records(env))
    assert len(records) == len(ROWS)
    assert all(r.error is None and r.raw and r.line >= 1 for r in records)
    assert len({(r.source, r.line) for r in records}) == len(records)
    assert all(str(env.base) not in r.source for r in records)
    text = json.dumps([r.raw for r in records])
    assert all(row["completion" if name == "python_docs" else "prompt"] in text for row in ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_rows_come_the_same_each_time(name, env):
    fields = INPUTS[name](env.base, ROWS)
    assert list(source(name, fields).records(env)) == list(source(name, fields).records(env))


@pytest.mark.parametrize("name", NAMES)
def test_identity_follows_content_and_not_dates(name, env):
    found = source(name, INPUTS[name](env.base, ROWS))
    age(env.base, 100)
    before = found.identity(env)
    assert before and found.identity(env) == before
    age(env.base, 1000)
    assert found.identity(env) == before
    changed = [*ROWS[:2], {**ROWS[2], "prompt": "Q2"}, *ROWS[3:]]  # as many bytes as before
    found = source(name, INPUTS[name](env.base, changed))
    age(env.base, 500)
    assert found.identity(env) != before


@pytest.mark.parametrize("name", [n for n in NAMES if n != "python_docs"])
def test_what_does_not_exist_or_is_empty_is_named_before_any_work(name, env):
    with pytest.raises(FtpipeError, match="not/here"):
        source(name, {"path": "./not/here"}).identity(env)
    (env.base / "empty").mkdir()
    (env.base / "empty" / f"train.{ {'hf_dataset': 'jsonl', 'text': 'txt'}.get(name, name) }").touch()
    with pytest.raises(FtpipeError, match=r"empty|no data") as caught:
        source(name, {"path": "empty"}).identity(env)
    assert "empty" in caught.value.where
