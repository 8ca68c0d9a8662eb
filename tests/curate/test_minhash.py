"""Near deduplication against brute force, and its cost on heavy buckets."""

from __future__ import annotations

import itertools
import logging
import random
import time

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from ftpipe import slots
from ftpipe.curate.dedup import _bands, _greedy
from ftpipe.curate.shingles import FACTOR, Sets, mix, sets, tokens
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet, rows_schema
from ftpipe.stages.base import Environment, Listener
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
        kept, shape = set(kept_ids(made)), [made.json("minhash.json")[k] for k in ("bands", "band_size")]
        for row, verdict in decisions(made).items():
            if not verdict["kept"]:  # precision 1: truly near a row that stays
                true = jaccard(by_id[row], by_id[verdict["keeper"]])
                assert verdict["keeper"] in kept and true >= 0.8 and verdict["score"] == pytest.approx(true, abs=1e-12)
                dropped += 1
        for a, b in itertools.combinations(by_id, 2):
            if (s := jaccard(by_id[a], by_id[b])) >= 0.8:
                chance.append(_bands.recall(s, *shape))
                missed += a in kept and b in kept
    p = np.array(chance)
    assert dropped > 100 and len(p) > 150
    # both rows of a near pair stay only if they share no band
    assert 1 - missed / len(p) >= 0.97
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
    assert (indices[0].whole == indices[1].whole).all()
    everyone = np.ones(len(texts), bool)
    a, b = ([(bucket.tolist(), row.tolist()) for bucket, row in i.buckets(everyone)] for i in indices)
    assert a == b and len(a) == 14 and sum(len(bucket) for bucket, _ in a) > 100
    for i in range(len(texts)):
        a, b = (s.values[s.starts[i]:s.starts[i] + s.sizes[i]] for s in (one, two))
        assert (a == b).all()


def test_second_run_drops_nothing(tmp_path):
    texts = planted(11, clusters=150)
    first = run_step(tmp_path, rows_artifact(tmp_path, [text(t) for t in texts]), {"minhash": {"threshold": 0.6}})
    second = run_step(tmp_path, first, {"minhash": {"threshold": 0.6}})
    assert first.counts["rows_kept"] < len(texts)
    assert second.counts["rows_kept"] == second.counts["rows_in"] == first.counts["rows_kept"]


