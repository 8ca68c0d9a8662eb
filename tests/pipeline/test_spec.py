"""A pipeline file is checked before anything runs, and an error names file, line, field and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftpipe.errors import ConfigError
from ftpipe.pipeline import spec


def test_chain_is_expanded_and_its_name_means_its_last_step(project: Path) -> None:
    pipeline = spec.load("pipeline.yaml")
    assert list(pipeline.stages) == ["numbers", "big", "bigger/0", "bigger/1", "total"]
    assert pipeline.stages["total"].refs() == ["big", "bigger/1"]
    assert pipeline.resolve("bigger") == "bigger/1"
    assert pipeline.upstream("bigger/0") == {"numbers", "big", "bigger/0"}
    assert pipeline.downstream("bigger/0") == {"bigger/0", "bigger/1", "total"}


@pytest.mark.parametrize(("old", "new", "line", "words"), [
    ("threshold: 4", "treshold: 4", 8, ["unknown key 'treshold'", "did you mean 'threshold'?"]),
    ("threshold: 4", "threshold: four", 8, ["stages.big.threshold", "'four'"]),
    ("kind: above", "kind: abov", 5, ["no kind of stage is called 'abov'", "did you mean 'above'?"]),
    ("rows: numbers", "rows: number", 5, ["reads 'number', which is no stage", "did you mean 'numbers'?"]),
    ("    path: numbers.txt\n", "", 3, ["stages.numbers.path is missing"]),
    ("name: demo", "name: demo\nnmae: x", 2, ["unknown key 'nmae'", "did you mean 'name'?"]),
    ("name: demo", "name: a b", 1, ["name", "letters, digits"]),
    ("name: demo", "name: [unclosed", 2, ["not valid YAML"]),
    ("    threshold: 4", "    threshold: 4\n    threshold: 5", 9, ["'threshold' is written twice"]),
])
def test_mistakes_are_named_with_their_line(project: Path, old: str, new: str, line: int, words: list[str]) -> None:
    file = project / "pipeline.yaml"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ConfigError) as caught:
        spec.load("pipeline.yaml")
    for word in words:
        assert word in str(caught.value)
    assert f"pipeline.yaml:{line}:" in str(caught.value)


def test_stages_that_wait_for_each_other_are_named(project: Path) -> None:
    file = project / "pipeline.yaml"
    file.write_text(file.read_text().replace("rows: numbers", "rows: bigger"))
    with pytest.raises(ConfigError, match=r"wait for each other: .*big"):
        spec.load("pipeline.yaml")


def test_extends_merges_over_another_file(project: Path) -> None:
    (project / "child.yaml").write_text("extends: pipeline.yaml\nname: child\nstages:\n  big:\n    threshold: 6\n")
    pipeline = spec.load("child.yaml")
    assert pipeline.name == "child"
    assert pipeline.stages["big"].threshold == 6
    assert pipeline.stages["big"].rows == "numbers"
    (project / "child.yaml").write_text("extends: child.yaml\nname: child\n")
    with pytest.raises(ConfigError, match="extends itself"):
        spec.load("child.yaml")


def test_overrides_change_values_by_path(project: Path) -> None:
    assert spec.load("pipeline.yaml", overrides={"stages.big.threshold": 7}).stages["big"].threshold == 7
    with pytest.raises(ConfigError, match="unknown key 'nothing'"):
        spec.load("pipeline.yaml", overrides={"stages.big.nothing": 7})


def test_missing_file_says_how_to_start(project: Path) -> None:
    with pytest.raises(ConfigError, match="ftpipe init"):
        spec.load("absent.yaml")


def test_yaml_cannot_build_objects(project: Path) -> None:
    (project / "evil.yaml").write_text("name: !!python/object/apply:os.system ['touch owned']\nstages: {}\n")
    with pytest.raises(ConfigError):
        spec.load("evil.yaml")
    assert not (project / "owned").exists()
