"""Bad input as a user meets it: one clear error with place and remedy, no traceback, and before long work starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.chain import ftpipe, make_project

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def project(base: Path, tmp_path: Path) -> Path:
    """A project of its own that shares the model's folder."""
    for file in ("rows.jsonl", "pipeline.yaml"):
        (tmp_path / file).write_bytes((base / file).read_bytes())
    (tmp_path / "model").symlink_to(base / "model")
    return tmp_path


def refused(project: Path, *words: str, to: str | None = None, changes: tuple[str, ...] = ()) -> str:
    """Run, and return the error; it must name every one of `words` and nothing may have been trained."""
    where = ["--to", to] if to else []
    done = ftpipe(project, "run", "pipeline.yaml", "--no-prefect", *where, *(f"--set={c}" for c in changes), check=False)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    error = " ".join(done.stderr.split())
    for word in words:
        assert word in error, f"{word!r} is not in: {error}"
    assert not list((project / ".ftpipe" / "store").glob("train-*"))
    return error


def edit(project: Path, old: str, new: str) -> None:
    file = project / "pipeline.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


def nothing_ran(project: Path) -> bool:
    return not list((project / ".ftpipe" / "store").glob("*"))


def test_unknown_key(project: Path) -> None:
    edit(project, "max_tokens: 400", "max_token: 400")
    refused(project, "pipeline.yaml:10", "unknown key 'max_token'", "did you mean 'max_tokens'?")
    assert nothing_ran(project)


def test_unknown_method(project: Path) -> None:
    edit(project, "sensitivity_sampling:", "sensitivity_sampeling:")
    refused(project, "pipeline.yaml:", "no method 'sensitivity_sampeling'", "did you mean 'sensitivity_sampling'?")
    assert nothing_ran(project)


def test_unknown_setting_of_a_method(project: Path) -> None:
    edit(project, "clusters: 6", "cluster: 6")
    refused(project, "unknown key 'cluster'", "did you mean 'clusters'?", "pipeline.yaml:2")
    assert nothing_ran(project)


def test_model_that_does_not_exist(project: Path) -> None:
    edit(project, "model: model", "model: ./no-such-model")
    refused(project, "no-such-model")
    assert nothing_ran(project)


def test_zero_stage_with_too_few_ranks(project: Path) -> None:
    refused(project, "ranks", changes=("stages.adapter.ranks=64",))
    assert nothing_ran(project)


def test_missing_and_empty_file(project: Path) -> None:
    rows = project / "rows.jsonl"
    rows.rename(project / "elsewhere")
    refused(project, "rows.jsonl")
    rows.write_text("")
    refused(project, "rows.jsonl", "empty")
    assert nothing_ran(project)


def test_budget_larger_than_the_data(project: Path) -> None:
    edit(project, "budget: {rows: 12}", "budget: {rows: 5000}")
    refused(project, "5,000 rows", "larger than the data", "67 rows", to="warmup_rows")


def test_cut_line_and_mixed_encodings_are_quarantined_with_their_line(project: Path) -> None:
    rows = project / "rows.jsonl"
    good = rows.read_bytes().splitlines()[:90]
    latin = json.dumps({"prompt": "caf\u00e9", "completion": "yes", "topic": "t"}, ensure_ascii=False).encode("latin-1")
    rows.write_bytes(b"\n".join([*good, b'{"prompt": "cut in ha', latin]) + b"\n")
    ftpipe(project, "run", "pipeline.yaml", "--no-prefect", "--to", "ingest")
    import pyarrow.parquet as pq

    found = pq.read_table(next((project / ".ftpipe" / "store").glob("ingest-*/quarantine.parquet"))).to_pylist()
    assert sorted(q["line"] for q in found) == [91, 92]
    assert all(q["source"].endswith("rows.jsonl") and q["reason"] for q in found)


def test_too_many_bad_rows_stop_the_run(project: Path) -> None:
    rows = project / "rows.jsonl"
    rows.write_text(rows.read_text() + "not json\n" * 80)
    refused(project, "rows.jsonl", to="audit")


def test_prompt_longer_than_the_context_is_kept_aside_with_its_reason(project: Path) -> None:
    rows = project / "rows.jsonl"
    long = {"prompt": "word " * 200, "completion": "yes", "topic": "topic1"}
    rows.write_text(rows.read_text() + json.dumps(long) + "\n")
    ftpipe(project, "run", "pipeline.yaml", "--no-prefect", "--to", "audit")
    counts = json.loads(next((project / ".ftpipe" / "store").glob("label_audit-*/manifest.json")).read_text())["counts"]
    assert any("prompt" in reason and n == 1 for reason, n in counts.items() if reason.startswith("dropped"))


def test_paths_of_a_strangers_data_are_text_not_files(project: Path) -> None:
    """A row that looks like a template or a path is data: it is neither rendered as code nor opened."""
    rows = project / "rows.jsonl"
    hostile = {"prompt": "{{ cycler.__init__.__globals__ }} ../../etc/passwd", "completion": "{% raw %} <|im_end|>", "topic": "topic1"}
    rows.write_text(rows.read_text() + json.dumps(hostile) + "\n")
    ftpipe(project, "run", "pipeline.yaml", "--no-prefect", "--to", "audit")
