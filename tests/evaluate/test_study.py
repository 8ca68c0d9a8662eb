"""What a study makes of an evaluation: planted scores come back as means, differences and costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ftpipe.artifacts import Artifact
from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.evaluate.compare import items_schema
from ftpipe.evaluate.study import costs, results
from ftpipe.registry.ledger import adapter_content
from ftpipe.report.collect import RunData
from ftpipe.report.numbers import NARROW
from ftpipe.report.page import render
from ftpipe.report.plots.pareto import frontier
from ftpipe.report.sections.study import _budget
from ftpipe.stages.study import Study
from tests.report.fake_artifacts import FakeRun

GAIN = {"base": 0.0, "chosen": 0.5, "random": 0.3}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> FakeRun:
    """Two arms of three seeds, an evaluation of 60 items under two suites, and what choosing the rows of one arm took."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = FakeRun(tmp_path_factory.mktemp("study"))
    run.add("pool", "curate_step", [], lambda out: (out / "a").write_text("p") and None, seconds=100.0, notes={"scoring": [{"tokens": 1}]})
    run.add("reference", "train", ["pool"], lambda out: (out / "a").write_text("r") and {"tokens": 4000}, seconds=30.0)
    run.add("selected", "curate_step", ["pool", "reference"], lambda out: (out / "a").write_text("s") and None, seconds=12.0,
            notes={"scoring": [{"tokens": 5000}, {"tokens": 600}]})

    def trained(name: str, seconds: float, *, steps: int = 3, second: str = "b") -> None:
        def write(out: Path) -> None:
            (out / "adapter").mkdir()
            (out / "adapter" / "adapter_model.safetensors").write_text(name * 100)
            (out / "train.json").write_text(json.dumps({"rows": 7, "steps": steps, "tokens": 900, "trained_tokens": 500, "trainable": 1234}))
            rows = ["a", second, "c", "d"][:steps]
            pq.write_table(pa.table({"row_id": rows, "first_step": range(1, steps + 1)}), out / "seen.parquet")
            pq.write_table(pa.table({"tokens": [300] * steps, "rows": [2] * steps}), out / "metrics.parquet")

        run.add(name, "train", ["selected" if name.startswith("chosen") else "pool"], write, seconds=seconds,
                notes={"memory_bytes": 10**9, "tokens_per_second": 300, "step_seconds": seconds - 9})

    for seed in (1, 2, 3):
        trained(f"chosen_{seed}", 60.0 + seed)
        trained(f"random_{seed}", 50.0 + seed, steps=3 + seed % 2, second="b" if seed < 3 else "x")
    rng = np.random.default_rng(0)
    hard = {"heldout_loss": rng.normal(3, 1, 60), "general_text": rng.normal(4, 1, 60)}
    systems = {"base": ("base", 0.0)} | {f"{arm}_{s}": (arm, 0.01 * s) for arm in ("chosen", "random") for s in (1, 2, 3)}
    rows = []
    for system, (arm, luck) in systems.items():
        for suite, difficulty in hard.items():
            gain = GAIN[arm] + luck if suite == "heldout_loss" else -0.1 * GAIN[arm]
            rows += [(system, suite, "loss", f"i{i}", "s", float(d - gain + rng.normal(0, 0.02)), 1.0 + i % 4, False, "") for i, d in enumerate(difficulty)]

    def write(out: Path) -> None:
        pq.write_table(pa.table([pa.array(c, f.type) for c, f in zip(zip(*rows), items_schema())], schema=items_schema()), out / "items.parquet")
        made = {n: {"adapter": adapter_content(run.artifacts[n])} for n in systems if n != "base"}
        (out / "evaluation.json").write_text(json.dumps({"systems": made | {"base": {"adapter": None}}, "forgetting": ["general_text"]}))

    run.add("asked", "evaluate", [n for n in systems if n != "base"], write)
    return run


def arms_of(run: FakeRun) -> dict[str, list[Artifact]]:
    return {arm: [run.artifacts[f"{arm}_{s}"] for s in (1, 2, 3)] for arm in ("chosen", "random")}


def test_planted_gains_come_back_with_their_intervals(run):
    found = results(run.artifacts["asked"], arms_of(run), ["random"], 0.95)
    by = {(c["suite"], c["a"], c["b"]): c for c in found["comparisons"]}
    assert set(by) == {(s, a, b) for s in ("heldout_loss", "general_text") for a, b in (("chosen", "base"), ("chosen", "random"), ("random", "base"))}
    c = by["heldout_loss", "chosen", "random"]
    assert c["difference"] == pytest.approx(0.2, abs=0.01) and c["better"] and not c["higher_is_better"] and c["seeds"] == 3 and c["n"] == 60
    assert by["heldout_loss", "chosen", "base"]["difference"] == pytest.approx(0.52, abs=0.01)
    assert by["general_text", "chosen", "base"]["worse"] and found["forgetting"] == ["general_text"]
    means = {(m["suite"], m["arm"]): m for m in found["means"]}
    assert means["heldout_loss", "base"]["mean"] - means["heldout_loss", "chosen"]["mean"] == pytest.approx(0.52, abs=0.01)
    assert len(set(means["heldout_loss", "chosen"]["by_seed"])) == 3
    assert found["arms"]["chosen"]["tokens"] == [900] * 3
    assert found["arms"]["chosen"]["same_rows"] and not found["arms"]["random"]["same_rows"], "of seed 3 another row came second"
    early = {arm: made[:2] for arm, made in arms_of(run).items()}
    assert results(run.artifacts["asked"], early, [], 0.95)["arms"]["random"]["same_rows"], "one step more is no other order"


