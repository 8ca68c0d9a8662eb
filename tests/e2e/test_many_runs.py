"""Ten runs at once over one workspace: what they have in common is made once, each comes to what it would alone, and nobody is locked out."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ftpipe.artifacts import Artifact
from tests.e2e.chain import ftpipe, make_project, started

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
RUNS = 10
PIPELINE = """
name: many{i}
model: model
seed: 3
stages:
  ingest:
    source: {{jsonl: {{path: rows.jsonl}}}}
    group_by: topic
    heldout: {{by: group, share: 0.2}}
  audit: {{kind: label_audit, rows: ingest, max_tokens: 400}}
  pool: {{kind: curate, rows: audit, steps: [exact_dedup, minhash: {{threshold: 0.8}}]}}
  chosen: {{kind: curate, rows: pool, steps: [perplexity: {{keep: {keep}}}, sensitivity_sampling: {{clusters: 4, budget: {{share: 0.5}}}}]}}
"""


def chosen(folder: Path, i: int) -> set[str]:
    """Rows that a run chose."""
    entry = json.loads((folder / ".ftpipe" / "last" / f"many{i}" / "chosen__sensitivity_sampling.json").read_text())
    kept, = (folder / ".ftpipe" / "store").glob(f"*-{entry['key'][:16]}/kept.parquet")
    return set(pq.read_table(kept)["row_id"].to_pylist())


def test_ten_runs_at_once_share_what_they_can_and_disturb_nothing(tmp_path: Path) -> None:
    together, alone = make_project(tmp_path / "together"), tmp_path / "alone"
    for i in range(RUNS):
        (together / f"many{i}.yaml").write_text(PIPELINE.format(i=i, keep=0.5 + 0.05 * i))
    shutil.copytree(together, alone)

    with ExitStack() as held:
        runs = [held.enter_context(started(together, "run", f"many{i}.yaml", "--no-prefect")) for i in range(RUNS)]
        for process, _ in runs:
            process.join(300)
        said = ["".join((folder / name).read_text() for name in ("out", "err")) for _, folder in runs]
    assert [process.exitcode for process, _ in runs] == [0] * RUNS, "\n".join(said)[-5000:]
    assert not [text for text in said if "locked" in text or "busy" in text or "Traceback" in text]

    stages = [s for file in (together / ".ftpipe" / "runs").glob("*.json") for s in json.loads(file.read_text())["stages"].values()]
    built = Counter(s["kind"] for s in stages if s["state"] == "built")
    assert built == {"ingest": 1, "label_audit": 1, "curate_step": 2 + 2 * RUNS}, "what they have in common was made once, by whichever came first"
    assert len(stages) == 6 * RUNS and len({s["key"] for s in stages}) == built.total()
    store = list((together / ".ftpipe" / "store").iterdir())
    assert len(store) == built.total() and not [problem for path in store if (problem := Artifact(path).problem())]
    picked = [chosen(together, i) for i in range(RUNS)]
    assert len({frozenset(p) for p in picked}) > 1
    for i in (0, RUNS - 1):
        ftpipe(alone, "run", f"many{i}.yaml", "--no-prefect")
        assert chosen(alone, i) == picked[i]
