"""What runs, what is reused and why; what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftpipe.errors import ConfigError
from ftpipe.pipeline import spec
from ftpipe.pipeline.plan import plan
from ftpipe.pipeline.runner import Selection, run, runs
from ftpipe.pipeline.store import Store
from tests.kinds import AboveStage, ran


def go(**overrides):
    return run(spec.load("pipeline.yaml", overrides={f"stages.{k.replace('__', '.')}": v for k, v in overrides.items()}))


def reasons(**overrides) -> dict[str, tuple[bool, str]]:
    pipeline = spec.load("pipeline.yaml", overrides={f"stages.{k.replace('__', '.')}": v for k, v in overrides.items()})
    return {p.name: (p.run, p.reason) for p in plan(pipeline, Store(pipeline.env.workspace))}


def test_second_run_runs_nothing(project: Path) -> None:
    first = go()
    assert first.artifacts["total"].json("sum.json") == 5 + 9 + 12 + 12
    assert {s["state"] for s in first.record["stages"].values()} == {"built"}
    second = go()
    assert {s["state"] for s in second.record["stages"].values()} == {"reused"}
    assert ran(project / ".ftpipe", "above") == 3
    assert all(not will for will, _ in reasons().values())


def test_plan_changes_nothing(project: Path) -> None:
    assert all(will for will, _ in reasons().values())
    assert not (project / ".ftpipe").exists()


def test_a_changed_threshold_reruns_that_step_and_what_follows(project: Path) -> None:
    go()
    planned = reasons(bigger__thresholds=[5, 11])
    assert planned["bigger/1"] == (True, "threshold 10 → 11")
    assert planned["total"] == (True, "input bigger/1 is made again")
    assert not planned["bigger/0"][0] and not planned["big"][0]


def test_same_result_upstream_reuses_everything_after_it(project: Path) -> None:
    go()
    after = go(bigger__thresholds=[5, 11]).record["stages"]  # 12 stays the only number above
    assert after["bigger/1"]["state"] == "built"
    assert after["total"]["state"] == "reused"


def test_edited_source_is_noticed_by_content_not_by_time(project: Path) -> None:
    go()
    (project / "numbers.txt").write_text((project / "numbers.txt").read_text())
    assert not reasons()["numbers"][0]
    (project / "numbers.txt").write_text("1\n5\n9\n13\n")
    assert reasons()["numbers"] == (True, "source changed")


def test_changed_code_reruns_and_changed_comments_do_not(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftpipe.pipeline.code import fingerprint

    package = tmp_path / "codepkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    module = package / "part.py"
    monkeypatch.syspath_prepend(str(tmp_path))

    def after(text: str) -> dict[str, str]:
        import os
        import time

        module.write_text(text)
        os.utime(module, ns=(time.time_ns(), time.time_ns()))
        return fingerprint(["codepkg.part"])

    first = after("def f(x):\n    return x + 1\n")
    assert after('"""Words."""\n# words\ndef f(x):\n    """More words."""\n    return (x + 1)\n') == first
    assert after("def f(x):\n    return x + 2\n") != first
    alone = fingerprint(["codepkg.part"])
    module.with_suffix(".c").write_text("int f(int x) { return x + 2; }")
    assert fingerprint(["codepkg.part"]) != alone  # C code of the same name decides too


def test_code_reached_by_imports_is_part_of_the_key() -> None:
    from ftpipe.pipeline.code import fingerprint

    reached = fingerprint(["ftpipe.pipeline.lineage", "ftpipe.data.rows"])
    assert "ftpipe.tables" in reached  # data.rows opens its connections there
    assert not any(name.startswith("ftpipe.pipeline") for name in reached)  # machinery does not decide results


def test_force_from_to_and_only(project: Path) -> None:
    go()
    pipeline = spec.load("pipeline.yaml")
    forced = run(pipeline, selection=Selection.of(pipeline, start="bigger", to="bigger", force=["bigger/0"])).record["stages"]
    assert {n: s["state"] for n, s in forced.items()} == {"bigger/0": "built", "bigger/1": "reused"}
    alone = run(pipeline, selection=Selection.of(pipeline, only="total", force=["all"])).record["stages"]
    assert {n: s["state"] for n, s in alone.items()} == {"total": "built"}


def test_a_stage_alone_without_its_inputs_says_what_to_run(project: Path) -> None:
    pipeline = spec.load("pipeline.yaml")
    with pytest.raises(ConfigError, match=r"stage big needs numbers, which is not up to date(.|\n)*--from numbers"):
        run(pipeline, selection=Selection.of(pipeline, only="big"))


def test_a_failed_run_keeps_what_finished_and_its_log(project: Path) -> None:
    with pytest.raises(ValueError, match="planted failure"):
        go(big__fail=True)
    record = runs(project / ".ftpipe")[0]
    assert record["state"] == "failed"
    assert record["stages"]["big"] == {"state": "failed", "error": "planted failure", "seconds": record["stages"]["big"]["seconds"]}
    assert list((project / ".ftpipe" / "tmp").iterdir()) == []
    assert (project / ".ftpipe" / "logs" / record["id"] / "big.log").exists()
    assert go().record["stages"]["numbers"]["state"] == "reused"


def test_manifest_names_everything_that_made_the_artifact(project: Path) -> None:
    artifact = go().artifacts["big"]
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest["material"]["params"] == {"rows": "numbers", "threshold": 4, "fail": False}
    assert manifest["inputs"]["numbers"]["content"] == manifest["material"]["inputs"]["numbers"]
    assert set(manifest["files"]) == {"numbers.json"}
    assert [a.name for a in artifact.ancestors()] == ["big", "numbers"]
    assert artifact.path.name == f"above-{artifact.key[:16]}"


def test_counts_must_add_up(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftpipe.errors import FtpipeError
    from tests import kinds

    original = kinds.NumbersStage.run

    def forgetful(self, ctx):
        original(self, ctx)
        ctx.counts["rows_kept"] -= 1

    monkeypatch.setattr(kinds.NumbersStage, "run", forgetful)
    with pytest.raises(FtpipeError, match="lost count"):
        go()


def test_a_stage_may_find_what_it_last_made_good_enough(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where nothing but its inputs changed; what comes after sees the old artifact."""
    first = go()
    monkeypatch.setattr(AboveStage, "good_enough", lambda self, last, inputs, env: "near enough")
    (project / "numbers.txt").write_text("1\n5\n9\n12\n13\n")
    second = go()
    states = {n: s["state"] for n, s in second.record["stages"].items()}
    assert states == {"numbers": "built", "big": "reused", "bigger/0": "reused", "bigger/1": "reused", "total": "reused"}
    assert second.record["stages"]["big"]["reason"] == "near enough" and second.artifacts["big"].key == first.artifacts["big"].key
    third = go(big__threshold=5)
    assert third.record["stages"]["big"]["state"] == "built", "its own settings changed"
