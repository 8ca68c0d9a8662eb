"""S3FT and SSR: every row's target is the model's answer, its restatement, or the row's own answer, and the checker said which."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from ftpipe import slots
from ftpipe.data.rows import RowSet
from ftpipe.evaluate.checkers.base import Case
from tests.artifacts import chat, decisions, kept_ids, rows_artifact, run_step, text
from tests.curate.scripted import Scripted, taught
from tests.models.data import trained_adapter

OWN = {"one": "It is 1", "two": "It is 3", "three": None, "four": "4", "five": "It is 6", "six": "six! 6"}
RESTATED = {"two": "Two: 2", "three": "wrong: 8", "five": None, "seven": ""}
CHECKER = {"final_number": {"marker": ""}}


def script(adapter, conversation, n, seed):
    said = conversation[-1]["content"]
    if "correct answer" in said:
        return RESTATED.get(said.split()[0])
    return OWN.get(said, "?")


NUMBERS = {name: str(i) for i, name in enumerate(OWN, 1)}


@pytest.fixture
def pool(tmp_path):
    rows = [chat(name, f"gold says {n}" if name != "four" else n, group=f"g{n}", times=int(n) % 2 + 1) | {"times": int(n) % 2 + 1}
            for name, n in NUMBERS.items()]
    rows.insert(2, text("plain"))
    return rows_artifact(tmp_path, [*rows, chat("six", "six! 6", split="heldout")])


def targets(made) -> dict[str, str]:
    return {r["messages"][0]["content"]: r["messages"][-1]["content"] for r in RowSet(made).table().to_pylist() if r["messages"]}


def tags(pool, made) -> dict[str, str]:
    asked = {r["row_id"]: r["messages"][0]["content"] for r in RowSet(pool).table().to_pylist() if r["messages"]}
    return {asked[r["row_id"]]: r["target"] for r in pq.read_table(made.file("annotations.parquet")).to_pylist() if r["row_id"] in asked}


def test_ssr_takes_what_the_checker_accepts(tmp_path, pool, tiny_model, monkeypatch):
    Scripted(script).install(monkeypatch)
    made = run_step(tmp_path, pool, {"ssr": {"checker": CHECKER}}, model=str(tiny_model))
    assert targets(made) == {"one": "It is 1", "two": "gold says 2", "three": "gold says 3", "four": "4", "five": "gold says 5", "six": "gold says 6"}
    assert tags(pool, made) == {"one": "self", "two": "gold", "three": "gold", "four": "self", "five": "gold", "six": "gold"}
    told = made.json("ssr.json")
    assert told["targets"] == {"self": 2, "paraphrase": 0, "gold": 5} and told["shares"]["self"] == 2 / 7
    assert made.counts["made"] == 1, "the answer to six is that of a held-out row, so six stays; that to four is the row's"


def test_s3ft_prefers_its_own_answer_then_its_restatement_then_the_rows(tmp_path, pool, tiny_model, monkeypatch):
    scripted = Scripted(script).install(monkeypatch)
    made = run_step(tmp_path, pool, {"s3ft": {"checker": CHECKER}}, model=str(tiny_model))
    assert tags(pool, made) == {"one": "self", "two": "paraphrase", "three": "gold", "four": "self", "five": "gold", "six": "gold"}
    assert targets(made)["two"] == "Two: 2" and targets(made)["three"] == "gold says 3" and targets(made)["five"] == "gold says 5"
    log = pq.read_table(made.file("generations.parquet")).to_pylist()
    asked = {r["row_id"]: r["messages"][0]["content"] for r in RowSet(pool).table().to_pylist() if r["messages"]}
    said = {(asked[e["row_id"]], e["stage"]): e for e in log}
    checker, gold = slots.parse("evaluate/checkers", CHECKER), {asked[r["row_id"]]: r["messages"][-1]["content"] for r in RowSet(pool).table().to_pylist()
                                                                 if r["messages"]}
    for name, tag in tags(pool, made).items():
        if tag == "gold":
            assert targets(made)[name] == gold[name]
        else:
            assert targets(made)[name] == said[name, tag]["answer"] and said[name, tag]["accepted"]
            assert checker.accepts(Case([], targets(made)[name], gold[name]))
        assert (name, "paraphrase") not in said or not said[name, "self"]["accepted"], "what passed is not asked again"
    assert len([a for a in scripted.asked if "correct answer" in a[1][-1]["content"]]) == 4
    assert all("correct answer" not in r["messages"][0]["content"] for r in RowSet(made).table().to_pylist() if r["messages"]), "training never shows it"


def test_a_new_row_stands_where_the_old_one_stood_as_often(tmp_path, pool, tiny_model, monkeypatch):
    Scripted(script).install(monkeypatch)
    made = run_step(tmp_path, pool, {"s3ft": {"checker": CHECKER}}, model=str(tiny_model))
    before, after = (RowSet(a).table().to_pylist() for a in (pool, made))
    assert len(before) == len(after) == 7
    for old, new in zip(before, after):
        assert (old["times"], old["group"]) == (new["times"], new["group"]) and (old["messages"] or [None])[:1] == (new["messages"] or [None])[:1]
    verdicts = decisions(made)
    for old, new in zip(before, after):
        if old["row_id"] != new["row_id"]:
            verdict = verdicts[old["row_id"]]
            assert not verdict["kept"] and verdict["keeper"] == new["row_id"] and json.loads(new["meta"])["parents"] == [old["row_id"]]
            tag = json.loads(new["meta"])["target"]
            assert verdict["reason"] == {"self": "answered by the model itself", "paraphrase": "answer restated by the model"}[tag]
    assert made.counts["dropped: answered by the model itself"] == 1 and made.counts["dropped: answer restated by the model"] == 1


def test_always_and_never(tmp_path, tiny_model, monkeypatch):
    """Never: the rows as they were. Always: nothing but the model's own words, even where two rows ask the same."""
    Scripted(lambda adapter, conversation, n, seed: f"own {conversation[0]['content'][:1]}").install(monkeypatch)
    pool = rows_artifact(tmp_path, [chat("a", "1"), chat("a", "2"), chat("b", "own b"), chat("c", "3")])
    never = run_step(tmp_path, pool, {"ssr": {"checker": {"regex": {"pattern": "never", "compare": False}}}}, model=str(tiny_model))
    assert kept_ids(never) == kept_ids(pool) and not never.has("rows.parquet")
    always = run_step(tmp_path, pool, {"ssr": {"checker": {"regex": {"pattern": "own", "compare": False}}}}, model=str(tiny_model))
    assert [r["messages"][-1]["content"] for r in RowSet(always).table().to_pylist()] == ["own a", "own a", "own b", "own c"]
    assert len(set(kept_ids(always))) == 4 and always.json("ssr.json")["shares"]["self"] == 1
    all_new = rows_artifact(tmp_path, [chat("a", "1"), chat("c", "3")])
    made = run_step(tmp_path, all_new, {"ssr": {"checker": {"regex": {"pattern": "own", "compare": False}}}}, model=str(tiny_model))
    assert made.counts["rows_kept"] == 0 and RowSet(made).count() == 2, "no row is left as it was, and none is lost"


