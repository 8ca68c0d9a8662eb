"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ftpipe import cli
from tests import kinds

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command in a folder with a small pipeline of test kinds; returns the result (exit_code, output)."""
    import importlib

    from ftpipe.cli._app import app

    for verb in cli.VERBS:
        importlib.import_module(f"ftpipe.cli.{verb}")
    kinds.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "numbers.txt").write_text("1\n5\n9\n12\n")
    (tmp_path / "p.yaml").write_text("name: demo\nstages:\n  numbers: {path: numbers.txt}\n  big: {kind: above, rows: numbers, threshold: 4}\n")
    return lambda *words: CliRunner().invoke(app, list(words), catch_exceptions=True)


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = ("import sys; sys.argv = ['ftpipe', '--help']\nfrom ftpipe import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'transformers', 'prefect', 'mlflow', 'duckdb', 'pyarrow', 'pandas', 'sklearn', 'deepspeed', 'peft'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_plan_run_status_log(call) -> None:
    assert "2 of 2 stages to run" in call("plan", "p.yaml").output
    done = call("run", "p.yaml", "--no-prefect")
    assert done.exit_code == 0, done.output
    assert "2 of 2 stages ran" in done.output
    assert "nothing to do" in call("run", "p.yaml", "--no-prefect").output
    planned = json.loads(call("plan", "p.yaml", "--json", "--set", "stages.big.threshold=6").output)
    assert [(p["stage"], p["action"], p["reason"]) for p in planned] == [("numbers", "REUSE", "unchanged"), ("big", "RUN", "threshold 4 → 6")]
    listed = json.loads(call("status", "--json").output)
    assert [r["state"] for r in listed] == ["succeeded", "succeeded"]
    assert "big" in call("status", listed[-1]["id"]).output
    assert set(listed[-1]["bytes"]) == {"numbers", "big"} and all(listed[-1]["bytes"].values()) and listed[0]["bytes"] == {}
    assert "big (above) starts: never built here" in call("log", "big").output
    lines = [json.loads(line) for line in call("log", "big", "--json", "--run", listed[-1]["id"]).output.splitlines()]
    assert {line["stage"] for line in lines} == {"big"} and lines[-1]["state"] == "built" and "counts" in lines[-1]
    assert json.loads(call("log", "--json").output.splitlines()[-1])["state"] == "succeeded"
    assert "no stage is named" in str(call("log").exception)


def test_status_says_in_a_line_what_stopped_a_run(call, tmp_path: Path) -> None:
    call("run", "p.yaml", "--no-prefect")
    file, = (tmp_path / ".ftpipe" / "runs").glob("*.json")
    record = json.loads(file.read_text()) | {"state": "failed"}
    record["stages"]["big"] |= {"state": "failed", "error": "rank 0 failed while step 7: no such [/INST]\n  File \"x.py\", line 3\n"}
    file.write_text(json.dumps(record))
    said = call("status").output
    assert f"{record['id']}  big: rank 0 failed while step 7: no such [/INST]\n" in said and "x.py" not in said
    assert "[/INST]" in call("status", record["id"]).output


def test_stage_alone(call) -> None:
    call("run", "p.yaml", "--no-prefect")
    done = call("stage", "big", "p.yaml", "--force")
    assert done.exit_code == 0 and "1 of 1 stages ran" in done.output


def test_failed_run_prints_the_command_that_resumes(call, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text((tmp_path / "p.yaml").read_text().replace("numbers.txt", "gone.txt"))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    code = "from tests import kinds; kinds.install(); import sys; sys.argv = ['ftpipe', 'run', 'p.yaml', '--no-prefect']; from ftpipe import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "gone.txt: no such file" in done.stderr and "Traceback" not in done.stderr
    assert "ftpipe run p.yaml --from numbers --no-prefect" in done.stderr


def test_why_names_decisions(call) -> None:
    call("run", "p.yaml", "--no-prefect")
    answer = call("why", "abcdefabcdef")
    assert "no row with id 'abcdefabcdef'" in str(answer.exception)


def test_brackets_in_data_are_text_to_the_terminal(call, monkeypatch) -> None:
    """`[/INST]` would otherwise be markup that closes what nobody opened, and `[link=...]` a link of a stranger's making."""
    said = {"row_id": "abcdefabcdef", "source": "a[/b].jsonl", "line": 1, "group": "[/red]", "split": "train", "text": "[INST] hi [/INST] [link=x]y[/link]",
            "times": 2, "seen": [], "decisions": [{"step": "s", "kept": False, "reason": "[/x]", "score": None, "keeper": None}]}
    monkeypatch.setattr("ftpipe.pipeline.lineage.trace", lambda *a: {"stage": "adapter", "key": "k", "rows": [said]})
    monkeypatch.setattr("ftpipe.pipeline.lineage.why", lambda *a: [said])
    for verb in ("trace", "why"):
        done = call(verb, "abcdefabcdef")
        assert done.exit_code == 0, done.exception
        assert all(said[key] in done.output for key in ("source", "group", "text")), done.output
    assert "[/x]" in done.output


