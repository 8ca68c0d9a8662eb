"""Prefect's server and MLflow's registry on a real PostgreSQL; and a Prefect server that is killed while a flow runs and started again."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from ftpipe.errors import ConfigError
from ftpipe.registry import ledger, register, server, versions
from ftpipe.stages.base import Environment
from tests.flows.real_server import Server, environment, ftpipe
from tests.postgres import PASSWORD, Postgres, postgres
from tests.registry.helpers import content, registered
from tests.stages_for_tests import CHAIN, wait_for, write_pipeline

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]
STAGES = {"rows": CHAIN["rows"], "version": {"kind": "planted_registration", "adapter": "rows"}, "adapter": CHAIN["adapter"] | {"steps": 8, "pause": 0.3}}


@pytest.fixture(scope="module")
def database():
    with postgres() as found:
        found.run("createdb", "prefect")
        found.run("createdb", "mlflow")
        yield found


def tracking(database: Postgres, password: str) -> str:
    return f"postgresql://ftpipe:{password}@127.0.0.1:{database.port}/mlflow"


@pytest.fixture(scope="module")
def told(database, kinds, tmp_path_factory):
    """A flow whose server is killed in its middle and comes back only when the flow has nothing more to do than to say how it ended."""
    pytest.importorskip("psycopg2", reason="MLflow speaks to PostgreSQL through psycopg2 (pip install 'ftpipe[postgres]')")
    folder = tmp_path_factory.mktemp("postgres")
    config = write_pipeline(folder, STAGES, name="onpg")
    config.write_text(f"tracking: {tracking(database, '${FTPIPE_TEST_DB_PASSWORD}')}\n{config.read_text()}")
    url = f"postgresql+asyncpg://ftpipe:{quote(PASSWORD, safe='')}@127.0.0.1:{database.port}/prefect"
    prefect = Server(folder, {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url})
    env = environment(folder, kinds | {"PREFECT_API_URL": prefect.api.url, "FTPIPE_TEST_DB_PASSWORD": PASSWORD})
    log = folder / "run.log"
    try:
        prefect.start()
        with ftpipe(["run", str(config)], env, log) as process:
            wait_for(lambda: process.poll() is not None or any("step 2" in p.read_text() for p in (folder / "work/logs").glob("*/adapter.log")), 150,
                     what="the training")
            assert process.poll() is None, log.read_text()
            prefect.kill()
            _, seconds = wait_for(lambda: process.poll() is not None or list((folder / "work/store").glob("planted_training-*")), 60, what="the training's end")
            assert process.poll() is None, log.read_text()
            assert seconds < 30, "training waited for the server"
            time.sleep(15)  # more than Prefect tries to say how the task ended
            prefect.start()
            assert process.wait(120) == 0, log.read_text()
        yield prefect.api, folder
    finally:
        prefect.stop()


def test_the_end_of_a_flow_whose_server_was_away_is_recorded(told, database):
    api, folder = told
    run, = api.post("/flow_runs/filter")
    assert run["state"]["type"] == "COMPLETED" and run["state"]["message"] == "3 of 3 stages ran; registered as demo:1"
    states, _ = wait_for(lambda: (t := {t["name"]: t["state"]["type"] for t in api.tasks(run["id"])}) and set(t.values()) == {"COMPLETED"} and t, 60,
                         what="the end of the task runs")
    assert set(states) == set(STAGES)
    tables = database.run("psql", "-d", "prefect", "-tAc", "select count(*) from flow_run where state_type = 'COMPLETED'")
    assert tables.stdout.strip() == "1", "it is PostgreSQL that the server used"
    assert not list(folder.glob("*.db"))
    assert PASSWORD not in (folder / "run.log").read_text() and quote(PASSWORD, safe="") not in (folder / "run.log").read_text()


def test_another_workspace_sees_what_was_registered_and_one_champion_wins(told, database, tmp_path, monkeypatch):
    _, folder = told
    uri = tracking(database, quote(PASSWORD, safe=""))
    one = Environment(folder / "work", folder, "onpg", tracking_uri=uri)
    two = Environment(tmp_path / "two", tmp_path, "onpg", tracking_uri=uri)
    first = content(one, 1)
    late = registered(two, 2)
    assert (late.version, late.moved) == (2, False), "the first workspace's champion was not what it had been compared with"
    assert ledger.champion(two, "demo")["content"] == first
    assert register.move_alias(two, "demo", "second", 1)["to"] == 1, "its files are fetched first, with the lock held"
    assert versions.verify(two, "demo", "champion") == [] and versions.load_version(two, "demo", "champion").is_relative_to(two.workspace)
    runs = server.client(two).search_runs([server.client(two).get_experiment_by_name("onpg").experiment_id])
    assert [len(server.client(two).get_metric_history(r.info.run_id, "loss")) for r in runs] == [8], "the curve is there, whatever became of Prefect"

    real = register._move

    def slowly(*args, **kwargs):
        time.sleep(0.5)  # the other workspace has compared by now, if it may
        real(*args, **kwargs)

    monkeypatch.setattr(register, "_move", slowly)
    moved: dict[int, bool] = {}
    both = [threading.Thread(target=lambda env=env, n=n: moved.update({n: registered(env, n, beat=first).moved})) for env, n in ((one, 3), (two, 4))]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(60)
    assert sorted(moved.values()) == [False, True], "two champions were promoted over the same one"
    winner, = (n for n, won in moved.items() if won)
    champion = server.client(one).get_model_version_by_alias("demo", "champion")
    assert champion.tags[server.CONTENT] == content(one if winner == 3 else two, winner)


def test_what_cannot_work_is_said_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def env(**uris: str) -> Environment:
        return Environment(tmp_path, tmp_path, "demo", **uris)

    with pytest.raises(ConfigError, match="begins with postgresql://"):
        server.check(env(tracking_uri="postgres://me@db/x"))
    with pytest.raises(ConfigError, match="through nosuchdriver, which is not installed"):
        server.check(env(registry_uri="postgresql+nosuchdriver://me@db/x"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="psycopg2, which is not installed") as caught:
        server.check(env(tracking_uri="postgresql://me@db/x"))
    assert caught.value.remedy == "pip install 'ftpipe[postgres]'"
    with pytest.raises(ConfigError, match="takes its files from the tracking server"):
        server.check(env(registry_uri="http://mlflow:5000"))
    server.check(env(tracking_uri="http://mlflow:5000"))
    server.check(env())