def test_the_judge_is_the_base_model_and_is_shown_what_it_needs(tmp_path, tiny_model, monkeypatch):
    def judged(adapter, conversation, n, seed):
        assert adapter is None
        said = conversation[-1]["content"]
        return ("Yes" if "own: a" in said and "gold a" in said and "ask a" in said else "No") if "known to be correct" in said else f"own: {said[-1]}"

    scripted = Scripted(judged).install(monkeypatch)
    pool = rows_artifact(tmp_path, [chat("ask a", "gold a"), chat("ask b", "gold b")])
    made = run_step(tmp_path, pool, "ssr", model=str(tiny_model))
    assert targets(made) == {"ask a": "own: a", "ask b": "gold b"} and len(scripted.asked) == 4 and scripted.opened == 1
    run_step(tmp_path, pool, "ssr", model=str(tiny_model))
    assert len(scripted.asked) == 4 and scripted.opened == 1, "answers and verdicts are known"


def test_a_kill_loses_no_answer(tmp_path, pool, tiny_model, monkeypatch):
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return script(*args)

    Scripted(dies).install(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run_step(tmp_path, pool, {"s3ft": {"checker": CHECKER}}, model=str(tiny_model))
    again = Scripted(script).install(monkeypatch)
    made = run_step(tmp_path, pool, {"s3ft": {"checker": CHECKER}}, model=str(tiny_model))
    assert len(again.asked) == 10 - 7 and tags(pool, made)["two"] == "paraphrase"


def test_a_question_without_room_for_an_answer_keeps_its_row(tmp_path, tiny_model, monkeypatch):
    Scripted(lambda *a: "It is 1", room=200).install(monkeypatch)
    pool = rows_artifact(tmp_path, [chat("one", "gold 1"), chat("one " * 100, "gold 1")])
    made = run_step(tmp_path, pool, {"ssr": {"checker": CHECKER, "max_new_tokens": 100}}, model=str(tiny_model))
    assert [r["messages"][-1]["content"] for r in RowSet(made).table().to_pylist()] == ["It is 1", "gold 1"]


# with a real model: it learned four answers by heart, in words of its own

WORDS = {"red?": "it is 4", "blue?": "it is 7", "green?": "it is 2", "pink?": "it is 9"}


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_model):
    """Workspace, model folder, and rows whose answers say the same numbers in other words; but one says another."""
    folder = tmp_path_factory.mktemp("learned")
    model = taught(folder / "model", tiny_model, [chat(q, a) for q, a in WORDS.items()])
    rows = [chat(q, f"The answer to this question: {a[-1] if q != 'pink?' else 5}") for q, a in WORDS.items()]
    return folder, model, rows


