"""A curate stage as a chain: names, references, what enters the key of a step, and what runs again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftpipe import slots
from ftpipe.errors import ConfigError
from ftpipe.pipeline import plan as planning
from ftpipe.pipeline.runner import run
from ftpipe.pipeline.spec import build
from ftpipe.pipeline.store import Store
from ftpipe.stages.base import Stage, StageContext, with_refs
from ftpipe.stages.curate_step import CurateStepStage


class TextsStage(Stage):
    """Rows from a text file, one a line, their tokens counted by words."""

    method_name = "texts"
    produces = "rows"
    path: str

    def externals(self, env):
        return {"source": env.path(self.path).read_text()}

    def run(self, ctx: StageContext) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from ftpipe.data.rows import rows_schema, write_annotations
        from tests.artifacts import complete, text

        rows = complete([text(line) for line in ctx.env.path(self.path).read_text().splitlines()])
        pq.write_table(pa.Table.from_pylist(rows, schema=rows_schema()), ctx.out / "rows.parquet")
        write_annotations(ctx.out, pa.table({"row_id": [r["row_id"] for r in rows], "tokens": [len(r["text"].split()) for r in rows]}))


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """Builds a pipeline over the stage `texts` and the given ones."""
    original = slots.Slot.get
    monkeypatch.setattr(slots.Slot, "get", lambda self, name: TextsStage if (self.name, name) == ("stages", "texts") else original(self, name))
    (tmp_path / "texts").write_text("\n".join(f"number {i} of the texts, {'x ' * (i % 7)}and {i}" for i in range(40)) + "\nnumber 1 of the texts, x and 1\n")

    def make(stages: dict[str, Any], **settings: Any):
        data = {"name": "p", "workspace": str(tmp_path / "ws"), "stages": {"texts": {"path": "texts"}, **stages}} | settings
        return build(data, base=Path(tmp_path))

    return make


STEPS = ["exact_dedup", {"length": {"by": "words", "least": 6}}, {"random": {"budget": {"share": 0.5}}}, {"length": {"by": "words", "most": 11}}, "shuffle"]


def chain(steps: list[Any] = STEPS, **fields: Any) -> dict[str, Any]:
    return {"curated": {"kind": "curate", "rows": "texts", "steps": steps, **fields}}


def reasons(pipeline) -> dict[str, str]:
    return {p.name: p.reason for p in planning.plan(pipeline, Store(pipeline.env.workspace)) if p.run}


def test_steps_are_stages_with_names(pipeline):
    made = pipeline(chain())
    names = ["curated/exact_dedup", "curated/length", "curated/random", "curated/length-2", "curated/shuffle"]
    assert list(made.stages) == ["texts", *names] and made.groups == {"curated": names}
    assert [made.stages[n].refs() for n in names] == [["texts"], *([n] for n in names[:-1])]
    assert made.resolve("curated") == "curated/shuffle" and made.resolve("length-2") == "curated/length-2"


def test_references_name_chains_and_steps(pipeline):
    control = {"kind": "curate", "rows": "curated/exact_dedup", "steps": [{"random": {"budget": {"like": "curated"}}}]}
    inside = [*STEPS, {"random": {"budget": {"like": "curated/random"}}}]
    made = pipeline(chain() | {"control": control} | {"other": {"kind": "curate_step", "rows": "control", "step": "shuffle"}})
    assert made.stages["control/random"].refs() == ["curated/exact_dedup", "curated/shuffle"]
    assert made.stages["control/random"].step.budget.like == "curated/shuffle"
    assert made.stages["other"].refs() == ["control/random"]
    assert made.stages["other"].seed == 0
    made = pipeline(chain(inside))
    assert made.stages["curated/random-2"].refs() == ["curated/shuffle", "curated/random"]
    with pytest.raises(ConfigError, match="wait for each other"):
        pipeline(chain([{"random": {"budget": {"like": "curated"}}}]))
    with pytest.raises(ConfigError, match="'curated/minhash', which is no stage"):
        pipeline(chain([{"random": {"budget": {"like": "curated/minhash"}}}]))


def test_references_deep_in_a_methods_settings_are_found_and_renamed():
    budget = {"budget": {"rows": 1}}
    steps = {"less": {"reference": ["a", "b"], "target": "c"} | budget, "lobass": {"reference": "a"} | budget,
             "instruct_mining": {"runs": [{"rows": "a", "evaluation": "b"}, {"rows": "c", "evaluation": "d"}]} | budget,
             "perplexity_correlations": {"models": {"m": {"losses": "a", "evaluation": "b"}, "n": {"losses": "c", "error": 1},
                                                    "o": {"losses": "d", "error": 2}}} | budget}
    wanted = {"less": "abc", "lobass": "a", "instruct_mining": "abcd", "perplexity_correlations": "abcd"}
    for name, settings in steps.items():
        stage = CurateStepStage(rows="rows", step={name: settings})
        assert sorted(stage.refs()) == sorted(["rows", *wanted[name]])
        assert sorted(with_refs(stage, lambda r: r + "!").refs()) == sorted(["rows!", *(f"{r}!" for r in wanted[name])])


def test_unknown_names_get_the_nearest(pipeline):
    with pytest.raises(ConfigError) as error:
        pipeline(chain(["exact_dedupe"]))
    assert "did you mean 'exact_dedup'" in str(error.value)
    with pytest.raises(ConfigError) as error:
        pipeline(chain([{"random": {"budget": {"token": 5}}}]))
    assert "token" in str(error.value)
    with pytest.raises(ConfigError, match="needs a budget"):
        pipeline(chain(["random"]))
    with pytest.raises(ConfigError, match="steps"):
        pipeline(chain([]))


def test_one_changed_setting_runs_one_step_and_what_follows(pipeline):
    done = run(pipeline(chain()))
    assert reasons(pipeline(chain())) == {}
    assert done.artifacts["curated/shuffle"].counts["rows_in"] == done.artifacts["curated/length-2"].counts["rows_kept"] > 5
    changed = [*STEPS[:3], {"length": {"by": "words", "most": 10}}, "shuffle"]
    why = reasons(pipeline(chain(changed)))
    assert list(why) == ["curated/length-2", "curated/shuffle"] and why["curated/length-2"] == "step.length.most 11 → 10"


def test_seed_and_model_run_only_the_steps_that_use_them(pipeline):
    run(pipeline(chain()))
    assert list(reasons(pipeline(chain(), seed=1))) == ["curated/random", "curated/length-2", "curated/shuffle"]
    assert list(reasons(pipeline(chain(seed=2)))) == ["curated/random", "curated/length-2", "curated/shuffle"]
    assert reasons(pipeline(chain(), model="another/model")) == {}


def test_the_identity_of_the_model_is_in_the_key_of_a_step_that_uses_it(pipeline, tiny_model, tmp_path):
    import shutil

    steps = ["exact_dedup", "loss"]
    with pytest.raises(ConfigError, match="loss needs a model"):
        pipeline(chain(steps)).check()
    for name in ("one", "copy"):
        shutil.copytree(tiny_model, tmp_path / name)
    stages = [pipeline(chain(steps), model=str(tmp_path / n)).stages for n in ("one", "copy")]
    env = pipeline(chain()).env
    before, same = (s["curated/loss"].externals(env)["model"] for s in stages)
    assert before == same and stages[0]["curated/loss"].key_fields() == stages[1]["curated/loss"].key_fields()
    assert stages[0]["curated/exact_dedup"].externals(env) == {}
    (tmp_path / "copy" / "config.json").write_text((tmp_path / "copy" / "config.json").read_text() + " ")
    assert pipeline(chain(steps), model=str(tmp_path / "copy")).stages["curated/loss"].externals(env)["model"] != before


def test_an_earlier_duplicate_does_not_change_what_follows(pipeline, tmp_path):
    """Inputs enter keys by content: a row that deduplication drops again leaves all later steps as they are."""
    run(pipeline(chain()))
    with (tmp_path / "texts").open("a") as f:
        f.write("number  2 of the texts, x x and 2\n")
    made = run(pipeline(chain()))
    states = {name: entry["state"] for name, entry in made.record["stages"].items()}
    assert states["texts"] == states["curated/exact_dedup"] == "built"
    assert made.artifacts["curated/exact_dedup"].counts["dropped: exact duplicate"] == 2
    assert made.artifacts["curated/exact_dedup"].counts["rows_kept"] == 40
