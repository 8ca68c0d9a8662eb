"""Near deduplication against brute force, and its cost on heavy buckets."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftpipe.curate.dedup import _bands, _greedy
from ftpipe.curate.shingles import Sets, mix, sets, tokens
from ftpipe.data.rows import rows_schema
from tests.artifacts import decisions, kept_ids, rows_artifact, run_step, text

WORDS = [f"w{i}" for i in range(2000)]


def grams(said: str, n: int = 5) -> frozenset:
    words = said.lower().split()
    return frozenset([tuple(words)] if 0 < len(words) < n else [tuple(words[i:i + n]) for i in range(len(words) - n + 1)])


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def planted(seed: int, clusters: int = 100, singles: int = 60) -> list[str]:
    """Families of texts with a few words changed, dropped or added, at similarities on both sides of the threshold, and unrelated texts."""
    rng = random.Random(seed)
    texts = []
    for _ in range(clusters):
        base = rng.choices(WORDS, k=rng.randint(30, 90))
        texts.append(" ".join(base))
        for _ in range(rng.randint(1, 4)):
            copy = list(base)
            for _ in range(rng.randint(0, 3)):
                at = rng.randrange(len(copy))
                action = rng.random()
                if action < 0.5:
                    copy[at] = rng.choice(WORDS)
                elif action < 0.75:
                    del copy[at]
                else:
                    copy.insert(at, rng.choice(WORDS))
            texts.append(" ".join(copy))
    texts += [" ".join(rng.choices(WORDS, k=rng.randint(8, 60))) for _ in range(singles)]
    texts += ["two words", "two  Words", "two words more", "one"]
    return sorted(set(texts), key=lambda t: rng.random())


def test_agrees_with_brute_force(tmp_path):
    chance, dropped, missed = [], 0, 0
    for seed in range(3):
        texts = planted(seed)
        source = rows_artifact(tmp_path, [text(t) for t in texts], name=f"rows{seed}")
        made = run_step(tmp_path, source, {"minhash": {"threshold": 0.8}})
        by_id = {row["row_id"]: grams(row["text"]) for row in pq.read_table(source.file("rows.parquet"), columns=["row_id", "text"]).to_pylist()}
        kept = set(kept_ids(made))
        for row, verdict in decisions(made).items():
            if not verdict["kept"]:  # precision 1: truly near a row that stays
                true = jaccard(by_id[row], by_id[verdict["keeper"]])
                assert verdict["keeper"] in kept and true >= 0.8 and verdict["score"] == pytest.approx(true, abs=1e-12)
                dropped += 1
        for a, b in itertools.combinations(by_id, 2):
            if (s := jaccard(by_id[a], by_id[b])) >= 0.8:
                chance.append(_bands.recall(s, 14, 8))
                missed += a in kept and b in kept
    p = np.array(chance)
    assert dropped > 100 and len(p) > 150
    # both rows of a near pair stay only if they share no band
    assert missed <= (1 - p).sum() + 3 * np.sqrt((p * (1 - p)).sum()), f"{missed} of {len(p)} near pairs were missed"


def test_recall_is_that_of_theory(tmp_path):
    """Pairs of exactly known similarity: the share found lies within three standard errors of 1 - (1 - s^r)^b."""
    rng = random.Random(5)
    n, texts = 600, []
    for i in range(n):  # 60 words have 56 shingles; one changed inside gives 51 / 61
        base = [f"p{i}x{k}" for k in range(60)]
        copy = list(base)
        copy[rng.randrange(5, 55)] = "changed"
        texts += [" ".join(base), " ".join(copy)]
    made = run_step(tmp_path, rows_artifact(tmp_path, [text(t) for t in texts]), {"minhash": {"threshold": 0.8, "bands": 6, "band_size": 8}})
    theory = _bands.recall(51 / 61, 6, 8)
    got = made.counts["dropped: near duplicate"] / n
    assert abs(got - theory) < 3 * np.sqrt(theory * (1 - theory) / n), (got, theory)


@pytest.mark.parametrize("threads", [1, 2])
def test_kept_set_does_not_depend_on_order_threads_or_shards(tmp_path, monkeypatch, threads):
    texts = planted(7)
    reference = set(kept_ids(run_step(tmp_path, rows_artifact(tmp_path, [text(t) for t in texts]), "minhash")))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(threads)))
    monkeypatch.setattr("ftpipe.curate.dedup.minhash.BATCH", 37)  # many small batches
    shuffled = random.Random(threads).sample(texts, len(texts))
    again = run_step(tmp_path, rows_artifact(tmp_path, [text(t) for t in shuffled]), "minhash")
    assert set(kept_ids(again)) == reference


def test_batches_do_not_change_the_index(tmp_path):
    texts = pa.array(planted(3))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    table = pa.table({"rank": np.arange(len(texts)), "text": texts})
    indices = [_bands.Index(f, len(texts), ngram=5, unit="words", bands=14, size=8) for f in (whole, parts)]
    one = indices[0].fill(table.to_batches())
    two = indices[1].fill(table.to_batches(max_chunksize=11)[::-1])
    assert (indices[0].keys == indices[1].keys).all()
    for i in range(len(texts)):
        a, b = (s.values[s.starts[i]:s.starts[i] + s.sizes[i]] for s in (one, two))
        assert (a == b).all()


def test_second_run_drops_nothing(tmp_path):
    texts = planted(11, clusters=150)
    first = run_step(tmp_path, rows_artifact(tmp_path, [text(t) for t in texts]), {"minhash": {"threshold": 0.6}})
    second = run_step(tmp_path, first, {"minhash": {"threshold": 0.6}})
    assert first.counts["rows_kept"] < len(texts)
    assert second.counts["rows_kept"] == second.counts["rows_in"] == first.counts["rows_kept"]


def test_a_chain_is_not_merged(tmp_path):
    """a ~ b ~ c but not a ~ c: at most b may go, for a and c are not near each other."""
    words = [f"c{i}" for i in range(60)]
    a, b, c = words[:], words[:], words[:]
    b[10], c[10], c[40] = "x", "x", "y"
    assert jaccard(grams(" ".join(a)), grams(" ".join(c))) < 0.8
    made = run_step(tmp_path, rows_artifact(tmp_path, [text(" ".join(t)) for t in (a, b, c)]), {"minhash": {"bands": 112, "band_size": 1}})
    lost = [v for v in decisions(made).values() if not v["kept"]]
    assert lost and all(v["score"] >= 0.8 for v in lost)
    assert made.counts["rows_kept"] in (1, 2)
    if made.counts["rows_kept"] == 1:
        assert lost[0]["keeper"] == lost[1]["keeper"]


def first_maximal_independent_set(n: int, pairs: set[tuple[int, int]]) -> set[int]:
    kept: set[int] = set()
    for i in range(n):
        if not any((k, i) in pairs for k in kept):
            kept.add(i)
    return kept


@pytest.mark.parametrize("in_memory", [0, 10**6])
def test_search_is_the_greedy_choice_on_the_graph_of_near_pairs(tmp_path, in_memory):
    """With every pair a candidate, the rounds come to what a plain loop over rows in order comes to, and drop the same rows."""
    for seed in range(3):
        rng = np.random.default_rng(seed)
        n = 80
        members = [np.unique(rng.choice(40, size=rng.integers(3, 9))).astype(np.uint64) for _ in range(n)]
        sizes = np.array([len(m) for m in members])
        shingles = Sets(np.concatenate(members), np.cumsum(sizes) - sizes, sizes)
        folder = tmp_path / str(seed)
        folder.mkdir()
        index = _bands.Index(folder, n, ngram=5, unit="words", bands=1, size=1)
        index.sizes[:] = sizes
        index.keys[:] = 7  # one bucket of all rows
        search = _greedy.Search(index, shingles, 0.4, leaders=n, scratch=folder, in_memory=in_memory)
        dropped, keeper, similarity = search.run()
        near = {(i, k) for i, k in itertools.combinations(range(n), 2) if jaccard(frozenset(members[i].tolist()), frozenset(members[k].tolist())) >= 0.4}
        kept = first_maximal_independent_set(n, near)
        assert set(range(n)) - set(dropped.tolist()) == kept
        assert 5 < len(dropped) < n - 5
        assert set(keeper.tolist()) <= kept and (similarity >= 0.4).all() and (keeper < dropped).all()
        assert search.compared < n * (n - 1) / 2


@pytest.mark.parametrize("in_memory", [0, 10**6])
def test_bucket_of_false_candidates_is_given_up(tmp_path, in_memory):
    n = 3000
    sizes = np.full(n, 4)
    shingles = Sets(np.arange(4 * n, dtype=np.uint64), np.arange(n) * 4, sizes)
    index = _bands.Index(tmp_path, n, ngram=5, unit="words", bands=1, size=1)
    index.sizes[:], index.keys[:] = sizes, 1
    search = _greedy.Search(index, shingles, 0.8, leaders=5, scratch=tmp_path, in_memory=in_memory)
    assert not len(search.run()[0])
    assert search.compared <= 5 * n and search.given_up > 0 and search.largest == [(0, n)]


def test_tables_and_arrays_come_to_the_same(tmp_path):
    """Many buckets and few leaders: rounds in DuckDB, on arrays, and a change from one to the other midway."""
    rng = np.random.default_rng(4)
    n, bands = 150, 5
    members = [np.unique(rng.choice(30, size=rng.integers(3, 9))).astype(np.uint64) for _ in range(n)]
    sizes = np.array([len(m) for m in members])
    index = _bands.Index(tmp_path, n, ngram=5, unit="words", bands=bands, size=1)
    index.sizes[:], index.keys[:] = sizes, rng.integers(0, 12, (bands, n)) + 100 * np.arange(bands)[:, None]
    results = []
    for in_memory in (0, 250, 10**6):
        search = _greedy.Search(index, Sets(np.concatenate(members), np.cumsum(sizes) - sizes, sizes), 0.3, leaders=3, scratch=tmp_path, in_memory=in_memory)
        results.append([a.tolist() for a in search.run()] + [search.compared, search.rounds, search.given_up, search.largest])
    assert results[0] == results[1] == results[2]
    assert len(results[0][0]) > 20 and results[0][-2] > 0


def test_the_best_row_of_a_group_stays(tmp_path):
    base = " ".join(WORDS[:50])
    source = rows_artifact(tmp_path, [text(base + f" end{i}") for i in range(6)], annotations={"quality": [3.0, 1.0, None, 9.0, 2.0, 5.0]})
    ids = kept_ids(source)
    assert kept_ids(run_step(tmp_path, source, {"minhash": {"prefer": "quality"}})) == [ids[3]]
    assert kept_ids(run_step(tmp_path, source, {"minhash": {"prefer": "quality", "prefer_smallest": True}})) == [ids[1]]


def test_short_rows_are_compared_exactly(tmp_path):
    source = rows_artifact(tmp_path, [text(t) for t in ("a b c", "A  b c", "a b", "a b d", "a b c d", "", "  ")])
    made = run_step(tmp_path, source, {"minhash": {"threshold": 0.1}})
    assert made.counts == {"rows_in": 7, "rows_kept": 6, "dropped: near duplicate": 1}


def test_characters_for_languages_without_spaces(tmp_path):
    said = "我们在这里写一段没有空格的文字用来检查近似重复的行是否能够被找到"
    source = rows_artifact(tmp_path, [text(said), text(said + "吧"), text(said[::-1])])
    assert run_step(tmp_path, source, "minhash").counts["rows_kept"] == 3
    assert run_step(tmp_path, source, {"minhash": {"unit": "characters", "ngram": 3}}).counts["rows_kept"] == 2


def test_solved_bands():
    assert _bands.solve(0.8, 112, 0.9) == (14, 8)
    for threshold in (0.3, 0.5, 0.7, 0.9, 1.0):
        bands, size = _bands.solve(threshold, 112, 0.9)
        assert bands * size <= 112 and _bands.recall(threshold, bands, size) >= 0.9


def test_hashes_are_pinned():
    """These values may never change: an index made by one version must mean the same to the next."""
    hashes, counts = tokens(pa.array(["Hello  wörld", "", "x"]), "words")
    assert counts.tolist() == [2, 0, 1]
    assert [hex(h) for h in hashes.tolist()] == PINNED["words"]
    assert hex(int(mix(np.array([1], np.uint64))[0])) == "0x5692161d100b05e5"
    values, sizes = sets(pa.array(["the quick brown fox jumps over the dog"]), 5)
    assert sizes.tolist() == [4] and [hex(v) for v in values.tolist()] == PINNED["shingles"]
    assert [hex(k) for k in _bands.keys(values, sizes, 2, 3)[:, 0].tolist()] == PINNED["bands"]


PINNED = {"words": ["0x7d34e501a8edb6a7", "0xa4bb7679e5711e2a", "0x4f586ef96743df4a"],
          "shingles": ["0x4154c87e5d59a", "0x55deb1d2bcb8a", "0x57d922db1d723", "0x612e04cc0668d"],
          "bands": ["0x2687cf4297cc9a31", "0x98b9c92158d6177a"]}


def many(tmp_path, texts: list[str]):
    """An artifact of many rows, past the Python loop of `rows_artifact`."""
    n = len(texts)
    same = {"content_id": "c", "format": "text", "group": "g", "source": "s", "split": "train", "meta": "{}"}
    columns = {"row_id": [f"{mix_int(i):016x}" for i in range(n)], "text": texts, "line": range(n)} | {k: [v] * n for k, v in same.items()}
    schema = rows_schema()
    table = pa.table({f.name: pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type) for f in schema})
    artifact = rows_artifact(tmp_path, [text("a")], name=f"many{n}{texts[0][:5]}")
    pq.write_table(table, artifact.path / "rows.parquet")
    return artifact


def mix_int(i: int) -> int:
    return i * 0x9E3779B97F4A7C15 % 2**64


def test_heavy_buckets_cost_no_more_than_other_rows(tmp_path):
    """100,000 equal and 100,000 nearly equal rows against 100,000 unrelated ones, in seconds of processor time."""
    n = 100_000
    base = [f"b{i}" for i in range(60)]

    def timed(texts: list[str]):
        source = many(tmp_path, texts)
        began = time.process_time()
        made = run_step(tmp_path, source, "minhash")
        return time.process_time() - began, made

    numbers = np.random.default_rng(0).integers(0, 30_000, (n, 60)).astype(str)
    distinct, made = timed([" ".join(line) for line in numbers])
    assert made.counts["rows_kept"] == n
    equal, made = timed([" ".join(base)] * n)
    assert made.counts["rows_kept"] == 1 and made.json("minhash.json")["compared"] == n - 1
    near, made = timed([" ".join([*base, f"tail{i}"]) for i in range(n)])
    assert made.counts["rows_kept"] == 1 and made.json("minhash.json")["compared"] < 2 * n
    assert equal < 4 * distinct + 2 and near < 4 * distinct + 2, (distinct, equal, near)