def test_own_answers_are_likelier_than_the_rows_and_decoded_greedily(learned):
    from ftpipe.models.service import ModelService
    from ftpipe.stages.base import Environment

    folder, model, rows = learned
    pool = rows_artifact(folder, rows)
    made = run_step(folder, pool, {"s3ft": {"checker": CHECKER, "max_new_tokens": 12}}, model=str(model))
    assert {q: a for q, a in targets(made).items() if q != "pink?"} == {q: a for q, a in WORDS.items() if q != "pink?"}
    assert targets(made)["pink?"] == rows[3]["messages"][1]["content"] and tags(pool, made)["pink?"] == "gold"
    service = ModelService.open(str(model), Environment(folder, folder, "test"), device="cpu")
    own, gold = (RowSet(a).table().to_pylist()[:3] for a in (made, pool))
    losses = [[s.loss for s in service.score([service.renderer.row(r) for r in side])] for side in (own, gold)]
    assert sum(losses[0]) < 0.5 * sum(losses[1]), losses


def test_training_on_own_answers_moves_the_model_less_than_on_the_rows(learned):
    """KL of the base from the trained model on text that has nothing to do with either, after as many steps."""
    import torch

    from ftpipe.models.loading import load_adapted, load_model, load_tokenizer
    from ftpipe.stages.base import Environment

    folder, model, rows = learned
    env = Environment(folder, folder, "test")
    own = [chat(q, a) for q, a in WORDS.items() if q != "pink?"] + [rows[3]]  # what ssr makes of the rows, see above
    tokens = torch.tensor([load_tokenizer(str(model), env)("Rivers carry sand to the sea, and the sea gives it back in time.")["input_ids"]])

    def logp(network):
        with torch.inference_mode():
            return torch.log_softmax(network(input_ids=tokens).logits[0].double(), -1)

    before = logp(load_model(str(model), env, dtype="float32", device="cpu"))
    moved = []
    for n, data in enumerate((own, rows)):
        adapter = trained_adapter(folder, model, data, steps=30, name=f"trained-{n}")
        after = logp(load_adapted(str(model), env, adapter.file("adapter"), dtype="float32", device="cpu"))
        moved.append(float((before.exp() * (before - after)).sum(-1).mean()))
    assert 0 < moved[0] < moved[1], moved