def test_methods_names_slot_paper_and_settings(call) -> None:
    listed = json.loads(call("methods", "--json").output)
    assert {"name", "slot", "paper", "summary", "needs", "settings"} <= set(listed[0])
    assert {"stages", "data/sources", "curate/select", "train/adapt"} <= {m["slot"] for m in listed}
    assert all(m["summary"] for m in listed)
    wrong = call("methods", "curat")
    assert "did you mean" in str(wrong.exception)


def test_schema_describes_every_kind(call) -> None:
    import jsonschema

    schema = json.loads(call("schema").output)
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    assert not list(check.iter_errors({"name": "x", "stages": {"big": {"kind": "above", "rows": "numbers", "threshold": 4}}}))
    assert list(check.iter_errors({"name": "x", "stages": {"big": {"kind": "above", "rows": "numbers", "treshold": 4}}}))


def test_every_method_module_is_light() -> None:
    code = ("import sys; from ftpipe.cli.methods import inventory; inventory()\n"
            "heavy = {'torch', 'transformers', 'prefect', 'mlflow', 'pandas', 'sklearn', 'deepspeed', 'matplotlib'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 20


def test_init_writes_a_file_that_loads(call, tmp_path: Path) -> None:
    from ftpipe.pipeline import spec

    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert call("init", "mine.jsonl").exit_code == 0
    pipeline = spec.load("pipeline.yaml")
    assert pipeline.name == "mine"
    assert call("init", "mine.jsonl").exit_code != 0  # it does not overwrite
    assert "no such file" in str(call("init", "absent.jsonl", "--out", "x.yaml").exception)


def test_data_report_describes_a_file_before_there_is_a_pipeline(call, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"prompt": f"q{i % 8}", "completion": "answer"}) + "\n" for i in range(10)))
    done = call("data", "report", "d.jsonl", "--languages", "0")
    assert done.exit_code == 0, done.output
    assert "10 train rows" in done.output and "2 train rows" in done.output and "say exactly what another one says" in done.output
    assert Path(done.output.split("report: ")[1].strip()).is_file() and not (tmp_path / "pipeline.yaml").exists()
    assert call("data", "report", "none.jsonl").exit_code != 0


def test_doctor_finds_a_sound_installation_and_says_what_is_not(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = call("doctor", "p.yaml", "--json")
    found = {f["what"]: f for f in json.loads(done.output[done.output.index("[\n"):])}
    assert {"Python", "packages", "torch", "DeepSpeed", "Prefect", "workspace", "p.yaml"} <= set(found)
    assert done.exit_code == 0 and {f["state"] for f in found.values()} <= {"ok", "note"}, found
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    (tmp_path / "p.yaml").write_text("name: demo\nstages:\n  numbers: {path: none.txt}\n")
    done = call("doctor", "p.yaml")
    assert done.exit_code == 1 and "does not answer" in done.output and "PREFECT_API_URL" in done.output and "none.txt" in done.output


def test_gc_shows_first_and_removes_when_told(call, tmp_path: Path) -> None:
    call("run", "p.yaml", "--no-prefect")
    call("run", "p.yaml", "--no-prefect", "--set", "stages.big.threshold=6")
    listed = json.loads(call("gc", "--days", "0", "--json").output)
    assert [Path(f["path"]).name.split("-")[0] for f in listed["found"]] == ["above"] and listed["freed"] == 0
    assert "can be freed" in call("gc", "--days", "0").output and "freed" in call("gc", "--days", "0", "--yes").output
    assert "nothing to remove" in call("gc", "--days", "0").output
