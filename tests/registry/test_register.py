"""Versions are created once, aliases move by compare-and-swap, and MLflow's own client sees all of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import sqlite3
import threading
import time

import pytest

from ftpipe.errors import ConfigError, InfrastructureError
from ftpipe.registry import ledger, register, server
from ftpipe.stages.base import Environment
from tests.registry.helpers import adapter_artifact, built, content, environment, registered

SPAWN = multiprocessing.get_context("spawn")


def test_a_registered_version_is_what_mlflows_own_client_sees(env: Environment):
    from mlflow import MlflowClient

    result = registered(env, 1)
    assert (result.version, result.created, result.moved, result.before) == (1, True, True, None)
    uri = f"sqlite:///{env.workspace}/mlflow.db"
    seen = MlflowClient(tracking_uri=uri, registry_uri=uri).get_model_version_by_alias("demo", "champion")
    assert int(seen.version) == 1 and seen.tags["ftpipe.content"] == content(env, 1)
    assert seen.tags["ftpipe.stage.adapter"] == adapter_artifact_key(env, 1)
    folder = ledger.folder(env, "demo") / content(env, 1)
    assert seen.source == folder.as_uri()
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_model.safetensors", "evidence", "ftpipe_adapter.json", "manifest.json"]


def adapter_artifact_key(env: Environment, seed: int) -> str:
    from ftpipe.pipeline.store import Store

    return adapter_artifact(Store(env.workspace), seed).key


def test_the_folder_can_be_fetched_through_mlflow(env: Environment, tmp_path):
    from mlflow.artifacts import download_artifacts

    registered(env, 1)
    uri = server.client(env).get_model_version_download_uri("demo", "1")
    got = download_artifacts(artifact_uri=uri, dst_path=str(tmp_path / "got"), tracking_uri=server.tracking_uri(env))
    assert {"adapter_model.safetensors", "manifest.json"} <= set(os.listdir(got))


def test_the_same_adapter_is_the_same_version_whatever_lies_beside_it(env: Environment):
    from ftpipe.pipeline.store import Store

    first = registered(env, 1)
    other = adapter_artifact(Store(env.workspace), 1, extra={"seconds": 99})
    again = register.register(env, "demo", built(env, "demo", other, "# another card\n"), base={}, stages={}, beat=None)
    assert (first.version, again.version, again.created, again.moved) == (1, 1, False, True)
    assert len(server.model_versions(server.client(env), "demo")) == 1
    assert len([m for m in ledger.history(env, "demo") if m["state"] == "moved"]) == 1
    assert not list(ledger.folder(env, "demo").glob(".building-*"))


def test_a_candidate_that_did_not_beat_todays_champion_gets_a_version_but_no_alias(env: Environment):
    registered(env, 1)
    late = registered(env, 2, beat=None)  # it was compared when there was no champion
    assert (late.version, late.created, late.moved) == (2, True, False)
    assert "version 1 by now" in late.reason and "nothing" in late.reason
    assert ledger.champion(env, "demo")["version"] == 1
    now = registered(env, 2, beat=content(env, 1))
    assert (now.version, now.moved, now.before) == (2, True, 1)


def test_the_champion_to_beat_of_the_champion_is_the_one_it_beat(env: Environment):
    one, two = content(env, 1), content(env, 2)
    assert ledger.champion_to_beat(env, "demo", one) is None
    registered(env, 1)
    assert ledger.champion_to_beat(env, "demo", one) is None, "the first champion had nothing to beat, then and now"
    assert ledger.champion_to_beat(env, "demo", two)["content"] == one
    registered(env, 2, beat=one)
    assert ledger.champion_to_beat(env, "demo", two)["content"] == one, "unchanged by its own promotion"
    assert ledger.champion_to_beat(env, "demo", one)["content"] == two
    register.rollback(env, "demo")
    assert ledger.champion_to_beat(env, "demo", one) is None, "a move by hand does not change what it was measured against"
    assert ledger.champion_to_beat(env, "demo", two)["content"] == one


def test_aliases_move_only_from_where_the_caller_believes_them(env: Environment):
    registered(env, 1)
    registered(env, 2, beat=content(env, 1))
    with pytest.raises(register.AliasMoved, match="points at version 2, not at version 1"):
        register.move_alias(env, "demo", "champion", 1, expected=1)
    assert register.move_alias(env, "demo", "champion", 1, expected=2, reason="it answers too long") == {"alias": "champion", "from": 2, "to": 1}
    assert register.move_alias(env, "demo", "canary", 2, expected=None)["to"] == 2
    assert ledger.aliases(env, "demo") == {"champion": 1, "previous": 2, "canary": 2}
    assert server.model_aliases(server.client(env), "demo") == {"champion": 1, "previous": 2, "canary": 2}
    register.move_alias(env, "demo", "canary", None)
    assert server.model_aliases(server.client(env), "demo") == {"champion": 1, "previous": 2}


def test_a_challenger_that_beat_the_champion_waits_until_somebody_promotes_it(env: Environment):
    registered(env, 1)
    late = registered(env, 2, beat=None, alias="challenger", against="champion")
    assert not late.moved and "champion points at version 1 by now" in late.reason, "it was compared with no champion"
    waits = registered(env, 2, beat=content(env, 1), alias="challenger", against="champion")
    assert (waits.version, waits.moved) == (2, True) and ledger.aliases(env, "demo") == {"champion": 1, "challenger": 2}
    again = registered(env, 1, beat=None, alias="challenger", against="champion")
    assert (again.moved, again.reason) == (False, "it is the champion already")
    register.move_alias(env, "demo", "champion", "challenger", forced=True, reason="looks good")
    assert ledger.aliases(env, "demo") == {"champion": 2, "previous": 1} == server.model_aliases(server.client(env), "demo")
    assert ledger.find(env, "demo", "previous")["version"] == 1 and [m["forced"] for m in ledger.history(env, "demo")][-1]
    register.rollback(env, "demo")
    assert ledger.aliases(env, "demo") == {"champion": 1, "previous": 2} and ledger.problems(env, "demo") == []


def test_rolling_back_twice_goes_back_two_versions(env: Environment):
    registered(env, 1)
    registered(env, 2, beat=content(env, 1))
    registered(env, 3, beat=content(env, 2))
    assert register.rollback(env, "demo", reason="bad answers")["to"] == 2
    assert register.rollback(env, "demo")["to"] == 1
    with pytest.raises(ConfigError, match="no earlier version"):
        register.rollback(env, "demo")


def test_history_is_only_appended_to_and_survives_a_torn_line(env: Environment):
    registered(env, 1)
    path = ledger.folder(env, "demo") / ledger.HISTORY
    before = path.read_bytes()
    with path.open("ab") as f:
        f.write(b'{"alias": "champion", "state": "mo')  # a kill in the middle of a write
    registered(env, 2, beat=content(env, 1))
    assert path.read_bytes().startswith(before)
    assert ledger.champion(env, "demo")["version"] == 2
    moved = [m for m in ledger.history(env, "demo") if m["state"] == "moved" and m["alias"] == "champion"]
    assert [(m["from"], m["to"]) for m in moved] == [(None, 1), (1, 2)] and all(m["who"] and m["when"] for m in moved)
    assert ledger.problems(env, "demo") == [], "a later line speaks for the torn one too"


def test_an_alias_moved_in_mlflow_is_noticed_and_recorded(env: Environment, caplog: pytest.LogCaptureFixture):
    registered(env, 1)
    registered(env, 2, beat=content(env, 1))
    server.client(env).set_registered_model_alias("demo", "champion", "1")
    late = registered(env, 3, beat=content(env, 2))
    assert not late.moved and "version 1 by now" in late.reason
    assert "champion points at version 1 in MLflow" in caplog.text
    assert ledger.history(env, "demo")[-1]["reason"] == register.OUTSIDE and ledger.champion(env, "demo")["version"] == 1


def test_a_lost_ledger_is_written_anew_from_mlflow(env: Environment):
    registered(env, 1)
    registered(env, 2, beat=content(env, 1))
    for name in (ledger.VERSIONS, ledger.HISTORY):
        (ledger.folder(env, "demo") / name).unlink()
    with ledger.lock(env, "demo"):
        register.reconcile(env, "demo", server.client(env))
    assert [v["version"] for v in ledger.list_versions(env, "demo")] == [1, 2]
    assert ledger.champion(env, "demo")["version"] == 2 and ledger.find(env, "demo", "champion")["base"]["model"] == "tiny"


def _register_in_a_process(workspace, seed: int, barrier, results) -> None:
    env = environment(workspace)
    barrier.wait()
    result = registered(env, seed)
    results.put((seed, result.version, result.created, result.moved))


def _in_processes(workspace, seeds: list[int]) -> list[tuple]:
    barrier, results = SPAWN.Barrier(len(seeds)), SPAWN.Queue()
    processes = [SPAWN.Process(target=_register_in_a_process, args=(workspace, s, barrier, results)) for s in seeds]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
    assert [p.exitcode for p in processes] == [0] * len(seeds)
    return sorted(results.get(timeout=5) for _ in seeds)


def test_processes_at_once_get_distinct_versions_and_one_of_them_the_alias(env: Environment):
    found = _in_processes(env.workspace, [1, 2, 3])
    assert sorted(v for _, v, _, _ in found) == [1, 2, 3]
    assert sum(moved for *_, moved in found) == 1, "each was compared with no champion, so only the first may become it"
    assert [v["version"] for v in ledger.list_versions(env, "demo")] == [1, 2, 3]


def test_processes_with_one_adapter_and_no_database_yet_get_one_version(tmp_path):
    """Both create MLflow's tables at once, too."""
    found = _in_processes(tmp_path, [1, 1])
    assert [v for _, v, _, _ in found] == [1, 1] and sum(created for _, _, created, _ in found) == 1


