"""A planted secret is found nowhere below the workspace, in no message, and in no URL of a pipeline file."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import yaml

from ftpipe import secrets, tracking
from ftpipe.errors import ConfigError, InfrastructureError
from ftpipe.pipeline import spec
from ftpipe.pipeline.runner import Run
from ftpipe.tracking import Listeners, MlflowListener
from tests.stages_for_tests import CHAIN, PlantedTraining, write_pipeline

pytestmark = pytest.mark.timeout(120)
TOKEN, PASSWORD = "tok-7f3a9c51e2", "pa ss/w@rd-51e2"


@pytest.fixture(autouse=True)
def planted(monkeypatch, tmp_path, stage_kinds):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("TRACKER", PASSWORD)  # not named like a secret: that it stands in a URL must be enough
    monkeypatch.setattr(secrets, "_filled", set())


def config(folder: Path, **top) -> Path:
    path = write_pipeline(folder, CHAIN)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | top))
    return path


def leaks(folder: Path) -> list[str]:
    """Files below `folder` that hold a planted secret, as it is or as it stands in a URL."""
    forms = [form.encode() for secret in (TOKEN, PASSWORD, "pa%20ss%2Fw%40rd-51e2") for form in (secret, json.dumps(secret)[1:-1])]
    return [str(p) for p in folder.rglob("*") if p.is_file() and any(form in p.read_bytes() for form in forms)]


def test_a_run_that_says_all_its_secrets_leaves_none_behind(tmp_path, monkeypatch, caplog):
    """MLflow cannot be reached and says where it looked; the stage logs token and address, and then fails with both."""
    seen: list[str] = []

    def talkative(self, ctx):
        seen.append(ctx.env.tracking_uri)
        ctx.log.info("the token is %s, the server %s", TOKEN, ctx.env.tracking_uri)
        ctx.listener.metrics(ctx.name, {"loss": 1.0}, 1)
        try:
            raise ValueError(f"no login at {ctx.env.tracking_uri}")
        except ValueError as error:
            ctx.log.exception("it failed")
            if fail:
                raise RuntimeError("token", f"{TOKEN} is refused") from error
        (ctx.out / "train.json").write_text("{}")

    def unreachable(env):
        raise ConnectionError(f"nobody answers at {env.tracking_uri}")

    monkeypatch.setattr(PlantedTraining, "run", talkative)
    monkeypatch.setattr(tracking, "_connect", unreachable)
    monkeypatch.setattr("sys.argv", ["ftpipe", "run", "--set", f"tracking=sqlite://me:{TOKEN}@nowhere/x"])
    source = config(tmp_path, tracking="planted://me:${TRACKER}@nowhere:1/x", registry="planted://me:${TRACKER}@nowhere:1/x")
    for fail in (True, False):
        pipeline = spec.load(source)
        run = Run(pipeline, listener=Listeners([MlflowListener(pipeline.env, stages=pipeline.stages)]))
        with caplog.at_level(logging.WARNING, logger="ftpipe.tracking"):
            if fail:
                with pytest.raises(RuntimeError) as caught:
                    [run.execute(name) for name in run.order]
                assert "***" in str(caught.value) and TOKEN not in repr(caught.value) and "51e2" not in repr(caught.value.__cause__)
            else:
                [run.execute(name) for name in run.order]
                run.close()
    assert set(seen) == {"planted://me:pa%20ss%2Fw%40rd-51e2@nowhere:1/x"}, "the stage itself gets the address whole"
    told = [r.getMessage() for r in caplog.records if "no longer sent to MLflow" in r.getMessage()]
    assert told and all("nobody answers at planted://me:***@nowhere" in line for line in told)
    assert leaks(tmp_path / "work") == []
    logs = [p.read_text() for p in (tmp_path / "work").rglob("*.log")]
    assert any("the token is ***, the server planted://me:***@nowhere:1/x" in text and "ValueError: no login at planted://me:***@" in text for text in logs)
    records = [json.loads(p.read_text()) for p in (tmp_path / "work" / "runs").glob("*.json")]
    assert all(r["argv"][-1] == "tracking=sqlite://me:***@nowhere/x" for r in records) and {r["state"] for r in records} == {"failed", "succeeded"}
    (tmp_path / "work" / "planted.txt").write_text(TOKEN)
    assert len(leaks(tmp_path / "work")) == 1, "the search finds what is there"


@pytest.mark.parametrize("changes, place", [
    ({"tracking": "postgresql://me:hunter22@db/mlflow"}, "tracking"), ({"stages.rows.path": "https://me:hunter22@host/rows.txt"}, "stages.rows.path"),
    ({"stages.page.of": ["rows", "s3://me:hunter22@store"]}, "stages.page.of.1"),
])
def test_a_password_in_a_file_or_an_override_is_refused(changes, place, tmp_path):
    import flows

    with pytest.raises(ConfigError, match="holds a password") as caught:
        spec.load(config(tmp_path), overrides=changes)
    assert caught.value.what.startswith(place) and "hunter22" not in str(caught.value) and "${NAME}" in caught.value.remedy
    with pytest.raises(ConfigError, match="holds a password"):
        flows.run(config(tmp_path), overrides=changes)  # before Prefect hears of it


def test_a_variable_that_is_not_set_is_named_with_the_line(tmp_path):
    path = config(tmp_path, tracking="http://${NO_SUCH}:1")
    with pytest.raises(ConfigError, match="NO_SUCH, which is not set") as caught:
        spec.load(path)
    assert caught.value.where == f"{path}:{1 + path.read_text().splitlines().index('tracking: http://${NO_SUCH}:1')}"


def test_a_whole_address_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("ADDRESS", "postgresql://me:p%40ss@db/x")
    assert spec.load(config(tmp_path, tracking="${ADDRESS}")).env.tracking_uri == "postgresql://me:p%40ss@db/x"


def test_what_is_hidden_and_what_is_not(monkeypatch):
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id")
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:longpassword")
    assert secrets.hide(f"{TOKEN} at http://a:b@c, http://c:80/d, /home/me/.ssh/id, abc") == "*** at http://a:***@c, http://c:80/d, /home/me/.ssh/id, abc"
    assert secrets.hide("login admin:longpassword") == "login ***"
    assert secrets.hidden({"a": [f"x{TOKEN}", 1, None], "b": {"c": TOKEN}}) == {"a": ["x***", 1, None], "b": {"c": "***"}}
    error = InfrastructureError(f"no answer from http://me:{TOKEN}@host", where="http://me:pw@host", remedy=f"try {TOKEN}")
    assert str(error) == "http://me:***@host: no answer from http://me:***@host\n  -> try ***" and TOKEN not in repr(error)


def test_errors_of_the_system_are_cleaned_too():
    error = OSError(5, "no answer from http://me:secretpw@host", "http://me:secretpw@host/x")
    secrets.clean(error)
    assert str(error) == "[Errno 5] no answer from http://me:***@host: 'http://me:***@host/x'"


def test_settings_without_passwords_are_left_alone():
    fine = {"a": "http://host:5000/x", "b": ["see mailto:me@host", "git+ssh://git@host/x"], "c": {"d": "postgresql://me:${PW}@db", "e": 1}}
    assert secrets.written_out(fine) is None
    assert secrets.written_out({"a": [{"b": "x://u:p@h"}]}) == ("a", 0, "b")
