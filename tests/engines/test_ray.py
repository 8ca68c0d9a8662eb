"""Curation on a Ray cluster of two nodes: the same artifacts to the byte as on one machine, and shards of lost workers are done again."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import uuid
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from ftpipe.curate.dedup import _bands
from ftpipe.engines import ray as module
from ftpipe.engines.ray import Ray
from ftpipe.errors import ConfigError, DataError, InfrastructureError
from ftpipe.pipeline import runner, spec
from tests.artifacts import decisions, rows_artifact, run_step, text
from tests.curate.test_minhash import planted
from tests.ports import free_port

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed (pip install 'ftpipe[ray]')")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of one processor each."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0", "RAY_AUTH_TOKEN": uuid.uuid4().hex}.items():
            patch.setenv(name, value)
        if "PYTHONDONTWRITEBYTECODE" in os.environ:  # a node starts a dozen processes, and compiling Ray in each takes longer than it waits
            patch.delenv("PYTHONDONTWRITEBYTECODE")
            patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("bytecode")))
        cluster = Cluster()
        try:
            for _ in range(2):
                _add_node(cluster)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture(scope="module")
def engine(cluster):
    return Ray(address=cluster.address)


def _add_node(cluster, tries: int = 3) -> None:
    # A node gives up if a busy machine takes more than 15 s to start its agent, whose port is one that it waits for.
    ports = {f"{name}_port": free_port() for name in ("metrics_agent", "metrics_export", "runtime_env_agent")}
    try:
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False, include_log_monitor=False, no_monitor=True, **ports)
    except Exception as error:
        if tries == 1 or "timed out during startup" not in str(error):
            raise
        _add_node(cluster, tries - 1)


def pipeline(tmp_path, model, name, **top):
    """Near duplicates, personal data, sentences that repeat, and rows that give held-out ones away: planted, and all of it dealt with."""
    rng = random.Random(4)
    texts = sorted(planted(5, clusters=30))
    rows = [{"prompt": f"question {i} {rng.random()}", "completion": said + rng.choice([".", ". Mail a.b@acme.io.", ". I hope that this is of help."])}
            for i, said in enumerate(texts)]
    rows += [{"prompt": r["prompt"], "completion": "never mind. " + r["completion"]} for r in rows[::9]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    steps = [{"decontaminate": {}}, {"minhash": {"part": "answer"}}, {"personal_data": {"action": "redact"}}, {"sentences": {"most": 9}},
             {"loss": {"embedding": True}}]
    stages = {"ingest": {"source": {"jsonl": {"path": "d.jsonl"}}, "heldout": {"share": 0.1}},
              "curated": {"kind": "curate", "rows": "ingest", "steps": steps}}
    return spec.build({"name": "t", "model": str(model), "workspace": str(tmp_path / name), "stages": stages, **top}, base=tmp_path)


def test_a_chain_of_steps_makes_the_same_bytes_as_on_one_machine(tmp_path, tiny_model, engine, monkeypatch):
    monkeypatch.setattr(_bands, "TEXTS", 32)
    monkeypatch.setattr("ftpipe.curate.filter.personal_data.READ", 50)
    monkeypatch.setattr("ftpipe.models.spread.SHARD_TOKENS", 10**6)  # one worker has to import torch
    import ray

    sent, remote = [], ray.remote
    monkeypatch.setattr(ray, "remote", lambda **options: sent.append(options) or remote(**options))
    here = runner.run(pipeline(tmp_path, tiny_model, "here")).artifacts
    assert not sent
    there = runner.run(pipeline(tmp_path, tiny_model, "there", engine=engine.dump())).artifacts
    assert len(sent) == 9  # decontaminate; signatures and bands; personal data twice; sentences, their signatures and bands; scores
    for name, artifact in here.items():
        assert there[name].key == artifact.key and there[name].content == artifact.content, name
        assert there[name].counts == artifact.counts
    dropped = {name.rpartition("/")[2]: a.counts["rows_in"] - a.counts["rows_kept"] for name, a in here.items()}
    assert dropped["minhash"] > 10 and dropped["personal_data"] > 20 and dropped["sentences"] > 20 and dropped["decontaminate"] > 0, dropped
    assert there["curated/loss"].manifest["notes"]["scored"] == there["curated/loss"].counts["rows_kept"] > 50


def where(item: int, seconds: float) -> tuple[int, str]:
    import ray

    time.sleep(seconds)
    return item, ray.get_runtime_context().get_node_id()


def test_both_nodes_work_and_results_come_in_order(engine):
    results = list(engine.map(where, range(12), common=(0.1,), alone=True))
    assert [i for i, _ in results] == list(range(12)) and len({node for _, node in results}) == 2
    assert len(list(engine.map(where, [], common=(0.1,)))) == 0


def dying(marker: str, batch, **settings):
    """What signs rows, but its process kills itself the first time."""
    try:
        with Path(marker).open("x") as f:
            f.write(str(os.getpid()))
    except FileExistsError:
        return _bands.signed(batch, **settings)
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_shard_of_a_worker_that_was_killed_is_done_again(tmp_path, engine, monkeypatch):
    source = rows_artifact(tmp_path, [text(t) for t in planted(6)])
    here = run_step(tmp_path, source, "minhash")
    monkeypatch.setattr("tests.artifacts.Environment", partial(_environment, engine=engine))
    monkeypatch.setattr(_bands, "TEXTS", 16)
    monkeypatch.setattr(_bands, "signed", partial(dying, str(tmp_path / "killed")))
    there = run_step(tmp_path, source, "minhash")
    assert int((tmp_path / "killed").read_text()) != os.getpid()
    assert there.json("minhash.json") == here.json("minhash.json") and here.counts["rows_kept"] < here.counts["rows_in"] - 30
    mine, theirs = ({row: {k: v for k, v in d.items() if k != "step"} for row, d in decisions(a).items()} for a in (here, there))
    assert mine == theirs


def _environment(*args, engine):
    from ftpipe.stages.base import Environment

    return Environment(*args, engine=engine)


def fatal(item: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def unfit(item: int) -> None:
    raise DataError("the row is empty", where="row 7", remedy="look at it")


def test_errors_say_what_was_wrong_there(engine, monkeypatch):
    with pytest.raises(DataError, match="the row is empty") as caught:
        list(engine.map(unfit, [1]))
    assert (caught.value.where, caught.value.remedy) == ("row 7", "look at it")
    with pytest.raises(InfrastructureError, match="lost with its worker 1 times"):
        list(engine.model_copy(update={"retries": 0}).map(fatal, [1]))
    other = module._surroundings() | {"pyarrow": "1.0"}
    monkeypatch.setattr(module, "_surroundings", lambda: other)
    with pytest.raises(ConfigError, match=r"this node has pyarrow \S+, and the machine that started the run 1\.0"):
        list(engine.map(fatal, [1]))


def test_the_shards_of_a_node_that_is_lost_are_done_by_the_other(cluster, engine):
    """The last test: it leaves one node."""
    lost, = cluster.worker_nodes
    results, first = engine.map(where, range(24), common=(0.3,), alone=True), [(-1, "")]
    while first[-1][1] != lost.node_id:
        first.append(next(results))
    cluster.remove_node(lost, allow_graceful=False)
    rest = list(results)
    assert [i for i, _ in first + rest] == list(range(-1, 24))
    assert {node for _, node in rest[-6:]} == {cluster.head_node.node_id}
