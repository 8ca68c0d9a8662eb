"""Rejection sampling: what is kept, and why, on scripted answers; and the whole way with a model that learned to calculate."""

from __future__ import annotations

import json
import random

import pyarrow.parquet as pq
import pytest

from ftpipe.curate.synthesize._paths import distance, distinct
from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError
from tests.artifacts import chat, decisions, kept_ids, rows_artifact, run_step, text
from tests.curate.scripted import Scripted, taught
from tests.models.data import trained_adapter

SIX = "3 twos are <<2*3=6>>6\n#### 6"
SCRIPT = [
    SIX,                                                   # the gold path again: kept, gold's own path does not count
    "<<3+3=6>>6\n#### 6",
    "we add <<3 + 3 = 6>>6, so\n#### 6",                   # the same path, further from the others
    "<<3+3=7>>\n#### 6",                                   # a wrong calculation
    "<<3+4=7>>\n#### 7",                                   # a wrong number
    "#### 6",                                              # no calculation: the empty path
    None,                                                  # unfinished
    "without any sum: it must come to six, plainly, as I say\n#### 6.0",  # the empty path again, further
    "<<2+2=4>>4 <<4+2=6>>6\n#### 6", "<<4+2=6>>6 <<2+2=4>>4\n#### 6",  # other orders are other paths
    "", "no number", "<<3+3>>\n#### 6", SIX, SIX, SIX,
]


def script(adapter, conversation, n, seed):
    if conversation[-1]["content"].startswith("hard"):
        return "#### 1"
    return SCRIPT[(n + 8 * BLOCK.setdefault(seed, len(BLOCK))) % len(SCRIPT)]


BLOCK: dict[int, int] = {}


@pytest.fixture
def scripted(monkeypatch):
    BLOCK.clear()
    return Scripted(script).install(monkeypatch)


@pytest.fixture
def pool(tmp_path):
    rows = [chat("2*3?", SIX, group="g"), chat("hard", "#### 2"), text("plain"), chat("held?", "#### 6", split="heldout"),
            {"messages": [{"role": "user", "content": "unanswered"}]}]
    return rows_artifact(tmp_path, rows)


def sampled(tmp_path, pool, model, **settings):
    inputs = settings.pop("inputs", {})
    return run_step(tmp_path, pool, {"rejection_sampling": {"samples": 16, **settings}}, model=str(model), **inputs)


def new(made) -> list[dict]:
    return pq.read_table(made.file("rows.parquet")).to_pylist() if made.has("rows.parquet") else []


def test_right_answers_on_different_paths_are_added(tmp_path, pool, tiny_model, scripted):
    made = sampled(tmp_path, pool, tiny_model)
    rows = new(made)
    assert [r["messages"][-1]["content"] for r in rows] == [SCRIPT[2], SCRIPT[7], SCRIPT[8], SCRIPT[9]], "one says what the gold row says already"
    assert made.counts["made"] == 4 and made.counts["not_new"] == 1
    keys = [json.loads(r["meta"])["equations"] for r in rows]
    assert keys == ["3+3=6", "", "2+2=4|4+2=6", "4+2=6|2+2=4"]
    first = kept_ids(pool)[0]
    for row in rows:
        assert json.loads(row["meta"])["parents"] == [first] and row["group"] == "g" and row["messages"][0]["content"] == "2*3?"
    assert kept_ids(made) == kept_ids(pool) + [r["row_id"] for r in rows], "what was there stays, whether anything is added or not"
    assert all(v["kept"] for v in decisions(made).values())
    log = pq.read_table(made.file("generations.parquet")).to_pylist()
    verdicts = [r["verdict"] for r in sorted((r for r in log if r["row_id"] == first), key=lambda r: r["sample"])]
    assert verdicts == ["kept", "the path of another", "kept", "wrong", "wrong", "the path of another", "unfinished or empty", "kept", "kept", "kept",
                        "unfinished or empty", "wrong", "wrong", *["the path of another"] * 3]
    found = {r["row_id"]: r for r in pq.read_table(made.file("annotations.parquet")).to_pylist()}
    assert {k: v for k, v in found[first].items() if k != "row_id"} == {"sampled": 16, "correct": 10, "paths": 5}
    assert made.json("rejection_sampling.json")["solved"] == 1 and len(found) == 2


def test_more_samples_begin_with_the_fewer_and_never_leave_fewer_paths(tmp_path, pool, tiny_model, scripted):
    counts, asked = [], []
    for k in (1, 5, 24):
        made = sampled(tmp_path, pool, tiny_model, samples=k)
        log = [r["answer"] for r in pq.read_table(made.file("generations.parquet")).to_pylist() if r["row_id"] == kept_ids(pool)[0]]
        assert len(log) == k and log[: len(asked)] == asked
        asked = log
        counts.append(sum(r["paths"] for r in pq.read_table(made.file("annotations.parquet")).to_pylist()))
    assert counts == sorted(counts) and counts[0] == 1 < counts[-1]
    assert len(scripted.asked) == 2 * 24, "nothing was generated twice"


