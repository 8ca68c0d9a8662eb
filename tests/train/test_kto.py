"""KTO: judged answers, good and bad, against the formula; and no other objective learns a bad one."""

from __future__ import annotations

import math

import pytest

from ftpipe.errors import DataError
from ftpipe.train.objective.kto import next_others
from tests.train import planted
from tests.train.small import judged, small_run, steps

pytestmark = pytest.mark.usefixtures("alone")


def gain(run, base, ids, first):
    """log p - log p_ref of the tokens from `first` on, by whole logits."""
    import torch

    tokens = torch.tensor([ids])
    with torch.no_grad():
        both = [m(input_ids=tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1).gather(1, tokens[0, 1:, None])[first - 1:].sum()
                for m in (run.model, base)]
    return float(both[0] - both[1])


@pytest.mark.parametrize(("adapt", "zero"), [(None, 0), (None, 3), ("full", 2)])
def test_it_starts_at_one_half_and_good_answers_gain_on_bad_ones(model, adapt, zero):
    """Policy and reference are the same at the start. An adapter that cannot be switched off is measured against a second copy."""
    run = small_run(model, objective="kto", adapt=adapt, zero=zero)
    found = steps(run, judged(), 7, rows_per_step=8, rate=3e-3 if adapt else 1e-2)
    assert found[0]["loss"] == pytest.approx(0.5, abs=1e-6) and found[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert found[-1]["loss"] < 0.46 and found[-1]["right"] >= 0.875 and found[-1]["trained_tokens"] == sum(e.targets for e in judged())
    assert ("kto" in run.cache) == (adapt == "full")


def test_it_is_its_formula_whatever_the_micro_batches(model):
    """A moved policy, row by row with whole logits: z is that of the whole step also where every row is a micro-batch of its own."""
    rows = judged()
    settings = {"beta": 0.3, "good_weight": 1.5, "bad_weight": 0.5}
    found = {}
    for name, how in (("one", {"batch_tokens": 10_000}), ("many", {"alone": True})):
        run = small_run(model, objective={"kto": settings})
        steps(run, rows, 6, rows_per_step=8, **how)
        found[name] = steps(run, rows, 7, rows_per_step=8, first=6, rate=0.0, **how)[0]
    base = run.load_base()
    run.model.eval()
    own, others, good = [], [], []
    for e in rows:
        good.append(any(e.trained[0]))
        mine, its = (0, 1) if good[-1] else (1, 0)
        first = list(e.trained[mine]).index(True)
        own.append(gain(run, base, e.input_ids[mine], first))
        others.append(gain(run, base, e.input_ids[its], first))
    z = max(0.0, sum(others) / 8)
    assert z > 0.5, "it matters here"
    wanted = sum(1.5 / (1 + math.exp(0.3 * (r - z))) if g else 0.5 / (1 + math.exp(0.3 * (z - r))) for r, g in zip(own, good, strict=True)) / 8
    for record in found.values():
        assert record["kl"] == pytest.approx(z, abs=1e-3) and record["loss"] == pytest.approx(wanted, abs=1e-4)
        assert record["right"] == sum((r > z) == g for r, g in zip(own, good, strict=True)) / 8
    assert found["many"]["grad_norm"] == pytest.approx(found["one"]["grad_norm"], rel=1e-3)


def rows_of(*said):
    turns = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a, _ in said]
    return [{"row_id": f"r{i}", "format": "unpaired", "messages": [q], "chosen": [a] if good else None, "rejected": None if good else [a]}
            for i, ((q, a), (_, _, good)) in enumerate(zip(turns, said, strict=True))]


def test_a_row_is_measured_by_the_next_answer_to_another_prompt(tiny_model):
    from transformers import AutoTokenizer

    from ftpipe.data.render import Renderer
    from ftpipe.train.objective.kto import Kto

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = rows_of(("a?", "good a", True), ("a?", "bad a", False), ("b?", "b", True))
    found = list(Kto().encode(rows, Renderer(tokenizer)))
    said = [[tokenizer.decode([t for t, on in zip(ids, trained, strict=True) if on]) for ids, trained in zip(e.input_ids, e.trained, strict=True)]
            for e in found]
    assert said == [["good a<|im_end|>", ""], ["", "bad a<|im_end|>"], ["b<|im_end|>", ""]]
    ends = [tokenizer.decode(e.input_ids[i]).rpartition("assistant\n")[2] for e, i in zip(found, (1, 0, 1), strict=True)]
    assert ends == ["b<|im_end|>", "b<|im_end|>", "good a<|im_end|>"]
    assert all(isinstance(e, DataError) for e in Kto().encode(rows[:2], Renderer(tokenizer))), "one prompt alone measures nothing"
    assert next_others([1, 1, 2, 2, 1]) == [2, 2, 4, 4, 2] and next_others("aa") == [None, None]


def judged_lessons():
    """Lessons called good, and as many answers of exclamation marks called bad."""
    good = [row | {"format": "unpaired", "messages": row["messages"][:1], "chosen": row["messages"][1:]} for row in planted.lessons(12)]
    return [r for row in good for r in (row, row | {"chosen": None, "rejected": [{"role": "assistant", "content": "!" * 5}]})]


def test_no_objective_but_those_for_judged_answers_sees_a_bad_one(model, tmp_path, monkeypatch):
    """The rendered rows of the whole stage: every other objective leaves bad answers out with that reason, and learns the good ones."""
    import json

    from ftpipe import slots
    from ftpipe.data.rows import RowSet
    from ftpipe.train import rendering
    from ftpipe.train.setup import Rows

    names = [n for n in slots.slots()["train/objective"].names() if n != "kto"]
    ctx = planted.context(tmp_path, judged_lessons())
    table = RowSet(ctx.inputs["rows"]).table()
    bad = {f"r{i}" for i in range(1, 24, 2)}
    kept = {}
    for name in names:
        try:
            rendering.render(planted.stage(model, objective=name), ctx, table, tmp_path / f"{name}.arrow")
        except DataError as error:
            assert "does not train on rows of format unpaired" in error.what
            kept[name] = set()
            continue
        kept[name] = set(Rows(tmp_path / f"{name}.arrow").table["row_id"].to_pylist())
        reasons = json.loads((tmp_path / rendering.LEFT_OUT).read_text())
        assert set(reasons) == bad and all("called bad" in r for r in reasons.values()), name
    assert not any(k & bad for k in kept.values())
    assert kept["sft"] == kept["dft"] == {f"r{i}" for i in range(0, 24, 2)} and kept["dpo"] == set()


def test_a_stage_learns_from_judged_rows(model, tmp_path, monkeypatch):
    import json

    result = planted.in_process(tmp_path, model, monkeypatch, judged_lessons(), objective="kto", epochs=4)
    metrics = json.loads((result / "metrics.json").read_text())["metrics"]
    assert metrics[0]["loss"] == pytest.approx(0.5, abs=1e-6) and metrics[0]["rows"] == 8
    assert len(metrics) == 12 and sum(m["loss"] for m in metrics[-3:]) / 3 < 0.46
    assert sum(m["trained_tokens"] for m in metrics) == 4 * sum(len(r[side][0]["content"]) + 1 for r in judged_lessons() for side in ("chosen", "rejected")
                                                                if r.get(side)), "the answers, good and bad, and nothing of the others"
