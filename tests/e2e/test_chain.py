"""From rows to a registered adapter, whole: what Prefect and MLflow hold of it, reuse, rerun, refusal, and kill -9 in each stage."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.chain import adapter_hash, environment, ftpipe, last_run, make_project, seen, started
from tests.flows import real_server
from tests.stages_for_tests import alive, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose pipeline has run to its end, unbroken, as a flow on a local Prefect server. Tests that change it work on a copy."""
    folder = make_project(tmp_path_factory.mktemp("chain"))
    (folder / "prefect").mkdir()
    ftpipe(folder, "run", "pipeline.yaml", env=seen(folder))
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished project, with its file times."""
    return Path(shutil.copytree(finished, tmp_path / "copy", copy_function=shutil.copy2))


def states(folder: Path) -> dict[str, str]:
    return {name: s["state"] for name, s in last_run(folder)["stages"].items()}


def test_it_ends_with_a_registered_version_and_a_report(finished: Path) -> None:
    assert last_run(finished)["state"] == "succeeded"
    listed = json.loads(ftpipe(finished, "registry", "list", "--json").stdout)
    assert [(v["name"], int(v["version"]), v["aliases"]) for v in listed] == [("chain", 1, ["champion"])]
    page = next((finished / ".ftpipe" / "store").glob("report-*/report.html")).read_text()
    assert "chain" in page and "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_everything_is_shown_in_prefect_and_joined_in_mlflow(copy: Path) -> None:
    home, record = copy / "prefect", last_run(copy)
    (name, state, message), = real_server.query(home, "select f.name, f.state_type, s.message from flow_run f join flow_run_state s on s.id = f.state_id")
    assert (name, state) == (f"chain {record['id']}", "COMPLETED") and "registered as chain:1" in message
    assert {n for n, in real_server.query(home, "select name from task_run where state_name = 'Completed'")} == set(record["stages"])
    shown = dict(real_server.query(home, "select key, data from artifact"))
    assert "## Passed" in shown["chain-gate"] and "chain version 1" in shown["chain-register"] and "report.html" in shown["chain-report"]
    assert any(row["better"] == "adapter" for row in json.loads(json.loads(shown["chain-evaluate"])))
    assert {"chain-ingest", "chain-ingest-quarantine", "chain-pool-minhash", "chain-adapter", "chain-adapter-progress", "chain-run"} <= set(shown)
    funnel = json.loads(json.loads(shown["chain-pool-exact-dedup"]))
    assert funnel[0]["count"] == funnel[1]["count"] + sum(r["count"] for r in funnel[2:]) and len(funnel) > 2

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{copy / '.ftpipe' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("chain").experiment_id])
    tracked = {r.data.tags["ftpipe.stage"]: r for r in runs if "ftpipe.stage" in r.data.tags}
    assert {"reference", "adapter", "random"} <= set(tracked)
    assert tracked["adapter"].data.tags["ftpipe.key"] == record["stages"]["adapter"]["key"] and tracked["adapter"].data.params["learning_rate"] == "0.03"
    losses = client.get_metric_history(tracked["adapter"].info.run_id, "loss")
    assert len(losses) > 2 and losses[-1].value < losses[0].value

    began = time.monotonic()
    assert "nothing to do" in ftpipe(copy, "run", "pipeline.yaml", env=seen(copy)).stdout
    print(f"second run, server and all: {time.monotonic() - began:.1f} s")
    last = "(select id from flow_run order by start_time desc limit 1)"
    assert {s for s, in real_server.query(home, f"select state_name from task_run where flow_run_id = {last}")} == {"Reused"}


def test_rows_are_accounted_for_from_source_to_adapter(finished: Path) -> None:
    traced = json.loads(ftpipe(finished, "trace", "chain@champion", "--json").stdout)
    assert traced["stage"] == "adapter" and traced["rows"]
    row = traced["rows"][0]
    told = json.loads(ftpipe(finished, "why", row["row_id"][:12], "--json").stdout)[0]
    assert told["source"].endswith("rows.jsonl") and told["line"] == row["line"]
    assert [d["step"].split("/")[-1] for d in told["decisions"]][:3] == ["ingest", "audit", "exact_dedup"]
    assert sum(s["times"] for s in told["seen"] if s["stage"] == "adapter") == row["times"]
    ingest = json.loads(next((finished / ".ftpipe" / "store").glob("ingest-*/manifest.json")).read_text())["counts"]
    assert ingest["rows_in"] == 94 and sum(n for k, n in ingest.items() if k.startswith("dropped")) >= 1  # the line that was cut in half


def test_a_forgotten_row_and_its_copies_are_never_used_again(copy: Path) -> None:
    row = json.loads(ftpipe(copy, "trace", "adapter", "--json").stdout)["rows"][0]["row_id"]
    seen = json.loads(ftpipe(copy, "which", row[:12], "--json").stdout)
    adapter = next(a for a in seen if a["stage"] == "adapter")
    assert adapter["times"] >= 2 and adapter["versions"] == ["chain:1 @champion"]  # two epochs
    told = json.loads(ftpipe(copy, "forget", row[:12], "--reason", "asked to", "--json").stdout)
    assert told["forgotten"] == told["new"] and [a["key"] for a in told["adapters"]] == [a["key"] for a in seen]
    ftpipe(copy, "run", "pipeline.yaml", "--no-prefect", "--to", "pool")
    listed = [json.loads(line) for line in (copy / ".ftpipe" / "forgotten.jsonl").read_text().splitlines()]
    assert [(e["content_id"], e["reason"]) for e in listed] == [(told["new"][0], "asked to")]
    manifest = json.loads(max((copy / ".ftpipe" / "store").glob("ingest-*/manifest.json"), key=lambda p: p.stat().st_mtime_ns).read_text())
    assert manifest["counts"]["dropped: forgotten: named by `ftpipe forget`"] >= 1
    last = json.loads((copy / ".ftpipe" / "last" / "chain" / "pool__decontaminate.json").read_text())
    import pyarrow.parquet as pq

    kept = pq.read_table(copy / ".ftpipe" / "store" / f"{last['kind']}-{last['key'][:16]}" / "kept.parquet")["row_id"].to_pylist()
    assert kept and row not in kept


def test_a_version_is_verified_compared_moved_and_exported(copy: Path) -> None:
    """On a second version: the adapter of the random rows, which is there already."""
    changes = {"evaluate.candidate": "random", "evaluate.controls": "{}", "evaluate.champion": "false", "evaluate.examples": "0", "register.adapter": "random",
               "gate.rules": "[{suite: heldout_loss, against: base}]", "report.adapter": "random", "report.controls": "[]"}
    ftpipe(copy, "run", "pipeline.yaml", "--no-prefect", *(f"--set=stages.{k}={v}" for k, v in changes.items()))
    assert states(copy)["random"] == "reused" and states(copy)["register"] == "built"
    assert "every byte" in ftpipe(copy, "registry", "verify", "chain@2").stdout
    told = json.loads(ftpipe(copy, "registry", "diff", "chain@1", "chain@2", "--json").stdout)
    assert told["rows"]["both"] > 5 and told["rows"]["only_a"] and told["rows"]["only_b"], "chosen and random rows share some"
    assert {m["suite"] for m in told["metrics"]} == {"heldout_loss", "general_text"}
    refused = ftpipe(copy, "registry", "alias", "chain@2", "champion", check=False)
    assert refused.returncode == 2 and "needs a reason" in refused.stderr
    ftpipe(copy, "registry", "alias", "chain@2", "champion", "--reason", "by hand")
    assert "version 2 -> 1" in ftpipe(copy, "registry", "rollback", "chain").stdout
    moves = [m for m in ftpipe(copy, "registry", "history", "chain").stdout.splitlines() if " champion: " in m]
    assert "1 -> 2 forced  by hand" in moves[-2] and "2 -> 1" in moves[-1]
    ftpipe(copy, "export", "chain@2", "lora", "--model", "model")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in (copy / "lora").iterdir()}
    file = next(copy.glob(".ftpipe/registry/chain/*/adapter_model.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert any(ftpipe(copy, "registry", "verify", f"chain@{v}", check=False).returncode == 1 for v in (1, 2)), "one flipped bit is found"


LOADED = """
import sys
from ftpipe import cli
try:
    cli.main()
