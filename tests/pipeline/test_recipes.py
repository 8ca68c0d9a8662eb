"""Every recipe that ships is a pipeline that can be planned: all names, settings and references hold."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from ftpipe.pipeline import spec

RECIPES = sorted(p.name for p in (files("configs") / "recipes").iterdir() if p.name.endswith(".yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    shutil.copy(files("configs") / "recipes" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    pipeline = spec.load(name)
    assert f"{pipeline.settings.name}.yaml" == name and len(pipeline.stages) > 3
    assert all(pipeline.resolve(ref) in pipeline.stages for stage in pipeline.stages.values() for ref in stage.refs())