KILL_AT = ["place", "_create", "write_versions", *(f"{step} {alias}" for alias in ("previous", "champion")
                                                   for step in ("append moving", "set_registered_model_alias", "append moved"))]


def _die(workspace, step: str, when: str) -> None:
    """Register version 2 over version 1 and be killed just before or after `step`."""
    from mlflow import MlflowClient

    from ftpipe.registry import versions

    env = environment(workspace)
    *step, alias = step.split() if " " in step else [step, ""]
    owner, name = {"place": (versions, "place"), "_create": (register, "_create"), "write_versions": (ledger, "write_versions"),
                   "set_registered_model_alias": (MlflowClient, "set_registered_model_alias")}.get(step[0], (ledger, "append"))
    real = getattr(owner, name)

    def killed(*args, **kwargs):
        other = step[0] == "append" and args[2]["state"] != step[1]
        if alias and (other or alias not in (args[2] if isinstance(args[2], str) else args[2]["alias"])):
            return real(*args, **kwargs)
        if when == "after":
            real(*args, **kwargs)
        os.kill(os.getpid(), 9)

    setattr(owner, name, killed)
    registered(env, 2, beat=content(env, 1))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", KILL_AT)
def test_killed_at_any_step_and_run_again_there_is_one_version_and_one_move(env: Environment, step: str, when: str):
    registered(env, 1)
    beat = content(env, 1)
    pid = os.fork()
    if pid == 0:
        try:
            server._client.cache_clear()
            _die(env.workspace, step, when)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9
    result = registered(env, 2, beat=beat)
    assert (result.version, result.moved) == (2, True)
    mlflow = server.client(env)
    assert [int(v.version) for v in server.model_versions(mlflow, "demo")] == [1, 2]
    assert server.model_aliases(mlflow, "demo") == {"champion": 2, "previous": 1} == ledger.aliases(env, "demo") and ledger.problems(env, "demo") == []
    moved = [(m["from"], m["to"], m["beat"]) for m in ledger.history(env, "demo") if m["state"] == "moved" and m["alias"] == "champion"]
    assert moved == [(None, 1, None), (1, 2, beat)], "the history must neither lose the move nor take it for one made outside"