finally:
    print("loaded:", *sorted({"torch", "transformers", "mlflow", "sklearn", "pandas"} & set(sys.modules)), file=sys.stderr)
"""


def test_second_run_runs_nothing_and_loads_nothing_heavy(copy: Path) -> None:
    fresh = [sys.executable, "-c", LOADED, "run", "pipeline.yaml", "--no-prefect"]
    done = subprocess.run(fresh, cwd=copy, env=environment(), capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr.rstrip().endswith("loaded:"), done.stderr
    assert set(states(copy).values()) == {"reused"}
    planned = json.loads(ftpipe(copy, "plan", "pipeline.yaml", "--json").stdout)
    assert {p["action"] for p in planned} == {"REUSE"}


def test_changed_threshold_reruns_that_step_and_what_follows(copy: Path) -> None:
    planned = json.loads(ftpipe(copy, "plan", "pipeline.yaml", "--json", "--set", "stages.curated.steps.2.sensitivity_sampling.clusters=5").stdout)
    run = [p["stage"] for p in planned if p["action"] == "RUN"]
    assert run == ["curated/sensitivity_sampling", "adapter", "random_rows/random", "random", "evaluate", "gate", "register", "report"]
    assert "clusters 6 → 5" in next(p["reason"] for p in planned if p["stage"] == "curated/sensitivity_sampling")


def test_one_edited_row_is_scored_alone(copy: Path) -> None:
    lines = (copy / "rows.jsonl").read_text().splitlines()
    kept = [d["row_id"] for d in json.loads(ftpipe(copy, "trace", "adapter", "--json").stdout)["rows"]]
    told = json.loads(ftpipe(copy, "why", kept[0], "--json").stdout)[0]
    row = json.loads(lines[told["line"] - 1])
    lines[told["line"] - 1] = json.dumps(row | {"completion": row["completion"] + " indeed"})
    (copy / "rows.jsonl").write_text("\n".join(lines) + "\n")
    ftpipe(copy, "run", "pipeline.yaml", "--no-prefect", "--to", "curated/perplexity")
    manifest = json.loads(max((copy / ".ftpipe" / "store").glob("curate_step-*/manifest.json"), key=lambda p: p.stat().st_mtime_ns).read_text())
    assert manifest["name"] == "curated/perplexity"
    assert manifest["notes"]["scored"] == 1 and manifest["notes"]["cached"] > 40


def test_a_candidate_that_gains_too_little_is_refused(copy: Path) -> None:
    """The gate alone runs again; nothing is trained."""
    done = ftpipe(copy, "run", "pipeline.yaml", "--no-prefect", "--set", "stages.gate.rules=[{suite: heldout_loss, against: base, margin: 100}]")
    assert "refused" in done.stdout.lower()
    assert [n for n, s in states(copy).items() if s == "built"] == ["gate", "register", "report"]
    listed = json.loads(ftpipe(copy, "registry", "list", "--json").stdout)
    assert [int(v["version"]) for v in listed] == [1]


def test_a_selection_is_proved_against_chance(copy: Path) -> None:
    """With the seed of the pipeline, the training of the selection is the one that is there already."""
    done = ftpipe(copy, "prove", "pipeline.yaml", "curated", "--seeds", "1", "--no-prefect")
    assert "curated against length_matched on heldout_loss" in done.stdout
    now = states(copy)
    assert [n for n, s in now.items() if s == "built" and n.startswith("prove")] == [
        "prove_random_3", "prove_length_matched_rows_3/length_matched_random", "prove_length_matched_3", "prove_evaluation", "prove_study", "prove_report"]
    assert now["prove_curated_3"] == "reused" and "register" not in now
    study = json.loads(next((copy / ".ftpipe" / "store").glob("study-*/study.json")).read_text())
    tokens = {arm: told["tokens"][0] for arm, told in study["arms"].items()}
    assert max(tokens.values()) <= 1.1 * min(tokens.values()), tokens
    assert "Side by side" in max((copy / ".ftpipe" / "store").glob("report-*/report.html"), key=lambda p: p.stat().st_mtime_ns).read_text()


def test_killed_in_each_stage_same_bytes_in_the_end(finished: Path, tmp_path: Path) -> None:
    """One run that is killed in every kind of stage of the chain, each time after a random while, and started again."""
    broken = make_broken(finished, tmp_path)
    rng = random.Random(11)
    struck = [kill_in(broken, stage, rng.uniform(0.0, longest)) for stage, longest in (
        ("ingest", 0.1), ("audit", 0.1), ("pool/minhash", 0.1), ("curated/lobass", 0.3), ("adapter", 9.0), ("evaluate", 1.5), ("gate", 0.05), ("register", 0.5),
        ("report", 0.3))]
    assert sum(struck) >= 6, "a stage that ended within the while before was not met again"
    ftpipe(broken, "run", "pipeline.yaml", "--no-prefect")
    same = ["ingest", "audit", "pool/minhash", "reference", "curated/perplexity", "curated/lobass", "curated/sensitivity_sampling", "adapter", "random"]
    found, wanted = contents(broken), contents(finished)
    assert {s: found[s] for s in same} == {s: wanted[s] for s in same}
    assert [adapter_hash(broken, s) for s in ("adapter", "random")] == [adapter_hash(finished, s) for s in ("adapter", "random")]
    listed = json.loads(ftpipe(broken, "registry", "list", "--json").stdout)
    assert [(int(v["version"]), v["aliases"]) for v in listed] == [(1, ["champion"])]


def test_ctrl_c_ends_real_training_ranks(copy: Path) -> None:
    words = ["run", "pipeline.yaml", "--to", "adapter", "--set", "stages.adapter.ranks=2", "--set", "stages.adapter.epochs=500"]
    log = copy / "interrupted.log"
    with real_server.ftpipe(words, seen(copy), log) as process:
        def ranks() -> list[int]:
            return [p.pid for p in psutil.Process(process.pid).children(recursive=True) if "ftpipe.train.rank" in " ".join(p.cmdline())]

        def training() -> bool:
            shown = real_server.query(copy / "prefect", "select key from artifact where created > datetime('now', '-60 seconds')")
            return len(ranks()) == 2 and ("chain-adapter-progress",) in shown

        wait_for(lambda: process.poll() is not None or training(), 300, what="the training's progress")
        assert process.poll() is None, log.read_text()
        everyone = [process.pid, *(p.pid for p in psutil.Process(process.pid).children(recursive=True))]
        real_server.interrupt(process)
        _, seconds = wait_for(lambda: not alive(everyone), 20, what="the end of every process")
        print(f"ctrl-C while 2 ranks train: nothing left after {seconds:.1f} s")
        assert process.returncode == 130 or process.wait() == 130
    assert last_run(copy)["state"] == "cancelled"
    (state,), = real_server.query(copy / "prefect", "select state_type from flow_run order by start_time desc limit 1")
    assert state == "CANCELLED"


def make_broken(finished: Path, tmp_path: Path) -> Path:
    """The same project with an empty workspace."""
    return Path(shutil.copytree(finished, tmp_path / "broken", ignore=shutil.ignore_patterns(".ftpipe"), copy_function=shutil.copy2))


def contents(folder: Path) -> dict[str, str]:
    """The content hash of the artifact that each stage last had."""
    found = {}
    for path in (folder / ".ftpipe" / "last" / "chain").glob("*.json"):
        entry = json.loads(path.read_text())
        manifest = json.loads((folder / ".ftpipe" / "store" / f"{entry['kind']}-{entry['key'][:16]}" / "manifest.json").read_text())
        found[path.stem.replace("__", "/")] = manifest["content"]
    return found


def kill_in(folder: Path, stage: str, after: float) -> bool:
    """Start a run, wait until it is in `stage`, let `after` seconds pass and kill it with SIGKILL. No process may be left 20 s later.

    Returns False if the stage is done already: the run that was killed before was faster than the kill."""
    if (folder / ".ftpipe" / "last" / "chain" / f"{stage.replace('/', '__')}.json").exists():
        return False
    known = set((folder / ".ftpipe" / "logs").glob("*"))
    with started(folder, "run", "pipeline.yaml", "--no-prefect") as (child, said):
        deadline = time.monotonic() + 300
        while not any((run / f"{stage.replace('/', '__')}.log").exists() for run in set((folder / ".ftpipe" / "logs").glob("*")) - known):
            assert child.is_alive(), f"the run ended before {stage}: {(said / 'err').read_text()[-2000:]}"
            assert time.monotonic() < deadline, f"{stage} did not start"
            time.sleep(0.02)
        time.sleep(after)
        family = psutil.Process(child.pid).children(recursive=True) if child.is_alive() else []
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive, f"left over after the flow was killed: {alive}"
    return True
