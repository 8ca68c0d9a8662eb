"""Greedy soup and WiSE-FT: by a scripted scorer, and with real scores on held-out rows."""

from __future__ import annotations

import itertools
import random

import pytest

from ftpipe.errors import ConfigError
from ftpipe.merge.greedy_soup import greedy
from tests.artifacts import rows_artifact
from tests.evaluate.world import World
from tests.merge.test_merge import by_hand, close, folders, logits, stage

SCORES = {"a": 5.0, "b": 4.0, "c": 3.0, "d": 2.0, "ab": 5.0, "abc": 6.0, "ac": 4.0, "abcd": 5.9, "ad": 7.0}


@pytest.mark.parametrize("accept, soup, asked", [("not_worse", "abc", ["ab", "abc", "abcd"]), ("better", "ad", ["ab", "ac", "ad"])])
def test_greedy_follows_the_script_under_both_rules(accept: str, soup: str, asked: list[str]):
    questions: list[str] = []

    def score(names: tuple[str, ...]) -> float:
        questions.append("".join(sorted(names)))
        return SCORES[questions[-1]]

    for order in itertools.permutations("abcd"):
        questions.clear()
        found, steps = greedy(order, score, accept)
        assert "".join(found) == soup and sorted(questions[:4]) == ["a", "b", "c", "d"] and questions[4:] == asked
        assert [s for s, ok in steps if ok][-1] == tuple(soup)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_never_worse_than_the_best_model(seed: int):
    draw, known = random.Random(seed), {}
    score = lambda names: known.setdefault(frozenset(names), draw.random())  # noqa: E731
    soup, _ = greedy("abcdef", score, "not_worse")
    assert known[frozenset(soup)] >= max(known[frozenset(n)] for n in "abcdef") and len(known) == 11


def test_a_real_soup_takes_what_helps_and_reports_the_rest(world: World, env):
    rows = {"rows": rows_artifact(env.workspace, world.rows, name="rows")}
    names = ("worse", "forgets", "good", "zero")
    made = stage(world, env, "merge", folders(world, *names), method={"greedy_soup": {"rows": "rows"}}, inputs=rows, seed=2)
    said = made.json("merge.json")
    alone = {s["models"][0]: s["selection"]["heldout_loss"]["loss"] for s in said["steps"] if len(s["models"]) == 1}
    assert len(said["steps"]) == 7 and said["best_single"]["model"] == min(alone, key=alone.get) == said["ingredients"][0]
    assert said["soup"]["selection"]["heldout_loss"]["loss"] <= min(alone.values()) and "worse" not in said["ingredients"]
    assert set(said["soup"]["rest"]["heldout_loss"]) == {"loss"}, "and what it does on the groups that chose nothing"
    weights = dict.fromkeys(said["ingredients"], 1 / len(said["ingredients"]))
    assert close(logits(world, env, made.file("adapter")), by_hand(world, env, weights))
    other = stage(world, env, "merge", folders(world, *reversed(names)), method={"greedy_soup": {"rows": "rows"}}, inputs=rows, seed=2)
    assert other.json("merge.json")["ingredients"] == said["ingredients"]
    parts = {s["models"][0]: s for s in said["steps"][:4]}
    assert parts["zero"]["selection"] != parts["zero"]["rest"], "other groups, other items"


def test_a_soup_of_one_model_or_of_its_copies_is_that_model(world: World, env):
    rows = {"rows": rows_artifact(env.workspace, world.rows, name="rows")}
    truth = by_hand(world, env, {"good": 1.0})
    for method in ({"greedy_soup": {"rows": "rows"}}, "uniform_soup"):
        for copies in (1, 3):
            made = stage(world, env, "merge", {f"copy{i}": world.adapters["good"] for i in range(copies)}, method=method, inputs=rows)
            assert close(logits(world, env, made.file("adapter")), truth)


def test_the_scores_of_a_choice_are_those_of_the_evaluation(world: World, env):
    """The loss that the soup saw for one adapter is that of the model service with the adapter as it is, over all held-out rows."""
    from ftpipe.data.render import Renderer
    from ftpipe.models.loading import load_tokenizer
    from ftpipe.models.service import ModelService

    rows = {"rows": rows_artifact(env.workspace, world.rows, name="rows")}
    made = stage(world, env, "merge", folders(world, "good", "worse"), method={"greedy_soup": {"rows": "rows", "share": 1.0}}, inputs=rows)
    service = ModelService.open(str(world.model), env, adapter=world.adapters["good"] / "adapter", dtype="float32")
    shown = list(Renderer(load_tokenizer(str(world.model), env)).rows([r for r in world.rows if r["split"] == "heldout"]))
    scores = service.score(shown)
    expected = sum(s.nll for s in scores) / sum(s.trained_tokens for s in scores)
    step = next(s for s in made.json("merge.json")["steps"] if s["models"] == ["good"])
    assert step["selection"]["heldout_loss"]["loss"] == pytest.approx(expected, rel=1e-4) and "rest" not in step


def test_wise_ft_lists_target_and_forgetting_and_marks_where_less_is_forgotten(world: World, env):
    rows = {"rows": rows_artifact(env.workspace, world.rows, name="rows")}
    method = {"wise_ft": {"alpha": 0.5, "rows": "rows", "sweep": [0.0, 0.3, 1.0]}}
    made = stage(world, env, "merge", folders(world, "forgets"), method=method, inputs=rows)
    assert close(logits(world, env, made.file("adapter")), by_hand(world, env, {"forgets": 0.5}))
    sweep = {s["alpha"]: s for s in made.json("merge.json")["sweep"]}
    assert sorted(sweep) == [0.0, 0.3, 1.0]
    loss = {a: {k: s["scores"][k]["loss"] for k in ("heldout_loss", "general_text")} for a, s in sweep.items()}
    assert loss[1.0]["heldout_loss"] < loss[0.0]["heldout_loss"] and loss[0.0]["general_text"] < loss[1.0]["general_text"]
    for alpha, entry in sweep.items():
        assert entry["forgets_less"] == {"general_text": loss[alpha]["general_text"] < loss[1.0]["general_text"]}
    with pytest.raises(ConfigError, match="between the base and one adapter"):
        stage(world, env, "merge", folders(world, "forgets", "good"), method="wise_ft")
