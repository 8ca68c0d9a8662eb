"""Engines: what they are called, what they may not change, and what is said where one cannot be used."""

from __future__ import annotations

import json
import threading

import pytest

from ftpipe.cli.schema import pipeline_schema
from ftpipe.engines.local import Local
from ftpipe.engines.ray import Ray
from ftpipe.errors import ConfigError
from ftpipe.pipeline import spec
from ftpipe.pipeline.plan import plan
from ftpipe.pipeline.store import Store


def pipeline(tmp_path, **top):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)))
    stages = {"ingest": {"source": {"jsonl": {"path": "d.jsonl"}}, "heldout": {"share": 0}},
              "curated": {"kind": "curate", "rows": "ingest", "steps": ["exact_dedup", "personal_data"]}}
    return spec.build({"name": "t", "workspace": str(tmp_path / "ws"), "stages": stages, **top}, base=tmp_path)


def test_the_engine_is_read_from_the_file_and_is_no_part_of_a_key(tmp_path):
    plain, ray = pipeline(tmp_path), pipeline(tmp_path, engine={"ray": {"address": "ray://head:10001", "retries": 1}})
    assert plain.env.engine == Local() and ray.env.engine == Ray(address="ray://head:10001", retries=1)
    keys = [plan(p, Store(tmp_path / "ws"))[0].material for p in (plain, ray)]
    assert keys[0] == keys[1] and "engine" not in json.dumps(keys[0])
    with pytest.raises(ConfigError, match=r"did you mean 'ray'\?"):
        pipeline(tmp_path, engine={"rya": {}})
    assert "engine" in pipeline_schema()["properties"]


def test_without_ray_it_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("ftpipe.engines.ray.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Ray is not installed") as caught:
        pipeline(tmp_path, engine={"ray": {}}).check()
    assert caught.value.remedy.startswith("pip install 'ftpipe[ray]'")


@pytest.mark.parametrize("alone", [False, True])
def test_results_come_in_order_and_few_items_wait(alone):
    taken, most, lock = 0, 0, threading.Lock()

    def items():
        nonlocal taken
        for i in range(200):
            with lock:
                taken += 1
            yield i

    for done, result in enumerate(Local().map(lambda i, factor: i * factor, items(), common=(3,), alone=alone)):
        assert result == 3 * done
        most = max(most, taken - done)
    assert done == 199 and most < 70
