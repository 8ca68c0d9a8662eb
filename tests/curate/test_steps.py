"""Each curation method on planted data."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from ftpipe import slots
from ftpipe.curate.budget import Limit
from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from tests.artifacts import chat, decisions, kept_ids, rows_artifact, run_step, text

# exact deduplication


def test_exact_duplicates_after_normalisation(tmp_path):
    rows = [text(t) for t in ("Été à Paris", "E\u0301te\u0301 a\u0300 Paris", "Été \t\n à\u00a0Paris ", "été à paris", "Eté a Paris", "", " ")]
    source = rows_artifact(tmp_path, rows)
    made = run_step(tmp_path, source, "exact_dedup")
    assert made.counts == {"rows_in": 7, "rows_kept": 5, "dropped: exact duplicate": 2}
    ids = kept_ids(source)
    lost = {r: v["keeper"] for r, v in decisions(made).items() if not v["kept"]}
    assert set(lost.values()) == {min(ids[:3])} and set(lost) == set(ids[:3]) - {min(ids[:3])}
    assert run_step(tmp_path, source, {"exact_dedup": {"ignore_case": True}}).counts["rows_kept"] == 4
    assert run_step(tmp_path, source, {"exact_dedup": {"ignore_whitespace": False}}).counts["rows_kept"] == 6
    assert run_step(tmp_path, made, "exact_dedup").counts["rows_kept"] == 5


def test_exact_duplicates_tell_roles_turns_and_parts_apart(tmp_path):
    turns = [("user", "a"), ("assistant", "b")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in t]} for t in (turns, turns, [("user", "a b")], [("assistant", "a"), ("user", "b")],
                                                                              [("user", "a"), ("assistant", "c")], [("user", "z"), ("assistant", "b")])]
    source = rows_artifact(tmp_path, rows)
    assert run_step(tmp_path, source, "exact_dedup").counts["rows_kept"] == 5
    assert run_step(tmp_path, source, {"exact_dedup": {"part": "prompt"}}).counts["rows_kept"] == 4  # a, a b, b, z
    assert run_step(tmp_path, source, {"exact_dedup": {"part": "answer"}}).counts["rows_kept"] == 4  # b, none (stays), a, c


def test_exact_duplicates_of_pairs_of_answers(tmp_path):
    def pair(good: str, bad: str):
        return {"format": "preference", "messages": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}]}

    made = run_step(tmp_path, rows_artifact(tmp_path, [pair("x", "y"), pair("x", "y "), pair("y", "x")]), "exact_dedup")
    assert made.counts["rows_kept"] == 2


def test_texts_leave_tool_definitions_out_and_take_judged_answers_in():
    import pyarrow as pa

    from ftpipe.curate.text import exact_text, row_text
    from ftpipe.data.rows import rows_schema
    from ftpipe.tables import connect

    said = [("tools", "[{}]"), ("user", "q"), ("assistant", "a")]
    turns = [{"role": r, "content": c} for r, c in said]
    rows = [{"format": "messages", "messages": turns}, {"format": "messages", "messages": turns[1:]},
            {"format": "unpaired", "messages": turns[:2], "chosen": turns[2:]}, {"format": "unpaired", "messages": turns[:2], "rejected": turns[2:]}]
    table = pa.Table.from_pylist([{n: r.get(n) for n in rows_schema().names} for r in rows], schema=rows_schema())
    with connect() as con:
        con.register("rows", table)
        texts = {part: [" ".join(t.split()) for (t,) in con.sql(f"select {row_text(part)} from rows").fetchall()] for part in ("all", "prompt", "answer")}
        exact = [t for (t,) in con.sql(f"select {exact_text()} from rows").fetchall()]
    assert texts == {"all": ["q a"] * 4, "prompt": ["q"] * 4, "answer": ["a"] * 4}
    assert len(set(exact)) == 4, "the same question with other tools, and the same answer called otherwise, are other rows"


def test_the_preferred_exact_duplicate_stays(tmp_path):
    source = rows_artifact(tmp_path, [text("same"), text("same"), text("same ")], annotations={"quality": [1, 5, 3]})
    ids = kept_ids(source)
    assert kept_ids(run_step(tmp_path, source, {"exact_dedup": {"prefer": "quality"}})) == [ids[1]]
    with pytest.raises(DataError, match="annotates 'beauty'"):
        run_step(tmp_path, source, {"exact_dedup": {"prefer": "beauty"}})


# decontamination

LONG = "the returned iterator gives the items of the first sequence and then those of the second one until both of them have been used up"


def test_planted_contamination_is_found(tmp_path):
    question, short = "Which planet of the solar system has the largest number of known moons?", "Saturn has the most moons"
    held = [chat("What does chain do?", LONG, split="heldout"), chat(question, short, split="heldout")]
    words = LONG.split()
    planted = {
        "exact": chat("What does chain do?", LONG),
        "case, space and punctuation": chat("WHAT does  chain do", LONG.upper().replace(" ", " ,  ")),
        "one word changed": chat("What does chain do?", " ".join([*words[:12], "CHANGED", *words[13:]])),
        "answer only": chat("Describe something else entirely, please.", LONG),
        "inside a longer text": text("before it " + LONG + " after it"),
        "short, one word changed": chat(question.replace("largest", "biggest"), short),
        "short, whole in a longer text": text(f"Quiz: {question} {short}. That was easy, and now for something quite different from it all."),
    }
    clean = {
        "same question words": chat("What does chain do?", "it links things"),
        "twelve words in common": chat("Else?", " ".join(words[:11]) + " but other things follow it here"),
        "another topic": chat("Which river is the longest?", "The Nile"),
    }
    source = rows_artifact(tmp_path, [*held, *planted.values(), *clean.values()])
    verdicts = decisions(run_step(tmp_path, source, "decontaminate"))
    ids, held_ids = kept_ids(source), kept_ids(source, "heldout")
    names = dict(zip(ids, [*planted, *clean]))
    assert {names[r] for r, v in verdicts.items() if not v["kept"]} == set(planted)
    for row, verdict in verdicts.items():
        if not verdict["kept"]:
            assert verdict["keeper"] == held_ids[names[row].startswith("short")] and 0 < verdict["score"] <= 1
    strict = decisions(run_step(tmp_path, source, {"decontaminate": {"share": 0.9, "jaccard": 0.95}}))
    assert {names[r] for r, v in strict.items() if not v["kept"]} == {"exact", "case, space and punctuation", "short, whole in a longer text"}


def test_similarity_to_held_out_rows_agrees_with_brute_force(tmp_path):
    """Every train row at or above the threshold is found, and no other, whatever the index left out."""
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(60)]
    held = [rng.choices(vocabulary, k=rng.randint(2, 14)) for _ in range(60)]
    train = []
    for _ in range(400):
        words = list(rng.choice(held))
        for _ in range(rng.randint(0, 4)):
            words[rng.randrange(len(words))] = rng.choice(vocabulary)
        train.append(words)
    rows = [text(" ".join(w), split=s) for s, group in (("heldout", held), ("train", train)) for w in group]
    source = rows_artifact(tmp_path, rows)

    def pairs(words):
        return {tuple(words[i:i + 2]) for i in range(len(words) - 1)}

    made = decisions(run_step(tmp_path, source, {"decontaminate": {"ngram": 50, "shortest": 50, "jaccard": 0.6}}))
    table = RowSet(source).table()
    truth = {}
    for row, words in zip(table["row_id"].to_pylist(), train):
        truth[row] = max(len(pairs(words) & pairs(h)) / len(pairs(words) | pairs(h)) for h in held)
    assert {r for r, v in made.items() if not v["kept"]} == {r for r, s in truth.items() if s >= 0.6}
    for row, verdict in made.items():
        if not verdict["kept"]:
            assert verdict["score"] == pytest.approx(truth[row])
    assert 50 < sum(not v["kept"] for v in made.values()) < 350


def test_contamination_by_another_stage(tmp_path):
    bench = rows_artifact(tmp_path, [text(LONG)], name="bench")
    source = rows_artifact(tmp_path, [text("x " + LONG), text("quite another text")])
    with pytest.raises(DataError, match="nothing to keep clear of"):
        run_step(tmp_path, source, "decontaminate")
    made = run_step(tmp_path, source, {"decontaminate": {"against": ["bench"]}}, bench=bench)
    assert made.counts["rows_kept"] == 1
    assert next(v for v in decisions(made).values() if not v["kept"])["keeper"] == kept_ids(bench)[0]


def test_many_batches_of_contamination(tmp_path, monkeypatch):
    source = rows_artifact(tmp_path, [text(LONG, split="heldout"), *(text(f"row {i} " + (LONG if i % 3 == 0 else "is clean")) for i in range(50))])
    whole = decisions(run_step(tmp_path, source, "decontaminate"))
    monkeypatch.setattr("ftpipe.curate.filter.decontaminate.BATCH", 7)
    parts = decisions(run_step(tmp_path, source, "decontaminate"))
    assert {r: (v["kept"], v["score"]) for r, v in whole.items()} == {r: (v["kept"], v["score"]) for r, v in parts.items()}
    assert sum(not v["kept"] for v in whole.values()) == 17


# length


def test_length_bounds(tmp_path):
    source = rows_artifact(tmp_path, [text("a"), text("a b"), text("a  b \n c"), text("")], annotations={"tokens": [10, 20, 30, 40]})
    ids = kept_ids(source)
    assert kept_ids(run_step(tmp_path, source, {"length": {"least": 20, "most": 30}})) == ids[1:3]
    assert kept_ids(run_step(tmp_path, source, {"length": {"by": "words", "most": 2}})) == [ids[0], ids[1], ids[3]]
    made = run_step(tmp_path, source, {"length": {"by": "characters", "least": 3, "most": 4}})
    assert kept_ids(made) == [ids[1]]
    assert made.counts == {"rows_in": 4, "rows_kept": 1, "dropped: too short": 2, "dropped: too long": 1}
    assert [decisions(made)[r]["score"] for r in ids] == [1, 3, 5, 0]
    for wrong in ({}, {"least": 5, "most": 4}, {"by": "tokens"}):
        with pytest.raises((ValidationError, slots.InvalidMethod)):
            slots.parse("curate", {"length": wrong})
    with pytest.raises(DataError, match="annotates 'beauty'"):
        run_step(tmp_path, source, {"length": {"by": "beauty", "least": 1}})
    with pytest.raises(DataError, match="no row is left: 4 of the rows were dropped for 'too short'"):
        run_step(tmp_path, source, {"length": {"least": 1000}})


# budgets and selection


@pytest.fixture
def pool(tmp_path):
    rng = np.random.default_rng(1)
    n = 200
    return rows_artifact(tmp_path, [text(f"row {i}") for i in range(n)] + [text("held", split="heldout")],
                         annotations={"tokens": [*rng.integers(5, 200, n).tolist(), 10**6]}, name="pool")


def spent(pool, made) -> int:
    tokens = dict(zip(*RowSet(pool).annotation("tokens").to_pydict().values()))
    return sum(tokens[r] for r in kept_ids(made))


def test_budgets(tmp_path, pool):
    total = spent(pool, pool)
    for budget, amount in (({"tokens": 3000}, 3000), ({"share": 0.25}, int(total * 0.25)), ({"tokens": total}, total)):
        made = run_step(tmp_path, pool, {"random": {"budget": budget}})
        assert made.counts["budget_tokens"] == amount
        assert amount - 5 < spent(pool, made) <= amount and made.counts["used_tokens"] == spent(pool, made)
    assert run_step(tmp_path, pool, {"random": {"budget": {"rows": 7}}}).counts["rows_kept"] == 7
    assert run_step(tmp_path, pool, {"random": {"budget": {"share": 0.1, "unit": "rows"}}}).counts["rows_kept"] == 20
    chosen = run_step(tmp_path, pool, {"random": {"budget": {"tokens": 2345}}}, seed=1)
    control = run_step(tmp_path, pool, {"random": {"budget": {"like": "chosen"}}}, seed=2, chosen=chosen)
    assert abs(spent(pool, control) - spent(pool, chosen)) < 5 and set(kept_ids(control)) != set(kept_ids(chosen))
    with pytest.raises(DataError, match=f"larger than the data: there are {total:,} tokens in 200 train rows"):
        run_step(tmp_path, pool, {"random": {"budget": {"tokens": total + 1}}})
    with pytest.raises(DataError, match="there are 200 rows"):
        run_step(tmp_path, pool, {"random": {"budget": {"rows": 201}}})
    assert run_step(tmp_path, pool, {"random": {"budget": {"tokens": total + 1, "at_most": True}}}).counts["rows_kept"] == 200
    bare = rows_artifact(tmp_path, [text("a")])
    with pytest.raises(DataError, match="label_audit"):
        run_step(tmp_path, bare, {"random": {"budget": {"tokens": 1}}})
    for wrong in (None, {}, {"tokens": 1, "rows": 1}, {"share": 1.5}, {"tokens": 0}, {"tokns": 5}):
        with pytest.raises((ValidationError, slots.InvalidMethod)):
            slots.parse("curate", {"random": {"budget": wrong}})


def test_a_budget_too_small_for_any_row_is_an_error(tmp_path, pool):
    with pytest.raises(DataError, match="no row is left"):
        run_step(tmp_path, pool, {"random": {"budget": {"tokens": 1}}})


def test_filling_a_budget():
    def take(costs, amount):
        return Limit(amount, "tokens", 0, None).take(np.array(costs)).tolist()

    assert take([4, 4, 4], 9) == [0, 1]
    assert take([4, 10, 4, 3, 1], 9) == [0, 2, 4]  # 10 does not fit, and 3 does not after the second 4
    assert take([10, 2], 5) == [1] and take([10], 5) == [] and take([], 5) == []
    assert take([5, 5], 10) == [0, 1] and take([0, 0, 5], 5) == [0, 1, 2]
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs, amount = rng.integers(1, 50, 10_000), int(rng.integers(1, 200_000))
        got, left, expected = take(costs, amount), amount, []
        front = True
        for i, c in enumerate(costs.tolist()):
            if c <= left:
                expected.append(i)
                left -= c
            front = False
        assert got == expected and not front


def test_earlier_repetition_costs_its_tokens(tmp_path):
    source = rows_artifact(tmp_path, [text(f"row {i}", times=3) | {"times": 3} for i in range(10)], annotations={"tokens": [10] * 10})
    made = run_step(tmp_path, source, {"random": {"budget": {"tokens": 100}}})
    kept = pq.read_table(made.file("kept.parquet")).to_pylist()
    assert len(kept) == 3 and all(r["times"] == 3 for r in kept)


def test_random_is_uniform_and_nested(tmp_path, pool):
    few, more = (set(kept_ids(run_step(tmp_path, pool, {"random": {"budget": {"rows": n}}}))) for n in (20, 60))
    assert few < more
    counts = dict.fromkeys(kept_ids(pool), 0)
    from ftpipe.curate.draw import uniforms

    ids = RowSet(pool).table(columns=["row_id"])["row_id"]
    n = 400
    for seed in range(n):
        for i in np.argsort(uniforms(ids, seed, "random"))[:50]:
            counts[ids[int(i)].as_py()] += 1
    got = np.array(list(counts.values()))
    chi2 = ((got - n / 4) ** 2 / (n / 4)).sum() / (1 - 0.25)
    assert 130 < chi2 < 280  # 199 degrees of freedom, within four standard deviations
    assert uniforms(ids, 0, "random").min() >= 0 and uniforms(ids, 0, "random").max() < 1


def test_length_matched_control_has_the_lengths_of_the_selection(tmp_path, pool):
    tokens = dict(zip(*RowSet(pool).annotation("tokens").to_pydict().values()))
    longest = run_step(tmp_path, pool, {"length": {"least": 120}})
    plain = run_step(tmp_path, pool, {"random": {"budget": {"like": "sel"}}}, seed=1, sel=longest)
    half = run_step(tmp_path, longest, {"random": {"budget": {"share": 0.5}}})
    matched = run_step(tmp_path, pool, {"length_matched_random": {"budget": {"like": "sel"}, "bins": 6}}, seed=1, sel=half)
    lengths = [np.array([tokens[r] for r in kept_ids(a)]) for a in (half, plain, matched)]
    assert lengths[0].min() >= 120 > lengths[1].min() and lengths[2].min() >= lengths[0].min() and lengths[2].max() <= lengths[0].max()
    assert abs(lengths[0].mean() - lengths[2].mean()) < 5 < abs(lengths[0].mean() - lengths[1].mean())
    assert 0 <= lengths[0].sum() - lengths[2].sum() < 125
    for line in matched.json("length_matched_random.json")["bins"]:
        assert abs(line["tokens"] - line["wanted_tokens"]) < 2 * 196 and abs(line["rows"] - line["wanted_rows"]) <= 2
    with pytest.raises((ValidationError, slots.InvalidMethod), match="like"):
        slots.parse("curate", {"length_matched_random": {"budget": {"tokens": 5}}})


# mixing, order, synthesis


def shown(made) -> dict[str, int]:
    totals: dict[str, int] = {}
    for row in RowSet(made).table(columns=["source", "times"]).to_pylist():
        totals[row["source"]] = totals.get(row["source"], 0) + row["times"]
    return totals


@pytest.fixture
def sources(tmp_path):
    return rows_artifact(tmp_path, [text(f"{s}{i}", source=s) for s, n in (("big", 80), ("mid", 16), ("tiny", 4)) for i in range(n)])


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, {"big": 80, "mid": 16, "tiny": 4}),
    ({"temperature": 2.0}, {"big": 60, "mid": 27, "tiny": 13}),  # roots of n: 8.94, 4, 2 of 14.94
    ({"temperature": 10000.0}, {"big": 34, "mid": 33, "tiny": 33}),
    ({"cap": 16}, {"big": 45, "mid": 44, "tiny": 11}),
    ({"cap": 16, "total": 0.36}, {"big": 16, "mid": 16, "tiny": 4}),
    ({"weights": {"tiny": 5.0, "big": 0.5}}, {"big": 53, "mid": 21, "tiny": 26}),  # 40, 16, 20 of 76
    ({"weights": {"big": 0}}, {"mid": 80, "tiny": 20}),
    ({"total": 2.5}, {"big": 200, "mid": 40, "tiny": 10}),
])
def test_mixture_by_largest_remainder(tmp_path, sources, settings, expected):
    made = run_step(tmp_path, sources, {"temperature": settings})
    assert shown(made) == expected
    each = pq.read_table(made.file("kept.parquet")).to_pylist()
    source = {r["row_id"]: r["source"] for r in RowSet(sources).table(columns=["row_id", "source"]).to_pylist()}
    for name, rows in itertools.groupby(sorted(each, key=lambda r: source[r["row_id"]]), key=lambda r: source[r["row_id"]]):
        times = [r["times"] for r in rows]
        assert max(times) - min(times) <= 1, name


def test_mixture_of_an_unknown_source(tmp_path, sources):
    with pytest.raises(DataError, match="'smal'"):
        run_step(tmp_path, sources, {"temperature": {"weights": {"smal": 2}}})


def test_times_and_order_survive_later_steps(tmp_path):
    source = rows_artifact(tmp_path, [text(f"row {i}") for i in range(10)] + [text("held", split="heldout")],
                           annotations={"tokens": [5, 3, 8, 1, 9, 2, 7, 4, 6, 0, 100]})
    ids = kept_ids(source)
    ordered = run_step(tmp_path, source, {"by_annotation": {"column": "tokens"}})
    assert kept_ids(ordered) == [ids[i] for i in (9, 3, 5, 1, 7, 0, 8, 6, 2, 4)]
    doubled = run_step(tmp_path, ordered, {"temperature": {"total": 2}})
    again = run_step(tmp_path, doubled, {"temperature": {"total": 1.5}})
    few = run_step(tmp_path, again, {"length": {"least": 2, "most": 8}})
    assert kept_ids(few) == [ids[i] for i in (5, 1, 7, 0, 8, 6, 2)]
    table = RowSet(few).table()
    assert set(table["times"].to_pylist()) <= {2, 4} and {r["times"] for r in RowSet(again).table().to_pylist()} == {2, 4}
    assert sum(RowSet(again).table()["times"].to_pylist()) == 30
    assert kept_ids(few, "heldout") == kept_ids(source, "heldout")


def test_curriculum_is_stable_and_puts_unknown_last(tmp_path):
    source = rows_artifact(tmp_path, [text(f"row {i}") for i in range(6)], annotations={"loss": [2.0, None, 1.0, 2.0, float("inf"), 1.0]})
    ids = kept_ids(source)
    assert kept_ids(run_step(tmp_path, source, {"by_annotation": {"column": "loss"}})) == [ids[i] for i in (2, 5, 0, 3, 4, 1)]
    assert kept_ids(run_step(tmp_path, source, {"by_annotation": {"column": "loss", "descending": True}})) == [ids[i] for i in (4, 0, 3, 2, 5, 1)]


def test_shuffle_depends_on_the_seed_alone(tmp_path, pool):
    one, two = (kept_ids(run_step(tmp_path, pool, "shuffle", seed=s)) for s in (1, 2))
    assert sorted(one) == sorted(two) and one != two and one != kept_ids(pool)
    few = run_step(tmp_path, pool, {"random": {"budget": {"rows": 50}}})
    left = set(kept_ids(few))
    assert kept_ids(run_step(tmp_path, few, "shuffle", seed=1)) == [r for r in one if r in left]


def test_variants_keep_their_parents(tmp_path):
    rows = [chat(f"Q{i}?", f"A{i}", group=f"g{i}") for i in range(5)] + [chat("Say: Q0?", "A0"), text("plain"), chat("held?", "h", split="heldout")]
    source = rows_artifact(tmp_path, rows)
    step = {"instruction_variants": {"templates": ["Say: {prompt}", "{prompt} Go."], "per_row": 2}}
    made = run_step(tmp_path, source, step)
    new = {r["row_id"]: r for r in pq.read_table(made.file("rows.parquet")).to_pylist()}
    links = pq.read_table(made.file("parents.parquet")).to_pylist()
    old = {r["row_id"]: r for r in RowSet(source).table().to_pylist()}
    assert made.counts["made"] == len(new) == len(links) == 11 and made.counts["not_new"] == 1  # "Say: Q0?" was there
    for link in links:
        child, parent = new[link["row_id"]], old[link["parent"]]
        assert parent["messages"][0]["content"] in child["messages"][0]["content"] and child["messages"][1:] == parent["messages"][1:]
        assert child["group"] == parent["group"] and json.loads(child["meta"])["parents"] == [link["parent"]]
    assert kept_ids(made)[:7] == kept_ids(source) and set(kept_ids(made)[7:]) == set(new)
    again = run_step(tmp_path, made, {"exact_dedup": {"part": "answer"}})
    assert again.counts["rows_in"] == 18 and RowSet(again).table()["messages"].null_count == 1
    for wrong in (["no slot"], ["{prompt} {prompt}"], [], ["{prompt}", "{prompt}"]):
        with pytest.raises((ValidationError, slots.InvalidMethod)):
            slots.parse("curate", {"instruction_variants": {"templates": wrong}})
