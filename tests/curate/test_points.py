"""The POINTS recipe: what each model of the soup is trained on, and the filter before it."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from ftpipe.pipeline import spec
from tests.artifacts import chat, complete, decisions, kept_ids, rows_artifact, run_stage, run_step
from tests.models.data import context, some_rows


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copy(files("configs") / "recipes" / "points.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return spec.load("points.yaml")


def test_model_i_is_trained_on_the_common_rows_and_data_set_i(tmp_path, tiny_model, recipe):
    """The recipe's own steps, on rows from three files and one that no model is for."""
    rows = [chat(f"{name} {i}?", "yes", source=f"{name}.jsonl") for name in ("common", "extra-1", "extra-2", "other") for i in range(3)]
    pool = rows_artifact(tmp_path, [*rows, chat("held?", "yes", split="heldout", source="common.jsonl")], name="pool/perplexity")
    for i in (1, 2):
        stage = recipe.stages[recipe.resolve(f"rows_{i}")]
        assert stage.rows == pool.name and recipe.stages[f"model_{i}"].rows == recipe.resolve(f"rows_{i}")
        out = run_stage(tmp_path, stage, {pool.name: pool})
        assert sorted(RowSet(out).table()["source"].to_pylist()) == ["common.jsonl"] * 3 + [f"extra-{i}.jsonl"] * 3
        assert len(kept_ids(out, "heldout")) == 1 and out.counts["dropped: from another source"] == 6
    assert recipe.stages["soup"].adapters == ["model_1", "model_2"] == recipe.stages["average"].adapters
    one, two = (recipe.stages[f"model_{i}"].model_dump(exclude={"rows"}) for i in (1, 2))
    assert one == two, "from the same base, in the same way"


def test_a_source_that_is_not_there_is_named(tmp_path):
    source = rows_artifact(tmp_path, [chat("a?", "b", source="data/common.jsonl"), chat("c?", "d", source="extra.jsonl")])
    assert len(kept_ids(run_step(tmp_path, source, {"source": {"keep": ["*common.jsonl"]}}))) == 1
    with pytest.raises(DataError, match=r"comes from 'common\.jsonl'") as error:
        run_step(tmp_path, source, {"source": {"keep": ["extra.jsonl", "common.jsonl"]}})
    assert "did you mean 'data/common.jsonl'" in str(error.value)


def test_the_filter_of_the_recipe_keeps_a_fifth_by_the_mean_of_the_tokens(tmp_path, tiny_model, recipe):
    """Each perplexity is exp(mean loss of the answer's tokens) to 1e-4, and the kept are exactly the int(0.2 n) lowest."""
    from ftpipe.data.render import Renderer
    from ftpipe.models.loading import load_tokenizer
    from ftpipe.models.service import ModelService

    rows = some_rows(23)
    out = run_step(tmp_path, rows_artifact(tmp_path, rows), recipe.stages["pool/perplexity"].step, model=str(tiny_model))
    env = context(tmp_path).env
    service, renderer, truth = ModelService.open(str(tiny_model), env), Renderer(load_tokenizer(str(tiny_model), env)), {}
    import torch

    for row in complete(rows):
        r = renderer.row(row)
        with torch.inference_mode():
            logp = torch.log_softmax(service.model(input_ids=torch.tensor([r.input_ids])).logits[0].float(), -1)
        truth[row["row_id"]] = float(np.exp(np.mean([-logp[t - 1, r.input_ids[t]].item() for t in range(1, len(r.input_ids)) if r.trained[t]])))
    found = decisions(out)
    assert all(found[i]["score"] == pytest.approx(p, rel=1e-4) for i, p in truth.items())
    assert sorted(kept_ids(out)) == sorted(sorted(truth, key=truth.get)[:4]) and int(0.2 * 23) == 4