def test_a_pool_of_models_is_the_filter_on_all_their_answers(tmp_path, pool, tiny_model, monkeypatch):
    words = {"one": ["<<1+5=6>>\n#### 6", "<<2+4=6>>\n#### 6"], "two": ["<<2+4=6>> as we see\n#### 6", "<<5+1=6>>\n#### 6"]}
    adapters = {n: trained_adapter(tmp_path, tiny_model, [chat("q", f"a{n}")], steps=0 if n == "one" else 1, name=n) for n in words}
    folders = {adapters[n].file("adapter"): n for n in words}

    def says(adapter, conversation, n, seed):
        return words[folders[adapter]][n % 2] if conversation[0]["content"] == "2*3?" else "x"

    scripted = Scripted(says).install(monkeypatch)
    made = sampled(tmp_path, pool, tiny_model, samplers=["one", "two"], samples=2, inputs=adapters)
    texts = words["one"] + words["two"]
    keys = ["1+5=6", "2+4=6", "2+4=6", "5+1=6"]
    assert [r["messages"][-1]["content"] for r in new(made)] == [texts[i] for i in sorted(distinct(texts, keys))]
    assert [json.loads(r["meta"])["sampler"] for r in new(made)] == ["one", "two", "two"] and scripted.opened == 2
    with pytest.raises(ConfigError, match="makes no adapter"):
        sampled(tmp_path, pool, tiny_model, samplers=["rows"], inputs={"rows": pool})


def test_a_kill_loses_no_answer(tmp_path, pool, tiny_model, monkeypatch):
    BLOCK.clear()
    calls = []

    def dies(adapter, conversation, n, seed):
        calls.append(n)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return script(adapter, conversation, n, seed)

    Scripted(dies).install(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path, pool, tiny_model)
    again = Scripted(script).install(monkeypatch)
    resumed = sampled(tmp_path, pool, tiny_model)
    assert len(again.asked) == 2 * 16 - 16, "the two batches that were whole are known"
    BLOCK.clear()
    fresh = Scripted(script).install(monkeypatch)
    unbroken = sampled(tmp_path / "other", rows_artifact(tmp_path / "other", RowSet(pool).table(None).to_pylist()), tiny_model)
    assert len(fresh.asked) == 32
    assert [r["messages"] for r in new(resumed)] == [r["messages"] for r in new(unbroken)]
    assert resumed.manifest["files"]["generations.parquet"]["sha256"] == unbroken.manifest["files"]["generations.parquet"]["sha256"]


def test_another_checker_asks_for_nothing_again(tmp_path, pool, tiny_model, scripted):
    sampled(tmp_path, pool, tiny_model)
    before = len(scripted.asked)
    made = sampled(tmp_path, pool, tiny_model, checker={"regex": {"pattern": "#### ([0-9])"}}, distinct="text")
    assert len(scripted.asked) == before
    assert {r["messages"][-1]["content"] for r in new(made)} == {s for s in SCRIPT if s and "#### 6" in s and s != SIX}
    judged = sampled(tmp_path, pool, tiny_model, checker={"judge": {"yes": "#### 1"}}, samples=1)
    assert len(scripted.asked) == before + 2 and judged.json("rejection_sampling.json")["questions"] == 2, "the judge was asked, and nobody else"


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, last = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(last[j] + 1, row[-1] + 1, last[j - 1] + (x != y)))
    return row[-1]


def test_the_edit_distance_is_that_of_the_table():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ("".join(rng.choices("abc é", k=rng.randint(0, 90))) for _ in range(2))
        assert distance(a, b) == levenshtein(a, b), (a, b)
    assert distance("", "abc") == 3 and distance("abc", "") == 3 and distance("kitten", "sitting") == 3


def test_of_two_on_a_path_the_one_further_from_the_others_stays():
    """Written out for random texts: every arrival is compared with all that is kept then."""
    rng = random.Random(3)
    for _ in range(60):
        texts = ["".join(rng.choices("abcd", k=rng.randint(1, 8))) for _ in range(9)]
        keys = [rng.choice("xyz") for _ in texts]
        kept: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key in kept:
                others = [texts[j] for k, j in kept.items() if k != key]
                if sum(levenshtein(texts[i], o) for o in others) <= sum(levenshtein(texts[kept[key]], o) for o in others):
                    continue
            kept[key] = i
        assert sorted(distinct(texts, keys)) == sorted(kept.values())
    assert distinct(["aa", "bbbb"], ["x", "x"]) == [0], "without others nothing is further"


def test_the_whole_way_with_a_model_that_learned_a_right_and_a_wrong_sum(tmp_path, tiny_model):
    model = taught(tmp_path / "model", tiny_model, [chat("1+2?", "<<1+2=3>>3\n#### 3"), chat("2+2?", "<<2+2=5>>5\n#### 5")])
    pool = rows_artifact(tmp_path, [chat("1+2?", "three\n#### 3"), chat("2+2?", "four\n#### 4")])
    step = {"rejection_sampling": {"samples": 4, "max_new_tokens": 30, "temperature": 0.3}}
    one, two = (run_step(tmp_path, pool, step, model=str(model), seed=1) for _ in range(2))
    assert [r["messages"][-1]["content"] for r in new(one)] == ["<<1+2=3>>3\n#### 3"]
    assert [r["row_id"] for r in new(one)] == [r["row_id"] for r in new(two)]
    by = {r["row_id"]: r["correct"] for r in pq.read_table(one.file("annotations.parquet")).to_pylist()}
    assert by[kept_ids(pool)[0]] >= 2 and by[kept_ids(pool)[1]] == 0