def test_a_killed_search_does_not_sign_the_rows_again(tmp_path, monkeypatch):
    source = rows_artifact(tmp_path, [text(t) for t in planted(9, clusters=20)])
    whole = run_step(tmp_path, source, "minhash")
    out, work = tmp_path / "killed-out", tmp_path / "killed-work"
    out.mkdir(), work.mkdir()
    ctx = StepContext(name="s", key="k", out=out, work=work, inputs={}, env=Environment(tmp_path, tmp_path, ""), log=logging.getLogger("test"),
                      listener=Listener(), method="minhash")
    step = slots.find("curate", "minhash")()
    with monkeypatch.context() as patch:
        patch.setattr(_greedy.Search, "_round", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step.duplicates(RowSet(source), ctx)
    monkeypatch.setattr(_bands.Index, "fill", None)
    found = step.duplicates(RowSet(source), ctx)
    lost = {row: v["keeper"] for row, v in decisions(whole).items() if not v["kept"]}
    assert dict(zip(found["row_id"].to_pylist(), found["keeper"].to_pylist())) == lost and len(lost) > 10
    assert not list(work.iterdir())


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


def search(folder, members: list, keys, threshold: float, *, leaders: int, fixed: int = 0) -> _greedy.Search:
    """A search among rows with the shingles `members`, whose band keys are the lines of `keys`."""
    folder.mkdir(exist_ok=True)
    keys, sizes = np.atleast_2d(keys).astype(np.uint64), np.array([len(m) for m in members])
    index = _bands.Index(folder, len(members), ngram=5, unit="words", bands=len(keys), size=1)
    index.sizes[:], index.arrived = sizes, np.arange(len(members))
    numbers: dict[bytes, int] = {}
    index.whole[:] = [numbers.setdefault(np.asarray(m).tobytes(), len(numbers)) for m in members]
    for band, line in enumerate(keys):
        line.tofile(folder / f"band-{band}")
    shingles = Sets(np.concatenate(members).astype(np.uint64), np.cumsum(sizes) - sizes, sizes)
    return _greedy.Search(index, shingles, threshold, leaders, folder, fixed=fixed)


def drawn(seed: int, n: int, of: int) -> list:
    rng = np.random.default_rng(seed)
    return [np.unique(rng.choice(of, size=rng.integers(3, 9))) for _ in range(n)]


@pytest.mark.parametrize("fixed", [0, 15])
def test_search_is_the_greedy_choice_on_the_graph_of_near_pairs(tmp_path, fixed):
    """With every pair a candidate, the rounds come to what a plain loop over rows in order comes to, and drop the same rows; fixed ones all stay."""
    for seed in range(3):
        n, members = 80, drawn(seed, 80, 40)
        looking = search(tmp_path / str(seed), members, [7] * n, 0.4, leaders=n, fixed=fixed)
        dropped, keeper, similarity = looking.run()
        sets_ = [frozenset(m.tolist()) for m in members]
        near = {(i, k) for i, k in itertools.combinations(range(n), 2) if jaccard(sets_[i], sets_[k]) >= 0.4}
        kept = set(range(fixed))
        for i in range(fixed, n):
            if not any((k, i) in near for k in kept):
                kept.add(i)
        assert set(range(n)) - set(dropped.tolist()) == kept
        assert 5 < len(dropped) < n - 5
        assert set(keeper.tolist()) <= kept and (keeper < dropped).all()
        assert similarity.tolist() == [jaccard(sets_[i], sets_[k]) for i, k in zip(dropped, keeper)] and (similarity >= 0.4).all()
        assert looking.compared < n * (n - 1) / 2


def test_bucket_of_false_candidates_is_given_up(tmp_path):
    n = 3000
    looking = search(tmp_path, [np.arange(4 * i, 4 * i + 4) for i in range(n)], [1] * n, 0.8, leaders=5)
    assert not len(looking.run()[0])
    assert looking.compared <= 5 * n and looking.given_up > 0 and looking.largest == [(0, n)]


def test_parts_do_not_change_the_search(tmp_path, monkeypatch):
    """Many buckets, few leaders, some equal rows: all in one part, and in parts of a few lines, on each of the ways to disk."""
    members, keys = drawn(4, 150, 30), np.random.default_rng(4).integers(0, 12, (5, 150)) + 100 * np.arange(5)[:, None]
    members[140:], keys[:, 140:] = members[:10], keys[:, :10]
    results = []
    for lines, rows in ((2**22, 2**24), (20, 2**24), (2**22, 40), (20, 40)):
        monkeypatch.setattr(_greedy, "AT_ONCE", lines)
        monkeypatch.setattr(_bands, "AT_ONCE", rows)
        looking = search(tmp_path / f"{lines}-{rows}", members, keys, 0.3, leaders=3, fixed=4)
        results.append([a.tolist() for a in looking.run()] + [looking.rounds, looking.given_up, looking.largest, looking.equal])
    assert results[0] == results[1] == results[2] == results[3]
    assert len(results[0][0]) > 20 and results[0][-3] > 0 and results[0][-1] > 0


def test_the_best_row_of_a_group_stays(tmp_path):
    base = " ".join(WORDS[:50])
    source = rows_artifact(tmp_path, [text(base + f" end{i}") for i in range(6)], annotations={"quality": [3.0, 1.0, None, 9.0, 2.0, 5.0]})
    ids = kept_ids(source)
    assert kept_ids(run_step(tmp_path, source, {"minhash": {"prefer": "quality"}})) == [ids[3]]
    assert kept_ids(run_step(tmp_path, source, {"minhash": {"prefer": "quality", "prefer_smallest": True}})) == [ids[1]]


@pytest.mark.parametrize("method", ["minhash", "exact_dedup"])
def test_the_longest_row_of_a_group_stays(tmp_path, method):
    """One row of each group stays, the longest, ties by id; groups over two files and sources count as one, other rows keep their bytes."""
    base = " ".join(WORDS[:60])
    longer = [base.replace(" ", " " * k) for k in (1, 3, 2)]
    rows = [text(t, source=f"s{i % 2}.jsonl") for i, t in enumerate([*longer, "one of a kind", "Another  one", longer[1]])]
    source = rows_artifact(tmp_path, rows)
    ids = kept_ids(source)
    made = run_step(tmp_path, source, {method: {"prefer": "characters"}})
    assert kept_ids(made) == [min(ids[1], ids[5]), ids[3], ids[4]]
    assert kept_ids(run_step(tmp_path, made, {method: {"prefer": "characters"}})) == kept_ids(made)
    assert not made.has("rows.parquet")


@pytest.mark.parametrize("method", ["minhash", "exact_dedup"])
def test_held_out_rows_and_those_of_other_stages_are_kept_clear_of(tmp_path, method):
    said = [" ".join(f"{name}{i}" for i in range(60)) for name in ("held", "bench", "own", "free")]
    bench = rows_artifact(tmp_path, [text(said[1]), text(said[1] + " "), text("unlike any other")], name="bench")
    own = [said[0], said[0] + " ", said[1], said[2], said[2] + " ", said[3]]
    source = rows_artifact(tmp_path, [text(said[0], split="heldout"), *(text(t) for t in own)])
    ids = kept_ids(source)
    alone = run_step(tmp_path, source, method)
    assert alone.counts["rows_kept"] == 4  # one of each kind
    made = run_step(tmp_path, source, {method: {"heldout": True, "against": ["bench"]}}, bench=bench)
    assert set(kept_ids(made)) == {ids[5], min(ids[3:5])} and kept_ids(made, "heldout") == kept_ids(source, "heldout")
    lost = {row: v for row, v in decisions(made).items() if not v["kept"]}
    of = {"minhash": "near duplicate", "exact_dedup": "exact duplicate"}[method]
    assert {v["reason"] for v in lost.values()} == {of, f"{of} of a held-out row", f"{of} of a row of bench"}
    assert lost[ids[0]]["keeper"] == lost[ids[1]]["keeper"] == kept_ids(source, "heldout")[0] and lost[ids[2]]["keeper"] in kept_ids(bench)


def test_short_rows_are_compared_exactly(tmp_path):
    source = rows_artifact(tmp_path, [text(t) for t in ("a b c", "A  b c", "a b", "a b d", "a b c d", "", "  ")])
    made = run_step(tmp_path, source, {"minhash": {"threshold": 0.1}})
    assert made.counts == {"rows_in": 7, "rows_kept": 6, "dropped: near duplicate": 1}


def test_characters_for_languages_without_spaces(tmp_path):
    said = "我们在这里写一段没有空格的文字用来检查近似重复的行是否能够被找到"
    source = rows_artifact(tmp_path, [text(said), text(said + "吧"), text(said[::-1])])
    assert run_step(tmp_path, source, "minhash").counts["rows_kept"] == 3
    assert run_step(tmp_path, source, {"minhash": {"unit": "characters", "ngram": 3}}).counts["rows_kept"] == 2


def test_words_are_those_of_python():
    """The same words as `str.split`, whatever stands beside a text in its batch, and a hash for each that depends on it alone."""
    rng = random.Random(1)
    spaces = [chr(c) for c in range(0x3100) if chr(c).isspace()]
    parts = ["a", "bc", "x" * 7, "y" * 8, "z" * 9, "long" * 16, "longer" * 40, "wörld", "日本語", "ẞ", "é" * 40, "\0", "a\0", "😀", *spaces]
    texts = ["".join(rng.choices(parts, k=rng.randint(0, 12))) for _ in range(600)] + ["", " ", "a b", "b"]
    seen: dict[str, int] = {}
    for batch in (texts, [t for t in texts if t.isascii()], *([t] for t in texts[:50])):
        hashes, counts = tokens(pa.array(batch, pa.string()), "words")
        lower = pc.utf8_lower(pa.array(batch, pa.string())).to_pylist()
        words = [t.split() for t in lower]
        assert counts.tolist() == [len(w) for w in words]
        for word, value in zip(itertools.chain(*words), hashes.tolist()):
            assert seen.setdefault(word, value) == value
    assert len(set(seen.values())) == len(seen) > 100
    sliced = pa.array(["no", *texts], pa.large_string())[1:]
    assert (tokens(sliced, "words")[0] == tokens(pa.array(texts), "words")[0]).all()


def test_bands_are_those_of_plain_minima():
    texts = pa.array([*planted(2, clusters=5, singles=3), " ".join(f"w{i}" for i in range(5000))])
    values, sizes = sets(texts, 5)
    a, b = _bands.constants(6)
    found = _bands.keys(values, sizes, 2, 3)
    at = 0
    for row, size in enumerate(sizes.tolist()):
        x = [v >> 19 for v in values[at:at + size].tolist()]
        least = [min((v * int(p) + int(q)) % 2**32 for v in x) for p, q in zip(a, b)]
        for band in range(2):
            key = band
            for value in least[3 * band:3 * band + 3]:
                key = (key * FACTOR + value) % 2**64
            assert int(found[band, row]) == int(mix(np.array([key], np.uint64))[0])
        at += size


def test_solved_bands():
    assert _bands.solve(0.8, 112, 0.9) == (14, 8)
    for threshold in (0.3, 0.5, 0.7, 0.9, 1.0):
        bands, size = _bands.solve(threshold, 112, 0.9)
        assert bands * size <= 112 and _bands.recall(threshold, bands, size) >= 0.9


def test_hashes_are_pinned():
    """The same on every machine and with every version of the libraries."""
    hashes, counts = tokens(pa.array(["Hello  wörld", "", "x"]), "words")
    assert counts.tolist() == [2, 0, 1]
    assert [hex(h) for h in hashes.tolist()] == PINNED["words"]
    assert hex(int(mix(np.array([1], np.uint64))[0])) == "0x5692161d100b05e5"
    values, sizes = sets(pa.array(["the quick brown fox jumps over the dog"]), 5)
    assert sizes.tolist() == [4] and [hex(v) for v in values.tolist()] == PINNED["shingles"]
    assert [hex(k) for k in _bands.keys(values, sizes, 2, 3)[:, 0].tolist()] == PINNED["bands"]


PINNED = {"words": ["0xa3f94fec990eb70e", "0xd93379b674183625", "0x3d9b64451af7f223"],
          "shingles": ["0xfc408671d4dd", "0x2b99fc2e9312f", "0x636c770f946ec", "0x6c484d36ffea6"],
          "bands": ["0x278549c80b087b09", "0x98b69a23bd3a2f09"]}


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
    """Equal rows and nearly equal ones against as many unrelated ones, in seconds of processor time."""
    n = 30_000
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
    assert made.counts["rows_kept"] == 1 and made.json("minhash.json")["equal"] == n - 1
    near, made = timed([" ".join([*base, f"tail{i}"]) for i in range(n)])
    assert made.counts["rows_kept"] == 1 and made.json("minhash.json")["compared"] < 2 * n
    assert equal < 4 * distinct + 2 and near < 4 * distinct + 2, (distinct, equal, near)
