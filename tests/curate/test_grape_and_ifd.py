"""GRAPE and IFD against unbatched loops over full logits, and on rows whose truth is planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ftpipe.curate.select.grape import AGAIN, FEW, OTHER, Grape, repetition
from ftpipe.data.forms import AnswerAlone, Template, exchange, said
from ftpipe.data.render import Renderer, RenderError
from ftpipe.data.rows import RowSet
from ftpipe.models.loading import load_model, load_tokenizer
from ftpipe.models.scores import score_rows
from ftpipe.stages.base import Environment
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_step, text
from tests.curate.taught import CHANCE, FACTS, chance_rows, true_rows, wrong_rows
from tests.models.data import WORDS, context
from tests.tiny import make_tiny_model

BF16 = 2e-3
TEMPLATE = "Question: {prompt}\nAnswer: {answer}"


def many_answers(prompts: int = 5, answers: int = 4) -> list[dict]:
    rng = np.random.default_rng(1)
    return [chat(f"question {i}", " ".join(rng.choice(WORDS, size=int(rng.integers(2, 9)))) + f" {k}") for i in range(prompts) for k in range(answers)]


def opened(model: Path, folder: Path, dtype: str = "float32"):
    env = Environment(folder, folder, "test")
    return load_model(str(model), env, dtype=dtype, device="cpu"), load_tokenizer(str(model), env)


def mean_logp(model, before: list[int], answer: list[int]) -> float:
    """Mean log-probability of `answer` after `before`, from full logits and a loop."""
    with torch.inference_mode():
        logp = torch.log_softmax(model(input_ids=torch.tensor([before + answer])).logits[0].float(), -1)
    return float(np.mean([logp[len(before) + k - 1, t].item() for k, t in enumerate(answer)]))


def plain_fit(model, tokenizer, row: dict) -> float:
    """By hand: the tiny tokenizer knows bytes only and puts nothing in front, so the border is where it is written."""
    prompt, answer = (t["content"] for t in row["messages"])
    return mean_logp(model, *(tokenizer(s, add_special_tokens=False)["input_ids"] for s in (f"Question: {prompt}\nAnswer:", f" {answer}")))


def chat_loss(model, tokenizer, rows: list[dict]) -> float:
    """The loss that training would begin with: mean over all trained tokens."""
    losses = []
    for r in Renderer(tokenizer).rows(complete(rows)):
        first, n = r.prompt_length, r.trained_tokens
        losses += [-mean_logp(model, r.input_ids[:first], r.input_ids[first:first + n])] * n
    return float(np.mean(losses))


# --- GRAPE


@pytest.mark.parametrize("keep", [1, 2])
def test_each_prompt_keeps_its_likeliest_answers(tmp_path, tiny_model, keep):
    rows = many_answers()
    model, tokenizer = opened(tiny_model, tmp_path)
    out = run_step(tmp_path, rows_artifact(tmp_path, rows), {"grape": {"per_prompt": keep, "dtype": "float32"}}, model=str(tiny_model))
    fit = {r["row_id"]: plain_fit(model, tokenizer, r) for r in complete(rows)}
    found = decisions(out)
    assert all(found[i]["score"] == pytest.approx(f, abs=1e-4) for i, f in fit.items())
    ids, expected, best = list(fit), [], {}
    for i in range(5):
        ranked = sorted(ids[4 * i:4 * i + 4], key=lambda r: -fit[r])
        expected += ranked[:keep]
        best |= dict.fromkeys(ranked[keep:], ranked[0])
    assert sorted(kept_ids(out)) == sorted(expected)
    assert {i: v["keeper"] for i, v in found.items() if not v["kept"]} == best and {v["reason"] for v in found.values()} == {None, OTHER}
    said = out.json("grape.json")
    assert said["prompts"] == 5 and said["fit"]["kept"] == pytest.approx(np.mean([fit[i] for i in expected]), abs=1e-4)
    assert said["fit"]["all"] == pytest.approx(np.mean(list(fit.values())), abs=1e-4)


def test_best_random_and_worst_start_training_at_rising_losses(tmp_path, tiny_model):
    rows = many_answers(8)
    model, tokenizer = opened(tiny_model, tmp_path)
    full, source = {r["row_id"]: r for r in complete(rows)}, rows_artifact(tmp_path, rows)
    fits, losses = [], []
    for pick in ("likeliest", "random", "unlikeliest"):
        out = run_step(tmp_path, source, {"grape": {"pick": pick, "template": None, "dtype": "float32"}}, model=str(tiny_model), seed=2)
        prompts = [full[i]["messages"][0]["content"] for i in kept_ids(out)]
        assert sorted(prompts) == [f"question {i}" for i in range(8)], "every prompt stays, with one answer"
        fits.append(out.json("grape.json")["fit"]["kept"])
        losses.append(chat_loss(model, tokenizer, [{"messages": full[i]["messages"]} for i in kept_ids(out)]))
    assert fits[0] > fits[1] > fits[2] and losses[0] < losses[1] < losses[2]


def test_another_base_makes_other_choices(tmp_path, tiny_model):
    other = make_tiny_model(tmp_path / "other", seed=5)
    source = rows_artifact(tmp_path, many_answers())
    one, two = (set(kept_ids(run_step(tmp_path, source, "grape", model=str(m)))) for m in (tiny_model, other))
    assert one != two and len(one) == len(two) == 5


def test_the_same_answer_twice_changes_nothing(tmp_path, tiny_model):
    rows = many_answers(3)
    once = kept_ids(run_step(tmp_path, rows_artifact(tmp_path, rows), {"grape": {"per_prompt": 2}}, model=str(tiny_model)))
    again = [*rows, *rows, chat("question 0", rows[0]["messages"][1]["content"] + " ")]
    out = run_step(tmp_path, rows_artifact(tmp_path, again), {"grape": {"per_prompt": 2}}, model=str(tiny_model))
    said = {r["row_id"]: [t["content"].strip() for t in r["messages"]] for r in complete(again)}
    assert sorted(said[i] for i in kept_ids(out)) == sorted(said[i] for i in once)
    twins = {i: v for i, v in decisions(out).items() if v["reason"] == AGAIN}
    assert len(twins) == 13 and all(said[v["keeper"]] == said[i] for i, v in twins.items() if v["keeper"] in once and said[i] in [said[o] for o in once])


def test_prompts_without_a_choice_stay_unscored_or_go(tmp_path, tiny_model):
    rows = [*many_answers(2), chat("alone?", "yes"), chat("alone?", "yes"), text("plain text"), text("more of it")]
    source = rows_artifact(tmp_path, rows)
    out = run_step(tmp_path, source, "grape", model=str(tiny_model))
    ids = [r["row_id"] for r in complete(rows)]
    assert out.manifest["notes"]["scored"] == 8 and len(kept_ids(out)) == 5 and set(ids[-2:]) < set(kept_ids(out))
    found = decisions(run_step(tmp_path, source, {"grape": {"least": 2}}, model=str(tiny_model)))
    assert {i for i, v in found.items() if v["reason"] == FEW} == set(ids[8:])


def test_as_many_answers_as_another_stage_has(tmp_path, tiny_model):
    rows = many_answers(3)
    like = rows_artifact(tmp_path, [*rows[:3], rows[4]], name="like")
    out = run_step(tmp_path, rows_artifact(tmp_path, rows), {"grape": {"like": "like", "per_prompt": 2}}, model=str(tiny_model), like=like)
    prompts = {r["row_id"]: r["messages"][0]["content"] for r in complete(rows)}
    assert sorted(prompts[i] for i in kept_ids(out)) == ["question 0"] * 3 + ["question 1"] + ["question 2"] * 2


def test_an_answer_in_circles_is_taken_only_if_there_is_no_other(tmp_path, tiny_model):
    rng = np.random.default_rng(0)
    normal = " ".join(rng.choice(WORDS, size=30))
    circles, worse = "time file path " * 20, "time file path list " * 20
    assert repetition(normal) < 0.3 and repetition(circles) > 0.9 and repetition("short") == 0
    seen, again, squeezed = set(), 0, " ".join(circles.split())
    for i in range(len(squeezed) - 19):
        again += squeezed[i:i + 20] in seen
        seen.add(squeezed[i:i + 20])
    assert repetition(circles) == pytest.approx(again / (len(squeezed) - 19))
    rows = [chat("a?", circles), chat("a?", normal), chat("b?", circles), chat("b?", worse)]
    ids, source = [r["row_id"] for r in complete(rows)], rows_artifact(tmp_path, rows)
    for pick in ("likeliest", "unlikeliest"):
        kept = kept_ids(run_step(tmp_path, source, {"grape": {"pick": pick}}, model=str(tiny_model)))
        assert ids[1] in kept and len(kept) == 2, "whichever fits better"
    free = [kept_ids(run_step(tmp_path, source, {"grape": {"pick": p, "repetition": None}}, model=str(tiny_model))) for p in ("likeliest", "unlikeliest")]
    assert ids[0] in free[0] + free[1]


@pytest.mark.parametrize("settings", [{"budget": {"rows": 3}}, {"template": "{answer}"}, {"template": "{prompt} {answer} !"}, {"per_prompt": 0}])
def test_grape_refuses_what_it_cannot_do(settings):
    with pytest.raises(ValueError):
        Grape(**settings)


# --- forms


def test_prompt_and_answer_of_a_row():
    turns = [{"role": r, "content": c} for r, c in (("system", "be brief"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))]
    assert exchange({"messages": turns}) == (turns[:4], "four") and exchange({"messages": turns[:4]}) == (turns[:2], "two")
    assert said(turns[:2]) == "be brief\none" and said(turns[:4]) == "system: be brief\nuser: one\nassistant: two\nuser: three"
    assert exchange({"messages": turns[:2], "chosen": [turns[2]], "rejected": [turns[4]]}) == (turns[:2], "two")
    assert exchange({"messages": None, "text": "x"}) is None and exchange({"messages": turns[:2]}) is None and exchange({"messages": turns[2:3]}) is None


def test_a_form_has_scores_of_its_own(tmp_path, tiny_model):
    rows = RowSet(rows_artifact(tmp_path, [*many_answers(1), text("plain")]))
    ctx = context(tmp_path)
    forms = (None, AnswerAlone(), Template(TEMPLATE), Template("{prompt}{answer}"))
    tables = [score_rows(rows, ctx, model=str(tiny_model), want=("loss",), form=f) for f in forms]
    assert ctx.notes["scored"] == 20 and ctx.notes["cached"] == 0
    assert len({tuple(t["loss"].to_pylist()) for t in tables}) == 4
    again = score_rows(rows, ctx, model=str(tiny_model), want=("loss",), form=Template(TEMPLATE))
    assert ctx.notes["cached"] == 5 and again.equals(tables[2])
    assert [p for p in tables[1]["problem"].to_pylist() if p] == ["plain text has no prompt"]
    assert [p for p in tables[2]["problem"].to_pylist() if p] == ["no prompt with an answer"]


def test_the_answer_alone_is_the_trained_tokens(tiny_model, tmp_path):
    _, tokenizer = opened(tiny_model, tmp_path)
    renderer = Renderer(tokenizer)
    turns = [{"role": r, "content": c} for r, c in (("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))]
    rows = complete([{"messages": turns}, text("plain"), {"messages": turns[:1]}])
    alone, plain, silent = AnswerAlone().rows(renderer, rows)
    assert tokenizer.decode(alone.input_ids) == "<|im_start|>two<|im_end|>four<|im_end|>" and alone.trained == [False] + [True] * 9
    assert alone.trained_tokens == renderer.row(rows[0]).trained_tokens
    assert isinstance(plain, RenderError) and isinstance(silent, RenderError)


# --- IFD


def test_ifd_is_the_ratio_of_two_full_forwards(tmp_path, tiny_model):
    rows = [*many_answers(4, 2), text("plain text")]
    model, tokenizer = opened(tiny_model, tmp_path, "bfloat16")
    source = rows_artifact(tmp_path, rows)
    out = run_step(tmp_path, source, {"ifd": {"budget": {"rows": 3}, "below": None}}, model=str(tiny_model))
    found, truth = decisions(out), {}
    for row in complete(rows[:-1]):
        r = Renderer(tokenizer).row(row)
        answer = r.input_ids[r.prompt_length:r.prompt_length + r.trained_tokens]
        assert tokenizer.decode(answer) == row["messages"][1]["content"] + "<|im_end|>"
        truth[row["row_id"]] = mean_logp(model, r.input_ids[:r.prompt_length], answer) / mean_logp(model, [tokenizer.bos_token_id], answer)
    assert all(found[i]["score"] == pytest.approx(v, abs=BF16) for i, v in truth.items())
    assert sorted(kept_ids(out)) == sorted(sorted(found, key=lambda i: -(found[i]["score"] or 0))[:3])
    plain, = (v for i, v in found.items() if i not in truth)
    assert plain["reason"] == "plain text has no prompt" and plain["score"] is None


def test_prompts_that_tell_the_answer_are_easy_and_those_that_mislead_are_left_out(tmp_path, taught):
    """The ratio is near 0 where the prompt says all, near 1 where it says nothing, and above where it says something else."""
    rows = [*true_rows(), *chance_rows(), *wrong_rows()]
    out = run_step(tmp_path, rows_artifact(tmp_path, rows), {"ifd": {"budget": {"rows": 6}, "below": 1.5}}, model=str(taught))
    ids = [r["row_id"] for r in complete(rows)]
    score = {i: v["score"] for i, v in decisions(out).items()}
    told, drawn, misled = ([score[i] for i in ids[k:k + 6]] for k in (0, 6, 12))
    assert max(told) < 0.1 and 0.6 < min(drawn) and max(drawn) < 1.6 and min(misled) > 2
    assert [rows[ids.index(i)]["messages"][0]["content"] for i in kept_ids(out)] == [CHANCE] * 6
    assert {v["reason"] for i, v in decisions(out).items() if i in ids[12:]} == {"the prompt does not help"}
    assert out.json("ifd.json")["at_or_above"] == len(FACTS)


def test_a_row_that_the_context_cuts_has_no_ratio(tmp_path, tiny_model):
    rows = [*many_answers(2, 2), chat("q" * 480, "a" * 60)]
    found = decisions(run_step(tmp_path, rows_artifact(tmp_path, rows), {"ifd": {"budget": {"rows": 1}, "below": None}}, model=str(tiny_model)))
    assert [v["reason"] for v in found.values() if v["score"] is None] == ["longer than the model's context: the losses are of different tokens"]
