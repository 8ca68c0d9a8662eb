"""Evaluate on a tiny model and adapters of known worth."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError, DataError
from ftpipe.pipeline.plan import plan
from ftpipe.pipeline.runner import Run, run
from ftpipe.pipeline.spec import Pipeline, build
from ftpipe.pipeline.store import Store
from ftpipe.stages.base import Listener
from tests.evaluate.world import World, config


def evaluated(world: World, workspace: Path, candidate: str, **options):
    return run(alone(world, workspace, candidate, **options)).artifacts["evaluate"]


def alone(world: World, workspace: Path, candidate: str, **options) -> Pipeline:
    """The pipeline up to its evaluation."""
    data = config(world, workspace, candidate, **options)
    del data["stages"]["gate"], data["stages"]["register"]
    return build(data)


def by_pair(artifact) -> dict[tuple[str, str, str], dict]:
    return {(c["suite"], c["a"], c["b"]): c for c in artifact.json("comparisons.json")}


def test_every_system_is_scored_on_the_same_items_and_truth_is_found(world: World, workspace: Path):
    artifact = evaluated(world, workspace, "good", controls={"random": "worse"})
    items = pq.read_table(artifact.file("items.parquet")).to_pylist()
    asked = {(s, i["suite"]): set() for s in ("base", "adapter", "random") for i in items}
    for i in items:
        asked[i["system"], i["suite"]].add(i["item_id"])
    heldout = set(RowSet(artifact.inputs()["rows"]).ids("heldout"))
    assert all(asked[s, "heldout_loss"] == heldout for s in ("base", "adapter", "random")) and len(heldout) == 8
    assert asked["base", "general_text"] == asked["adapter", "general_text"] and len(asked["base", "general_text"]) == 32
    assert {i["slice"] for i in items if i["suite"] == "heldout_loss"} <= {f"module{k}" for k in range(6)}
    pairs = by_pair(artifact)
    assert pairs["heldout_loss", "adapter", "base"]["better"] and pairs["heldout_loss", "adapter", "random"]["better"]
    assert not pairs["heldout_loss", "random", "base"]["better"] and pairs["heldout_loss", "random", "base"]["high"] < 0
    c = pairs["heldout_loss", "adapter", "base"]
    assert c["difference"] == pytest.approx(c["mean_b"] - c["mean_a"]) and c["low"] < c["difference"] < c["high"]


def test_an_evaluation_can_be_read_as_runs_with_a_loss_for_each_domain(world: World, workspace: Path):
    from ftpipe.curate.mix._runs import runs_of

    artifact = evaluated(world, workspace, "good", controls={"random": "worse"})
    found = runs_of(artifact, "group", "heldout_loss", "here", seen=False)
    assert sorted(found) == ["adapter", "base", "random"]
    items = [i for i in pq.read_table(artifact.file("items.parquet")).to_pylist() if i["suite"] == "heldout_loss"]
    for system, run_ in found.items():
        for group, loss in run_.loss.items():  # the slice of a held-out row is its group
            these = [i for i in items if (i["system"], i["slice"]) == (system, group)]
            assert loss == pytest.approx(sum(i["score"] * i["weight"] for i in these) / sum(i["weight"] for i in these)) and these
    assert {g for r in found.values() for g in r.loss} == {i["slice"] for i in items}
    with pytest.raises(DataError, match="does not say what was trained on"):
        runs_of(artifact, "group", "heldout_loss", "here")
    with pytest.raises(DataError, match="is no held-out row"):
        runs_of(artifact, "group", "general_text", "here")


def test_the_loss_is_the_one_computed_by_hand(world: World, workspace: Path):
    import torch

    from ftpipe.models.loading import load_adapted, load_tokenizer

    artifact = evaluated(world, workspace, "good")
    pipeline = build(config(world, workspace, "good"))
    model = load_adapted(str(world.model), pipeline.env, world.adapters["good"] / "adapter", dtype="float32")
    tokenizer = load_tokenizer(str(world.model), pipeline.env)
    total = count = 0
    for row in (r for r in world.rows if r["split"] == "heldout"):
        prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, tokenize=False)
        answer = row["messages"][1]["content"] + "<|im_end|>"
        start, ids = len(tokenizer(prompt)["input_ids"]), tokenizer(prompt + answer)["input_ids"]
        with torch.inference_mode():
            losses = torch.nn.functional.cross_entropy(model(input_ids=torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
        total, count = total + losses[start - 1:].sum().item(), count + len(ids) - start
    assert by_pair(artifact)["heldout_loss", "adapter", "base"]["mean_a"] == pytest.approx(total / count, rel=1e-5)


def test_a_zero_adapter_is_the_base_exactly(world: World, workspace: Path):
    pairs = by_pair(evaluated(world, workspace, "zero"))
    for suite in ("heldout_loss", "general_text"):
        c = pairs[suite, "adapter", "base"]
        assert (c["difference"], c["low"], c["high"], c["better"]) == (0, 0, 0, False)


def test_the_base_is_not_asked_again_for_another_adapter_nor_for_more_items(world: World, workspace: Path):
    first = evaluated(world, workspace, "good")
    assert first.manifest["notes"]["asked"] == 2 * (8 + 32) + 4 and first.manifest["notes"]["cached"] == 0
    second = evaluated(world, workspace, "worse", controls={"old": "good"})
    assert second.manifest["notes"]["asked"] == 8 + 32 + 2, "only the new adapter"
    third = evaluated(world, workspace, "worse", controls={"old": "good"}, evaluate={"resamples": 500, "suites": ["heldout_loss"]})
    assert third.manifest["notes"]["asked"] == 0
    one, two = by_pair(first)["heldout_loss", "adapter", "base"], by_pair(third)["heldout_loss", "old", "base"]
    assert one["difference"] == two["difference"], "a number from the cache is the number that was measured"


def test_one_edited_held_out_row_is_asked_alone(world: World, workspace: Path):
    evaluated(world, workspace, "good", evaluate={"examples": 0})
    rows = json.loads(json.dumps(world.rows))
    from tests.artifacts import complete

    heldout = next(r for r in rows if r["split"] == "heldout")
    heldout["messages"][1]["content"] += "!"
    for key in ("row_id", "content_id"):
        del heldout[key]
    edited = World(world.model, world.adapters, complete(rows))
    again = evaluated(edited, workspace, "good", evaluate={"examples": 0})
    assert again.manifest["notes"]["asked"] == 2


def test_a_damaged_cache_is_noticed_and_asked_anew(world: World, workspace: Path):
    first = evaluated(world, workspace, "good", evaluate={"examples": 0})
    shard = next(p for p in (workspace / "cache" / "evaluate").rglob("*.jsonl") if len(p.read_text().splitlines()) == 8)
    shard.write_bytes(shard.read_bytes().replace(b"0.", b"1.", 1).replace(b"3.", b"4.", 1)[:-1] + b" ")
    again = evaluated(world, workspace, "good", evaluate={"examples": 0, "resamples": 401})
    assert again.manifest["notes"]["asked"] == 8
    assert by_pair(again)["heldout_loss", "adapter", "base"]["mean_a"] == by_pair(first)["heldout_loss", "adapter", "base"]["mean_a"]


def test_what_was_scored_before_a_crash_is_not_scored_again(world: World, workspace: Path, monkeypatch: pytest.MonkeyPatch):
    from ftpipe.models.service import ModelService

    real, calls = ModelService.score, 0

    def fails(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("out of memory")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(ModelService, "score", fails)
    with pytest.raises(RuntimeError):
        evaluated(world, workspace, "good", evaluate={"examples": 0})
    monkeypatch.setattr(ModelService, "score", real)
    assert evaluated(world, workspace, "good", evaluate={"examples": 0}).manifest["notes"]["asked"] == 80 - 3 * 4


def test_examples_are_answered_by_base_and_candidate(world: World, workspace: Path):
    artifact = evaluated(world, workspace, "good")
    examples = pq.read_table(artifact.file("examples.parquet")).to_pylist()
    speed = artifact.manifest["notes"]["generation"]
    assert set(speed) == {"base", "adapter"} and all(0 < s["tokens"] <= 2 * 8 and s["tokens_per_second"] > 0 for s in speed.values())
    assert [e["system"] for e in examples] == ["base", "adapter"] * 2
    assert examples[0]["item_id"] == examples[1]["item_id"] and examples[0]["prompt"].startswith("code ") and examples[0]["reference"].endswith("ok")


def test_progress_counts_to_the_end_and_only_one_system_is_loaded_at_a_time(world: World, workspace: Path, monkeypatch: pytest.MonkeyPatch):
    import gc
    import weakref

    from ftpipe.models.service import ModelService

    alive: list[weakref.ref] = []
    most, opened = 0, 0
    real = ModelService.open

    def counted(*args, **kwargs):
        nonlocal most, opened
        service = real(*args, **kwargs)
        alive.append(weakref.ref(service))
        gc.collect()
        most, opened = max(most, sum(r() is not None for r in alive)), opened + 1
        return service

    monkeypatch.setattr(ModelService, "open", counted)
    seen: list[tuple[float, float]] = []

    class Ear(Listener):
        def progress(self, name, done, total, unit, metrics):
            if unit == "items":
                seen.append((done, total))

    this = Run(alone(world, workspace, "good", controls={"random": "worse"}), listener=Ear())
    for name in this.order:
        this.execute(name)
    assert (most, opened) == (1, 3)
    assert seen[-1][0] == seen[-1][1] == 3 * 40 + 4 and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_the_same_evaluation_twice_gives_the_same_bytes(world: World, workspace: Path, tmp_path: Path):
    one = evaluated(world, workspace, "good", evaluate={"resample": "slices"})
    two = evaluated(world, tmp_path / "other", "good", evaluate={"resample": "slices"})
    assert one.content == two.content and not math.isnan(by_pair(one)["heldout_loss", "adapter", "base"]["low"])


def test_without_held_out_rows_it_says_what_to_do(world: World, workspace: Path):
    bare = World(world.model, world.adapters, [r for r in world.rows if r["split"] == "train"])
    with pytest.raises(DataError, match="no held-out rows"):
        evaluated(bare, workspace, "good")


@pytest.mark.parametrize("settings, said", [({"controls": {"base": "adapter"}}, "cannot be called 'base'"),
                                            ({"suites": ["heldout_loss", "heldout_loss"]}, "two suites are called"),
                                            ({"suites": ["heldout"]}, "did you mean 'heldout_loss'")])
def test_settings_that_cannot_work_are_found_when_the_file_is_read(world: World, workspace: Path, settings, said):
    with pytest.raises(ConfigError, match=said):
        build(config(world, workspace, "good", evaluate=settings))


def test_slices_show_where_the_candidate_lost(world: World, workspace: Path):
    artifact = evaluated(world, workspace, "worse", evaluate={"diagnostics": [{"slices": {"min_items": 1}}]})
    table = pq.read_table(artifact.file("diagnostics/slices.parquet")).to_pylist()
    mine = [r for r in table if (r["suite"], r["by"]) == ("heldout_loss", "slice")]
    assert len(mine) == 6 and all(r["difference"] < 0 and r["difference"] == pytest.approx(r["other"] - r["adapter"]) for r in mine)
    numbers = artifact.json("diagnostics/slices.json")["numbers"]
    assert {n["of"]: n["value"] for n in numbers}["heldout_loss loss by group"] == 1.0


def test_own_general_text_and_a_bad_line_in_it(world: World, workspace: Path, tmp_path: Path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "A plain sentence about nothing."}\n{"txt": 1}\n')
    with pytest.raises(DataError, match=r"own.jsonl:2: not a line of general text"):
        evaluated(world, workspace, "good", evaluate={"suites": [{"general_text": {"path": str(path)}}]})
    path.write_text('{"text": "A plain sentence about nothing."}\n')
    artifact = evaluated(world, workspace, "good", evaluate={"suites": [{"general_text": {"path": str(path), "label": "own"}}], "examples": 0})
    c, = artifact.json("comparisons.json")
    assert (c["suite"], c["n"], c["low"], c["better"]) == ("own", 1, None, False), "one item proves nothing"
    assert artifact.json("evaluation.json")["forgetting"] == ["own"]
    path.write_text('{"text": "Another plain sentence."}\n')
    pipeline = alone(world, workspace, "good", evaluate={"suites": [{"general_text": {"path": str(path), "label": "own"}}], "examples": 0})
    planned = {p.name: p for p in plan(pipeline, Store(workspace))}["evaluate"]
    assert planned.run and "suites.own.text changed" in planned.reason


def test_generated_answers_are_scored_and_their_speed_is_a_note(world: World, workspace: Path):
    from ftpipe.models.service import ModelService

    suite = {"generation": {"checker": {"regex": {"pattern": "^ +$", "compare": False}}, "max_new_tokens": 6, "limit": 2}}
    pipeline = alone(world, workspace, "good", evaluate={"suites": [suite], "examples": 0})
    artifact = run(pipeline).artifacts["evaluate"]
    c, = artifact.json("comparisons.json")
    asked = [r["messages"][:1] for r in world.rows if r["split"] == "heldout"][:2]
    for mean, adapter in ((c["mean_a"], world.adapters["good"] / "adapter"), (c["mean_b"], None)):
        service = ModelService.open(str(world.model), pipeline.env, adapter=adapter, dtype="float32")
        texts = [g.text for g in service.generate([service.renderer.prompt(a) for a in asked], max_new_tokens=6, batch_size=1)]
        assert mean == sum(bool(t) and not t.strip(" ") for t in texts) / 2
    assert (c["suite"], c["metric"], c["n"]) == ("generation", "regex", 2)
    speed = artifact.manifest["notes"]["generation"]
    assert set(speed) == {"base", "adapter"} and all(0 < s["tokens"] <= 12 and s["tokens_per_second"] > 0 for s in speed.values())
    again = evaluated(world, workspace, "good", evaluate={"suites": [suite], "examples": 0, "resamples": 401})
    assert again.manifest["notes"]["asked"] == 0 and "generation" not in again.manifest["notes"]


def test_diagnostics_look_at_real_adapters(world: World, workspace: Path):
    chosen = [{"forgetting_law": {"text": {"limit": 4}}}, "learns_less"]
    artifact = evaluated(world, workspace, "zero", controls={"good": "good", "lost": "forgets"}, evaluate={"diagnostics": chosen, "examples": 0})
    law = {n["system"]: n["value"] for n in artifact.json("diagnostics/forgetting_law.json")["numbers"] if n["measure"] == "excess over the base"}
    assert abs(law["adapter"]) < 1e-6 < law["good"] < law["lost"] and artifact.json("evaluation.json")["diagnostics"] == ["forgetting_law", "learns_less"]
    table = {r["system"]: r for r in pq.read_table(artifact.file("diagnostics/learns_less.parquet")).to_pylist()}
    assert table["adapter"]["k90_change"] is None and table["adapter"]["learning"] == 0, "nothing was changed"
    assert table["lost"]["forgetting"] > table["good"]["forgetting"] and table["good"]["numerical_rank"] <= table["good"]["rank"] == 4
    assert table["good"]["k90_change"] <= 4 < table["good"]["k90_noise"]
    assert all(artifact.json(f"diagnostics/{n}.json")["plots"] for n in ("forgetting_law", "learns_less"))
