"""Sentences that stand in many rows."""

from __future__ import annotations

import json
import random

import pyarrow.parquet as pq
import pytest

from ftpipe.curate.dedup.sentences import PIECES, without
from ftpipe.data.rows import RowSet
from tests.artifacts import chat, decisions, kept_ids, rows_artifact, run_step, text

COMMON = "Sign up for our weekly letter today!"
RARE = "All rights are reserved by nobody at all."


def own(i: int, k: int = 0) -> str:
    return f"This is sentence number{i}x{k} and word{i * 7 + k} stands in it with other{i * 13 + k}."


def contents(artifact) -> dict[str, str]:
    return dict(zip(*RowSet(artifact).table("train", ["row_id", "text"]).to_pydict().values()))


def test_a_sentence_above_the_limit_goes_and_one_at_it_stays(tmp_path):
    rows = [f"{own(i)} {COMMON if i % 2 else COMMON.upper()}\n\n{own(i, 1)}" for i in range(6)]
    rows += [f"{own(10 + i)} {RARE} {own(10 + i, 1)}" for i in range(5)] + [f"  {own(20)}  {own(20)} ", "Too short. " * 9]
    source = rows_artifact(tmp_path, [text(t) for t in rows])
    before = kept_ids(source)
    made = run_step(tmp_path, source, {"sentences": {"most": 5}})
    verdicts = decisions(made)
    after = contents(made)
    assert [after.get(row) for row in before[6:]] == rows[6:]  # the others stay, to the byte
    assert made.counts == {"rows_in": 13, "rows_kept": 7, "dropped: repeated sentences removed": 6, "made": 6, "not_new": 0}
    for i, row in enumerate(before[:6]):
        assert after[verdicts[row]["keeper"]] == f"{own(i)}\n\n{own(i, 1)}" and 0.7 < verdicts[row]["score"] < 1
    links = pq.read_table(made.file("parents.parquet")).to_pylist()
    assert {(e["row_id"], e["parent"]) for e in links} == {(verdicts[r]["keeper"], r) for r in before[:6]}
    assert made.json("sentences.json")["largest"] == [{"rows": 6, "sentence": COMMON.lower()}]
    again = run_step(tmp_path, made, {"sentences": {"most": 5}})
    assert kept_ids(again) == kept_ids(made) and not again.has("rows.parquet")
    share = run_step(tmp_path, source, {"sentences": {"most": 1, "share": 0.5}})
    assert share.counts["rows_kept"] == 13


def test_near_forms_count_as_one(tmp_path):
    forms = [f"Click the large green button down there at the bottom of this page to read the next chapter number {i}." for i in range(6)]
    source = rows_artifact(tmp_path, [text(f"{own(i)} {f}") for i, f in enumerate(forms)])
    assert run_step(tmp_path, source, {"sentences": {"most": 3, "near": None}}).counts["rows_kept"] == 6
    made = run_step(tmp_path, source, {"sentences": {"most": 3}})
    assert sorted(contents(made).values()) == sorted(own(i) for i in range(6))


def test_one_row_may_keep_it(tmp_path):
    source = rows_artifact(tmp_path, [text(f"{COMMON} {own(i)}") for i in range(4)])
    made = run_step(tmp_path, source, {"sentences": {"most": 2, "keep_one": True}})
    assert min(kept_ids(source)) in kept_ids(made)
    assert sorted(t.startswith(COMMON) for t in contents(made).values()) == [False] * 3 + [True]


def test_an_answer_is_never_left_empty(tmp_path):
    rows = [chat(f"Question {i}? {COMMON}", f"{COMMON} {own(i)}" if i < 3 else COMMON) for i in range(6)]
    source = rows_artifact(tmp_path, rows)
    made = run_step(tmp_path, source, {"sentences": {"most": 3}})
    said = {json.dumps(m) for m in RowSet(made).table("train", ["messages"])["messages"].to_pylist()}
    assert said == {json.dumps(r["messages"]) for r in rows[3:]} | {json.dumps(chat(f"Question {i}? {COMMON}", own(i))["messages"]) for i in range(3)}
    dropped = run_step(tmp_path, source, {"sentences": {"most": 3, "emptied": "drop"}})
    assert dropped.counts == {"rows_in": 6, "rows_kept": 0, "dropped: nothing but repeated sentences": 3, "dropped: repeated sentences removed": 3, "made": 3,
                              "not_new": 0}
    prompts = run_step(tmp_path, source, {"sentences": {"most": 3, "part": "prompt"}})
    assert all(COMMON not in m[0]["content"] for m in RowSet(prompts).table("train", ["messages"])["messages"].to_pylist())


def test_a_row_is_not_lost_to_one_dropped_before(tmp_path):
    """The text without the sentence is that of a row that an earlier step dropped: nothing new can be made of it, so the row stays."""
    rows = [text(f"{own(i)} {COMMON}") for i in range(4)] + [text(own(0))]
    source = rows_artifact(tmp_path, rows)
    a = kept_ids(source)
    shorter = run_step(tmp_path, source, {"length": {"by": "words", "least": 12}})
    assert a[4] not in kept_ids(shorter)
    made = run_step(tmp_path, shorter, {"sentences": {"most": 3}})
    assert a[0] in kept_ids(made) and made.counts["made"] == 3


@pytest.mark.parametrize("piece", list(PIECES))
def test_pieces_and_the_white_space_between_them_are_the_text(piece):
    rng = random.Random(2)
    for _ in range(300):
        said = "".join(rng.choices(["word", "Dr", "3.14", ". ", "!”", "? ", "\n", "\n\n", " ", "。", "…", ")", "\t"], k=rng.randint(0, 25)))
        spans = [m.span() for m in PIECES[piece].finditer(said)]
        gaps = [said[a:b] for a, b in zip([0, *(e for _, e in spans)], [*(s for s, _ in spans), len(said)])]
        assert not "".join(gaps).strip() and all(said[a:b].strip() == said[a:b] for a, b in spans)
        assert without(said, spans, [False] * len(spans)) == (said if spans else "")
        gone = [rng.random() < 0.5 for _ in spans]
        left = [said[a:b] for (a, b), g in zip(spans, gone) if not g]
        assert "".join(without(said, spans, gone).split()) == "".join("".join(left).split())
        if piece == "lines":
            assert [line.strip() for line in said.split("\n") if line.strip()] == [said[a:b] for a, b in spans]
    assert [m[0] for m in PIECES["sentences"].finditer("One. “Two!” Three\nFour (4.5)? 五。六")] == ["One.", "“Two!”", "Three", "Four (4.5)?", "五。", "六"]
    assert [m[0] for m in PIECES["paragraphs"].finditer("a\nb\n\n c \n \nd")] == ["a\nb", "c", "d"]
