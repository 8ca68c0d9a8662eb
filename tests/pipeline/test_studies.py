"""Experiments as pipelines: what `prove` and `compare` write."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ftpipe import slots
from ftpipe.cli.compare import parsed
from ftpipe.errors import ConfigError
from ftpipe.pipeline import spec, studies
from ftpipe.stages.study import Budget
from tests.e2e.chain import make_project


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("study")) / "pipeline.yaml"


def test_a_proof_differs_between_arms_in_the_rows_alone(config):
    data = studies.prove(config, ["curated"], seeds=3, everything=True)
    out = config.with_name("proof.yaml")
    assert studies.write(data, out, config, what="proof", command="ftpipe prove") == "prove_report"
    assert "ftpipe run" in out.read_text() and not list(out.parent.glob(".*.new"))
    pipeline = spec.load(out)
    arms = pipeline.stages["prove_study"].arms
    assert list(arms) == ["curated", "random", "length_matched", "everything"] and {len(a) for a in arms.values()} == {3}
    for trained in zip(*arms.values()):  # one seed
        settings = [pipeline.stages[t].key_fields() for t in trained]
        assert len({str({k: v for k, v in s.items() if k != "rows"}) for s in settings}) == 1
        assert settings[0]["learning_rate"] == 3e-2 and settings[0]["epochs"] == 2
    seeds = [[pipeline.stages[t].seed for t in a] for a in arms.values()]
    assert seeds == [[3, 4, 5]] * 4  # the pipeline's seed first
    rows = {arm: [pipeline.stages[t].rows for t in made] for arm, made in arms.items()}
    assert rows["curated"][0] == "curated/sensitivity_sampling" and rows["everything"] == ["pool/decontaminate"] * 3
    assert len(set(rows["curated"])) == 3, "a step that draws draws anew for each seed"
    for arm, method in studies.CONTROLS.items():
        steps = [pipeline.stages[r] for r in rows[arm]]
        assert [s.step.name() for s in steps] == [method] * 3 and [s.seed for s in steps] == [3, 4, 5] and {s.rows for s in steps} == {"pool/decontaminate"}
        assert [s.step.budget.like for s in steps] == rows["curated"], "each control gets the tokens of the selection with its seed"
    ask = pipeline.stages["prove_evaluation"]
    assert {ask.candidate, *ask.controls.values()} == {t for a in arms.values() for t in a} and not ask.champion and ask.rows == "audit"


def test_what_draws_nothing_is_chosen_once(config):
    data = yaml.safe_load(config.read_text())
    data["stages"]["curated"]["steps"] = data["stages"]["curated"]["steps"][:1]
    other = config.with_name("still.yaml")
    other.write_text(yaml.safe_dump(data))
    stages = studies.prove(other, ["curated"], seeds=2)["stages"]
    assert [s["rows"] for n, s in stages.items() if n.startswith("prove_curated")] == ["curated", "curated"]


def test_a_comparison_changes_what_the_arms_say(config):
    arms = dict(map(parsed, ["lora=", "dft={objective: dft}", "small={adapt: {lora: {r: 2}}, learning_rate: 0.01}"]))
    data = studies.compare(config, "adapter", arms, seeds=2)
    out = config.with_name("comparison.yaml")
    studies.write(data, out, config, what="comparison", command="ftpipe compare")
    pipeline = spec.load(out)
    assert pipeline.stages["compare_study"].against == ["lora"]
    base, dft, small = (pipeline.stages[f"compare_{arm}_3"] for arm in ("lora", "dft", "small"))
    assert base.key_fields() == pipeline.stages["adapter"].key_fields()
    assert dft.objective.name() == "dft" and small.adapt.r == 2 and small.learning_rate == 0.01 and small.rows == base.rows


def test_equal_seconds_take_the_place_of_the_stages_end(config):
    data = studies.compare(config, "adapter", {"lora": {}, "dft": {"objective": "dft"}}, seconds=90)
    out = config.with_name("seconds.yaml")
    studies.write(data, out, config, what="comparison", command="ftpipe compare")
    pipeline = spec.load(out)
    trained = [pipeline.stages[f"compare_{arm}_3"] for arm in ("lora", "dft")]
    assert [(t.seconds, t.epochs, t.steps, t.tokens) for t in trained] == [(90, None, None, None)] * 2
    assert pipeline.stages["compare_study"].budget == Budget(seconds=90)
    with pytest.raises(ConfigError, match="arm b sets steps, and all arms are to train for 90 seconds"):
        studies.compare(config, "adapter", {"a": {}, "b": {"steps": 3}}, seconds=90)


def test_equal_parameters_choose_each_arms_size(config):
    """16 of rank 1 are 2 x 512 x 16; AdaLoRA has one number more for each rank of each of the 14 matrices."""
    arms = dict(map(parsed, ["lora=", "adalora={adapt: adalora}", "bits={adapt: {bitfit: {missing: add}}}"]))
    data = studies.compare(config, "adapter", arms, parameters=10_000, seconds=5, seeds=2)
    out = config.with_name("parameters.yaml")
    studies.write(data, out, config, what="comparison", command="ftpipe compare")
    pipeline = spec.load(out)
    for seed in (3, 4):
        lora, adalora, bits = (pipeline.stages[f"compare_{arm}_{seed}"].adapt for arm in arms)
        assert (lora.r, adalora.init_r, bits) == (10, 10, slots.parse("train/adapt", {"bitfit": {"missing": "add"}}))
    assert pipeline.stages["compare_study"].budget.model_dump() == {"seconds": 5, "parameters": 10_000, "sizes": {
        "lora": f"r 10, alpha 20: {10 * 2 * 512:,} parameters", "adalora": f"target_r 7, init_r 10, alpha 26.6667: {10 * (2 * 512 + 14):,} parameters",
        "bits": "no setting for its size: 512 parameters"}}
    with pytest.raises(ConfigError, match=r"arm lora: .*loraa"):
        studies.compare(config, "adapter", {"lora": {"adapt": "loraa"}}, parameters=10)


@pytest.mark.parametrize("call, said", [
    (lambda c: studies.prove(c, ["adapter"]), "no curate stage"),
    (lambda c: studies.prove(c, ["pool"]), "train stages read pool"),
    (lambda c: studies.prove(c, ["curated"], pool="pol"), "no stage 'pol'"),
    (lambda c: studies.prove(c, ["curated"], evaluation="gate"), "no evaluate stage"),
    (lambda c: studies.compare(c, "pool", {"a": {}}), "no train stage"),
    (lambda c: studies.write(studies.compare(c, "adapter", {"a": {"adapt": "loraa"}}), c.with_name("x.yaml"), c, what="", command=""), "loraa"),
    (lambda c: parsed("lora"), "is no arm"),
    (lambda c: parsed("lora=[1]"), "is no arm"),
])
def test_what_is_wrong_is_said_before_anything_is_written(config, call, said):
    with pytest.raises(ConfigError, match=said):
        call(config)
    assert not config.with_name("x.yaml").exists() and not list(config.parent.glob(".*.new"))


def test_the_shipped_comparison_trains_every_arm_on_the_same_rows():
    pipeline = spec.load(Path(__file__).parents[2] / "configs" / "compare.yaml")
    study = pipeline.stages["compare_study"]
    arms = [pipeline.stages[made] for made, in study.arms.values()]
    assert list(study.arms) == ["lora", "pissa", "dft", "bitfit", "lisa", "full"] and len({(a.rows, a.epochs, a.rows_per_step, a.seed) for a in arms}) == 1
    assert arms[0].key_fields() == pipeline.stages["adapter"].key_fields(), "the quickstart's own adapter is one of them"
    assert [a.adapt.name() for a in arms] == ["lora", "pissa", "lora", "bitfit", "lisa", "full"] and arms[2].objective.name() == "dft"