def test_what_choosing_cost_leaves_out_what_all_share(run):
    found = costs(arms_of(run), {"chosen": run.artifacts["selected"]}, run.artifacts["pool"])
    assert found["chosen"]["selection"] == {"seconds": 42.0, "scored_tokens": 5600, "trained_tokens": 4000}
    assert found["random"]["selection"]["seconds"] == 0
    assert (found["chosen"]["seconds"], found["random"]["seconds"], found["chosen"]["memory_bytes"]) == (62.0, 52.0, 10**9)
    assert found["chosen"]["file_bytes"] == len("chosen_1") * 100


def test_an_adapter_that_was_not_evaluated_is_an_error(run):
    def write(out: Path) -> None:
        (out / "adapter").mkdir()
        (out / "adapter" / "adapter_model.safetensors").write_text("never asked")

    with pytest.raises(ArtifactError, match="does not hold the adapter of stray"):
        results(run.artifacts["asked"], {"a": [run.add("stray", "train", [], write)]}, [], 0.95)


def test_the_page_shows_every_arm_and_its_cost(run):
    def write(out: Path) -> None:
        (out / "study.json").write_text(json.dumps(found))

    found = results(run.artifacts["asked"], arms_of(run), ["random"], 0.95)
    spent = costs(arms_of(run), {"chosen": run.artifacts["selected"]}, run.artifacts["pool"])
    study = run.add("study", "study", ["asked"], write, notes={"costs": spent})
    page = render(RunData({"study": study}, roles={}, studies=["study"]), "proof")
    head = page[: page.index("<nav")]
    assert "On heldout_loss, against random, better: chosen (+0.2" in head and "On general_text, which measures forgetting, against random, " in head
    assert found["noise"][0]["runs"] == 6 and "stay within the noise floor of" in page and "would have shown four times in five" in page
    assert "5,600" not in page and "9,600 tokens" in page
    assert page.count("<svg") >= 8 and "Gain on heldout_loss against forgetting" in page and "by more than chance" not in page
    assert "The arms did not take as many steps as each other: 3 to 4." in page and "random saw other rows than chosen, or in another order." in page


def test_the_page_says_what_the_budget_was_and_what_each_arm_got():
    told = {"rows": [7, 7], "steps": [30, 31], "tokens": [900, 930], "trained_tokens": [5, 5], "same_rows": True}
    study = {"arms": {"lora": told | {"trainable": [980, 980]}, "full": told | {"trainable": [5000, 5000]}},
             "budget": {"seconds": 60.0, "parameters": 1000, "sizes": {"lora": "r 7: 980 parameters", "full": "no setting for its size: 5,000 parameters"}}}
    said = _budget(study, {"lora": {"step_seconds": 57.0}, "full": {"step_seconds": 66.0}})
    assert said[0].replace(NARROW, " ").startswith("Budget: 1 min 00 s of steps for each arm")
    assert said[0].replace(NARROW, " ").endswith("Used: lora 57 s (95 %), full 1 min 06 s (110 %).")
    assert "nearest" not in said[1] and "1,000 parameters. lora: r 7: 980 parameters, and 980 when it trained; full: no setting for its size" in said[1]
    assert said[2] == "All arms saw the same rows in the same order, as far as their steps went."
    equal = {"arms": {arm: told | {"steps": [30, 30], "trainable": [1, 1], "same_rows": True} for arm in ("a", "b")}, "budget": None}
    assert _budget(equal, {})[0] == "Budget: equal steps, 30 for each arm."
    equal["arms"]["a"]["same_rows"], equal["first"] = False, "b"  # the file has the arms in the order of their names
    assert _budget(equal, {})[1] == "a saw other rows than b, or in another order."


def test_the_frontier_is_what_nothing_beats_both_ways():
    points = [{"x": x, "y": y} for x, y in ((1, 1), (2, 3), (3, 2), (4, 4), (1, 0.5), (4, 3))]
    assert [(p["x"], p["y"]) for p in frontier(points)] == [(1, 1), (2, 3), (4, 4)]


@pytest.mark.parametrize("fields, said", [({"arms": {"a": ["x"], "b": ["x", "y"]}}, "same number"), ({"arms": {"base": ["x"]}}, "cannot be called")])
def test_arms_must_be_even(fields, said):
    with pytest.raises(ValueError, match=said):
        Study(evaluation="e", **fields)


def test_names_are_checked_before_anything_runs():
    class Asked:
        candidate, controls = "x", {}

    with pytest.raises(ConfigError, match="does not evaluate y"):
        Study(evaluation="e", arms={"a": ["x"], "b": ["y"]}).check(None, {"e": Asked()})
    with pytest.raises(ConfigError, match="is no arm"):
        Study(evaluation="e", arms={"a": ["x"]}, against=["c"]).check(None, {"e": Asked()})