def test_a_locked_database_is_waited_for(env: Environment):
    registered(env, 1)
    beat = content(env, 1)
    holder = sqlite3.connect(env.workspace / "mlflow.db", check_same_thread=False, isolation_level=None)
    holder.execute("begin exclusive")
    threading.Timer(7, lambda: holder.execute("rollback")).start()  # longer than SQLite's own patience of 5 s
    began = time.monotonic()
    assert registered(env, 2, beat=beat).moved
    assert time.monotonic() - began > 5
    holder.close()


def test_patience_ends_in_an_error_that_a_retry_may_cure(monkeypatch: pytest.MonkeyPatch):
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(server, "PATIENCE", 0.3)

    def busy():
        raise MlflowException("(sqlite3.OperationalError) database is locked")

    with pytest.raises(InfrastructureError, match="did not answer"):
        server.call(busy)
    with pytest.raises(ValueError):
        server.call(lambda: json.loads("{"))


def test_unknown_models_versions_and_names_are_named(env: Environment):
    registered(env, 1)
    with pytest.raises(ConfigError, match="did you mean 'demo'"):
        ledger.find(env, "dem", 1)
    with pytest.raises(ConfigError, match="no version or alias 'champoin'"):
        ledger.find(env, "demo", "champoin")
    with pytest.raises(ConfigError, match="cannot be the name"):
        ledger.folder(env, "../x")
    assert ledger.find(env, "demo", "v1")["version"] == ledger.find(env, "demo", 1)["version"] == ledger.find(env, "demo", "champion")["version"] == 1
    assert ledger.list_models(env) == ["demo"]
    entry, = ledger.list_versions(env, "demo")
    assert (entry["name"], entry["version"], entry["aliases"], entry["content"]) == ("demo", 1, ["champion"], content(env, 1))
    assert register.show(env, "demo", "champion")["manifest"]["base"]["model"] == "tiny"
