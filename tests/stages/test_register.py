"""From a candidate to a registered champion and back: what passes is registered once, what does not changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.pipeline.plan import plan
from ftpipe.pipeline.runner import run
from ftpipe.pipeline.spec import build
from ftpipe.pipeline.store import Store
from ftpipe.registry import ledger, register, versions
from tests.evaluate.world import World, config


def went(world: World, workspace: Path, candidate: str, **options):
    """Run the pipeline for a candidate. Returns (registration, stages that were built)."""
    done = run(build(config(world, workspace, candidate, **options)))
    return done.artifacts["register"].json("registration.json"), [n for n, s in done.record["stages"].items() if s["state"] == "built"]


def test_a_better_candidate_is_registered_and_an_unchanged_second_run_does_nothing(world: World, workspace: Path):
    done, built = went(world, workspace, "good")
    assert (done["registered"], done["version"], done["alias"], done["champion_before"]) == (True, 1, "champion", None)
    assert built == ["rows", "adapter", "evaluate", "gate", "register"]
    planned = plan(build(config(world, workspace, "good")), Store(workspace))
    assert [p.run for p in planned] == [False] * 5, "its own promotion must not make the evaluation run again"
    again, built = went(world, workspace, "good")
    assert built == [] and again == done


@pytest.mark.parametrize("candidate, failed", [("zero", "better than the base"), ("worse", "better than the base"), ("forgets", "forgets little")])
def test_what_learnt_nothing_or_forgot_is_refused_and_leaves_no_trace(world: World, workspace: Path, candidate: str, failed: str):
    done, _ = went(world, workspace, candidate)
    assert not done["registered"] and done["version"] is None and failed in done["reason"]
    assert ledger.list_models(build(config(world, workspace, candidate)).env) == []


def test_a_champion_is_kept_against_a_weaker_candidate_and_known_by_the_plan(world: World, workspace: Path):
    went(world, workspace, "good")
    env = build(config(world, workspace, "good")).env
    done, _ = went(world, workspace, "forgets", gate={"rules": [{"suite": "heldout_loss"}, {"suite": "heldout_loss", "against": "champion"}]})
    assert not done["registered"] and "champion has" in done["reason"] and ledger.champion(env, "demo")["version"] == 1
    weaker = {"rules": [{"suite": "heldout_loss"}]}
    done, _ = went(world, workspace, "forgets", gate=weaker)
    assert (done["version"], done["alias"], done["champion_before"]) == (2, "champion", 1)
    _, built = went(world, workspace, "forgets", gate=weaker)
    assert built == [], "the second champion's own run is settled too"
    planned = {p.name: p for p in plan(build(config(world, workspace, "good")), Store(workspace))}
    assert planned["evaluate"].run and "champion" in planned["evaluate"].reason, "the first one now has somebody to beat"


def test_the_champion_and_trainings_with_other_seeds_are_measured_beside_the_candidate(world: World, workspace: Path):
    went(world, workspace, "good")
    suites = {"controls": {"again": "forgets", "random": "worse"},
              "evaluate": {"replicates": ["again"], "examples": 0,
                           "diagnostics": ["slices", {"calibration": {"limit": 3}}, {"intruder_dimensions": {"top": 2}}]},
              "gate": {"rules": [{"suite": "heldout_loss", "against": "champion"}, {"suite": "heldout_loss"},
                                 {"suite": "heldout_loss", "by": "slice", "min_items": 2}, {"suite": "heldout_loss", "against": "controls"}],
                       "above_noise": True}}
    done = run(build(config(world, workspace, "zero", **suites)))
    evaluation, verdict = done.artifacts["evaluate"], done.artifacts["gate"].json("verdict.json")
    looked = {n: {x["system"] for x in evaluation.json(f"diagnostics/{n}.json")["numbers"]} for n in ("slices", "calibration", "intruder_dimensions")}
    assert looked == {"slices": {"base", "champion"}, "calibration": {"base", "adapter", "again", "random", "champion"},
                      "intruder_dimensions": {"adapter", "again", "random", "champion"}}
    compared = {(c["a"], c["b"]): c for c in evaluation.json("comparisons.json") if c["suite"] == "heldout_loss"}
    assert compared["champion", "base"]["better"], "the champion's own gain is known too"
    floor = next(n for n in evaluation.json("evaluation.json")["noise"] if n["suite"] == "heldout_loss")
    assert floor["runs"] == 2 and floor["largest"] == pytest.approx(abs(compared["adapter", "again"]["difference"]))
    assert [(r["against"], r["part"], r["floor"] == floor["floor"]) for r in verdict["rules"]] == [
        ("champion", "", True), ("base", "", True), *(("base", f"module{i}", True) for i in (0, 3)), ("random", "", True)]
    with pytest.raises(ConfigError, match="which is no control"):
        build(config(world, workspace, "good", evaluate={"replicates": ["nobody"]}))
    with pytest.raises(ConfigError, match="has no `replicates`"):
        build(config(world, workspace, "good", gate={"above_noise": True})).check()


def test_a_roll_back_by_hand_is_not_undone_by_an_unchanged_run(world: World, workspace: Path):
    weaker = {"rules": [{"suite": "heldout_loss"}]}
    went(world, workspace, "good")
    went(world, workspace, "forgets", gate=weaker)
    env = build(config(world, workspace, "good")).env
    register.rollback(env, "demo", reason="it lost its prose")
    _, built = went(world, workspace, "forgets", gate=weaker)
    assert built == [] and ledger.champion(env, "demo")["version"] == 1


def test_a_version_that_is_gone_is_registered_again(world: World, workspace: Path):
    done, _ = went(world, workspace, "good")
    env = build(config(world, workspace, "good")).env
    shutil.rmtree(ledger.folder(env, "demo") / done["content"])
    again, built = went(world, workspace, "good")
    assert built == ["register"] and again["version"] == 1 and versions.verify(env, "demo", 1) == []


def test_the_folder_holds_what_others_need(world: World, workspace: Path):
    from huggingface_hub import ModelCard
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    went(world, workspace, "good", controls={"random": "worse"})
    env = build(config(world, workspace, "good")).env
    folder = versions.load_version(env, "demo", "champion")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.model), folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter_model.safetensors", "adapter_config.json", "ftpipe_adapter.json", "README.md", "evidence/probe.safetensors",
                                      "evidence/verdict.json", "evidence/comparisons.json"}
    assert manifest["base"]["weights"] and manifest["tokenizer"] and manifest["chat_template"]
    assert {s["kind"] for s in manifest["lineage"]} == {"gate", "evaluate", "planted_adapter", "planted_rows"}
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "peft" and "base_model" not in front, "a local folder is no hub id"
    result = front["model-index"][0]["results"][0]
    comparisons = json.loads((folder / "evidence" / "comparisons.json").read_text())
    assert result["metrics"][0]["value"] == pytest.approx(comparisons[0]["mean_a"], abs=1e-6)
    card = ModelCard(text)
    own = [c for c in comparisons if (c["a"], c["b"]) == ("adapter", "base")]
    assert [r.metric_value for r in card.data.eval_results] == [pytest.approx(c["mean_a"], abs=1e-6) for c in own]
    assert card.data.metrics == ["loss"] and card.data.library_name == "peft" and card.data.pipeline_tag == "text-generation"
    limits = text[text.index("## Limits"): text.index("## Verdict")]
    assert "8 items of heldout_loss, 32 items of general_text only" in limits and "Forgetting: on general_text it is " in limits
    assert "the luck of the seed is in no interval" in limits and "refuses what it should was not measured" in limits and "slices: Parts in which" in limits
    assert "better than the base" in (folder / "evidence" / "verdict.json").read_text() and "| rows | planted_rows |" in text


def test_an_adapter_for_another_base_is_refused_by_the_registry_load(world: World, workspace: Path, tmp_path: Path):
    from tests.tiny import make_tiny_model

    went(world, workspace, "good")
    env = build(config(world, workspace, "good")).env
    other = make_tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(ArtifactError, match="the adapter was trained on"):
        versions.load_model(env, "demo", "champion", str(other))
    assert versions.load_model(env, "demo", "champion", str(world.model), dtype="float32") is not None


def test_a_champion_for_another_base_stops_the_run_before_it_starts(world: World, workspace: Path, tmp_path: Path):
    from tests.tiny import make_tiny_model

    went(world, workspace, "good")
    other = config(world, workspace, "good") | {"model": str(make_tiny_model(tmp_path / "other", seed=9))}
    with pytest.raises(ConfigError, match="is an adapter for"):
        run(build(other))


def test_an_adapter_that_was_not_saved_as_it_was_trained_is_not_registered(world: World, workspace: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(world.adapters["good"], broken)
    probe = load_file(broken / "probe.safetensors")
    save_file(probe | {"logits": probe["logits"] + probe["logits"].abs().max() * 0.02}, broken / "probe.safetensors")
    planted = World(world.model, {"broken": broken}, world.rows)
    with pytest.raises(ArtifactError, match="other logits than the trained model"):
        went(planted, workspace, "broken")
    env = build(config(planted, workspace, "broken")).env
    assert ledger.list_models(env) == [] and not list(ledger.folder(env, "demo").glob(".building*"))


@pytest.mark.parametrize("evaluate, registers, said", [({}, {"registered_as": "other"}, "set `registered_as` alike"),
                                                       ({}, {"alias": "latest"}, "for itself"), ({}, {"alias": "9x"}, "pattern")])
def test_settings_that_do_not_fit_are_found_before_anything_runs(world: World, workspace: Path, evaluate, registers, said):
    with pytest.raises(ConfigError, match=said):
        build(config(world, workspace, "good", evaluate=evaluate, register=registers)).check()


def test_a_name_of_ones_own(world: World, workspace: Path):
    done, _ = went(world, workspace, "good", evaluate={"registered_as": "helper", "alias": "live"}, register={"registered_as": "helper", "alias": "live"})
    env = build(config(world, workspace, "good")).env
    assert done["uri"] == "models:/helper/1" and ledger.list_models(env) == ["helper"] and ledger.aliases(env, "helper") == {"live": 1}
