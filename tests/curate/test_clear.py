"""CLEAR: the confidence from its logged parts, the median cut, and corrections under scripted and real judges."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ftpipe.curate.asking import Asker, in_parts
from ftpipe.curate.score.bsdetector import CONTRADICTION, contradictions, overlap
from ftpipe.data.rows import RowSet, content_id
from ftpipe.errors import ConfigError, DataError
from ftpipe.models.loading import load_model, load_tokenizer
from ftpipe.models.service import ModelService
from ftpipe.stages.base import Environment
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_step, text
from tests.curate.taught import FACTS, true_rows, wrong_rows
from tests.models.data import context, trained_adapter

SHORT = {"max_new_tokens": 8}


def env_of(folder) -> Environment:
    return Environment(folder, folder, "test")


# --- the detector


@pytest.fixture(scope="module")
def asked(taught, tmp_path_factory):
    """True and wrong rows, and what the detector says of them."""
    workspace = tmp_path_factory.mktemp("asked")
    rows = [*true_rows(), *wrong_rows(1), *wrong_rows(2), text("plain text"), true_rows()[0], chat("too long " * 60, "blue")]
    source = rows_artifact(workspace, rows)
    out = run_step(workspace, source, {"bsdetector": {"samples": 3, "alpha": 0.6, "beta": 0.75, **SHORT}}, model=str(taught), seed=4)
    lines = {r["row_id"]: r for r in pq.read_table(out.file("annotations.parquet")).to_pylist()}
    return workspace, source, out, [lines[r["row_id"]] for r in complete(rows)]


def test_the_confidence_is_that_of_its_logged_parts(asked):
    _, _, out, lines = asked
    answers: dict[str, list[dict]] = {}
    for a in pq.read_table(out.file("answers.parquet")).to_pylist():
        answers.setdefault(a["row_id"], []).append(a)
    for line in lines[:18]:
        parts = answers[line["row_id"]]
        assert [a["sample"] for a in parts] == [0, 1, 2]
        o = np.mean([0.6 * (1 - a["contradiction"]) + 0.4 * a["equal"] for a in parts])
        assert line["consistency"] == pytest.approx(o, abs=1e-12)
        assert line["confidence"] == pytest.approx(0.75 * line["consistency"] + 0.25 * line["reflection"], abs=1e-12)
        assert 0 <= line["confidence"] <= 1
    assert lines[18]["confidence"] is None and lines[20]["confidence"] is None, "plain text, and a prompt that leaves no room"
    assert lines[19] | {"row_id": 0} == lines[0] | {"row_id": 0}, "equal rows are asked once"
    assert len(kept_ids(out)) == 21 and out.json("bsdetector.json")["answered"] == 18


def test_wrong_answers_are_told_from_true_ones(asked):
    _, _, _, lines = asked
    truth = [1] * 6 + [0] * 12
    assert roc_auc_score(truth, [r["confidence"] for r in lines[:18]]) > 0.95


def test_the_drawn_answers_are_those_of_the_service(asked, taught):
    """The model was taught the facts, so most of what it draws is the fact."""
    workspace, source, out, _ = asked
    said = {r["row_id"]: r["messages"] for r in RowSet(source).table().to_pylist()}
    drawn = [(said[a["row_id"]][0]["content"], a) for a in pq.read_table(out.file("answers.parquet")).to_pylist()]
    assert np.mean([FACTS[q] == a["answer"] for q, a in drawn]) > 0.6
    for _, a in drawn:
        given = said[a["row_id"]][1]["content"]
        assert a["equal"] == (a["answer"].strip().casefold() == given) and a["contradiction"] == 1 - overlap(given, a["answer"])
    again = run_step(workspace, source, {"bsdetector": {"samples": 3, "alpha": 0.6, "beta": 0.75, **SHORT}}, model=str(taught), seed=5)
    assert pq.read_table(again.file("answers.parquet"))["answer"] != pq.read_table(out.file("answers.parquet"))["answer"], "another seed, other draws"


def test_the_overlap_of_words():
    assert overlap("The cat sat.", "the CAT sat") == 1 and overlap("a b", "c d") == 0 and overlap("", "!") == 1
    assert overlap("a a b", "a c") == pytest.approx(2 * 1 / 5)


def test_letters_have_the_probabilities_of_full_logits(taught, tmp_path):
    env = env_of(tmp_path)
    asker = Asker(ModelService.open(str(taught), env, dtype="float32"))
    model, tokenizer = load_model(str(taught), env, dtype="float32"), load_tokenizer(str(taught), env)
    questions, letters = ["sky?", "is it so?"], [tokenizer.convert_tokens_to_ids(c) for c in "ABC"]
    found = asker.choose(questions, "ABC")
    for question, chances in zip(questions, found):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.inference_mode():
            truth = torch.softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].float()[letters], 0).numpy()
        np.testing.assert_allclose(chances, truth, rtol=1e-4)
    assert np.isnan(asker.choose(["x" * 600], "AB")).all()
    both = [asker.choose([CONTRADICTION.format(question="q", first=a, second=b)], "AB")[0, 0] for a, b in (("x", "y"), ("y", "x"))]
    assert contradictions("q", "x", ["y"], asker) == [pytest.approx(np.mean(both))]
    with pytest.raises(ConfigError, match="with the same token"):
        asker.choose(["q"], "AA")


def test_parts_that_were_done_are_not_done_again(tmp_path):
    ctx, calls = context(tmp_path), []

    def make(part):
        calls.append(list(part))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [{"n": n} for n in part]

    with pytest.raises(KeyboardInterrupt):
        in_parts(ctx, "things", range(10), 3, make)
    assert in_parts(ctx, "things", range(10), 3, make) == [{"n": n} for n in range(10)]
    assert calls == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9]]


# --- the filter


@pytest.mark.parametrize(("confidence", "kept"), [([0.1, 0.9, 0.5, 0.7], [1, 3]), ([0.5, 0.5, 0.5, 0.9], [3]), ([0.1, None, 0.3, 0.2], [2])])
def test_exactly_what_lies_above_the_median_stays(tmp_path, tiny_model, confidence, kept):
    source = rows_artifact(tmp_path, [text(f"row {i}") for i in range(4)], annotations={"confidence": confidence})
    out, ids = run_step(tmp_path, source, "clear", model=str(tiny_model)), kept_ids(source)
    assert kept_ids(out) == [ids[i] for i in kept]
    known = [c for c in confidence if c is not None]
    said = out.json("clear.json")
    assert said["gamma"] == np.median(known) and said["at_gamma"] == known.count(np.median(known))
    found = decisions(out)
    assert [found[i]["reason"] for i in ids] == ["no confidence is known" if c is None else None if i in kept else "not confident enough"
                                                 for i, c in enumerate(confidence)]


def test_a_threshold_and_what_is_missing(tmp_path, tiny_model):
    source = rows_artifact(tmp_path, [text(f"row {i}") for i in range(4)], annotations={"sure": [0.1, 0.9, 0.5, 0.7]})
    assert len(kept_ids(run_step(tmp_path, source, {"clear": {"by": "sure", "above": 0.1}}, model=str(tiny_model)))) == 3
    with pytest.raises(DataError, match="annotates 'confidence'"):
        run_step(tmp_path, source, "clear", model=str(tiny_model))
    with pytest.raises(ConfigError, match="makes no adapter"):
        run_step(tmp_path, source, {"clear": {"by": "sure", "corrector": "other"}}, model=str(tiny_model), other=source)


# --- corrections

CORRECT = {"corrector": "corrector", "batch_size": 1, **SHORT}


@pytest.fixture(scope="module")
def corrected(taught, tmp_path_factory):
    """True rows the detector is sure of, wrong ones and a pair it is not, and an adapter that knows the facts."""
    workspace = tmp_path_factory.mktemp("corrected")
    pair = {"format": "preference", "messages": [{"role": "user", "content": "sky?"}], "chosen": [{"role": "assistant", "content": "red"}],
            "rejected": [{"role": "assistant", "content": "blue"}]}
    rows = [*true_rows(meta='{"kept": 1}'), *wrong_rows(), pair]
    source = rows_artifact(workspace, rows, annotations={"confidence": [0.9] * 6 + [0.2 + i / 100 for i in range(7)]})
    return workspace, source, trained_adapter(workspace, taught, true_rows(), steps=30, name="corrector")


def scripted(monkeypatch, sees):
    """Judges reply as `sees(question, letters)` says."""
    monkeypatch.setattr(Asker, "choose", lambda self, questions, letters: np.array([sees(q, letters) for q in questions]).reshape(-1, len(letters)))


def knows(question: str, letters: str) -> list[float]:
    """A judge that knows the facts: it is sure of what is true, with either order."""
    first = question.split("Answer A: ")[1].split("\n")[0] if "Answer A: " in question else ""
    if letters == "AB":
        right = FACTS[question.split("Question: ")[1].split("\n")[0]] == first
        return [0.95, 0.05] if right else [0.05, 0.95]
    fact = FACTS[question.split("Question: ")[2].split("\n")[0]]
    right = ("A" if fact == first else "B") == question.split("Proposed answer: ")[1][0]
    return [0.9, 0.05, 0.05] if right else [0.05, 0.9, 0.05]


def test_wrong_answers_make_way_for_the_correctors_own(corrected, taught, monkeypatch):
    workspace, source, corrector = corrected
    scripted(monkeypatch, knows)
    out = run_step(workspace, source, {"clear": CORRECT}, model=str(taught), corrector=corrector)
    before, after = RowSet(source).table().to_pylist(), RowSet(out).table().to_pylist()
    service = ModelService.open(str(taught), env_of(workspace), adapter=corrector.file("adapter"))
    greedy = {q: service.generate([service.renderer.prompt([{"role": "user", "content": q}])], **SHORT)[0].text for q in FACTS}
    assert [{k: v for k, v in r.items() if k != "position"} for r in after[:6]] == [{k: v for k, v in r.items() if k != "position"} for r in before[:6]]
    assert greedy == FACTS, "the adapter knows them"
    verdicts = {v["row_id"]: v for v in pq.read_table(out.file("corrections.parquet")).to_pylist()}
    assert len(verdicts) == 6 and all(v["replaces"] and v["confidence"] > 0.8 for v in verdicts.values())
    for v in verdicts.values():
        assert v["consistency"] == pytest.approx((v["first_order"] + v["second_order"]) / 2) and v["reflection"] == pytest.approx(0.925)
        assert v["confidence"] == pytest.approx(0.7 * v["consistency"] + 0.3 * v["reflection"])
    full = {r["row_id"]: r for r in before}
    parents = {p["parent"]: p["row_id"] for p in pq.read_table(out.file("parents.parquet")).to_pylist()} if out.has("parents.parquet") else {}
    # the corrected rows say what the true ones say already, so none is new
    assert out.counts["not_new"] == 6 and out.counts["made"] == 0 and not parents and len(full) == 13
    assert out.counts["dropped: replaced by a better answer"] == 6 and out.counts["dropped: not confident enough"] == 1


def test_a_replacement_is_the_candidate_with_its_parent(corrected, taught, monkeypatch):
    workspace, _, corrector = corrected
    scripted(monkeypatch, knows)
    rows = [chat("other", "row"), *wrong_rows()]
    source = rows_artifact(workspace, rows, annotations={"confidence": [0.9] + [0.1] * 6})
    out = run_step(workspace, source, {"clear": CORRECT | {"above": 0.5}}, model=str(taught), corrector=corrector)
    new = RowSet(out).table().to_pylist()[1:]
    assert {r["messages"][0]["content"]: r["messages"][1]["content"] for r in new} == FACTS
    parents = {p["row_id"]: p["parent"] for p in pq.read_table(out.file("parents.parquet")).to_pylist()}
    asked = {r["row_id"]: r["messages"][0]["content"] for r in complete(rows)}
    assert all(asked[parents[r["row_id"]]] == r["messages"][0]["content"] and content_id(r) == r["row_id"] for r in new)


def test_a_judge_that_looks_at_the_place_only_changes_nothing_and_is_reported(corrected, taught, monkeypatch):
    workspace, source, corrector = corrected
    scripted(monkeypatch, lambda q, letters: [0.99, 0.01, 0.0][:len(letters)])
    out = run_step(workspace, source, {"clear": CORRECT}, model=str(taught), corrector=corrector)
    said = out.json("clear.json")
    assert said["judged"] == said["orders_disagree"] == 6 and said["replaced"] == 0 and len(kept_ids(out)) == 6


def test_a_real_judge_is_asked_the_same_twice(corrected, taught):
    """No script: whatever the tiny model says, replaced are exactly the rows whose verdict says so."""
    workspace, source, corrector = corrected
    one, two = (run_step(workspace, source, {"clear": CORRECT | {"eta": 0.3}}, model=str(taught), corrector=corrector) for _ in range(2))
    assert one.file("corrections.parquet").read_bytes() == two.file("corrections.parquet").read_bytes()
    verdicts = pq.read_table(one.file("corrections.parquet")).to_pylist()
    assert all(v["replaces"] == (v["consistency"] > 0.5 and v["confidence"] > 0.3) for v in verdicts)
    assert {i for i, d in decisions(one).items() if d["reason"] == "replaced by a better answer"} == {v["row_id"] for v in verdicts if v["replaces"]}
    assert one.json("clear.json")["judged"] == 6
