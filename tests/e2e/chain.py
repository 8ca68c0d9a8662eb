"""The whole chain on a tiny model: the quickstart's stages over rows made on the spot."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.flows import real_server
from tests.tiny import make_tiny_model

WORDS = ["river", "stone", "lamp", "green", "seven", "walk", "table", "quiet", "north", "paper", "glass", "bread", "cloud", "small", "open", "red", "yard",
         "wheel", "south", "wood"]


def make_project(folder: Path, *, rows: int = 90) -> Path:
    """Write model, data and pipeline.yaml below `folder`. A third of the rows are learnable (the answer repeats the question's words),
    and there are exact and near duplicates, a broken line and a row whose answer is empty."""
    make_tiny_model(folder / "model")
    rng = random.Random(5)
    lines = []
    for i in range(rows):
        words = rng.sample(WORDS, 6)
        answer = " ".join(words) if i % 3 == 0 else " ".join(rng.sample(WORDS, 8))
        lines.append(json.dumps({"prompt": f"Say it: {' '.join(words)}", "completion": answer, "topic": f"topic{i % 12}"}))
    lines += [lines[0], lines[3], '{"prompt": "cut in ha', json.dumps({"prompt": "nothing to learn", "completion": "", "topic": "topic1"})]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "pipeline.yaml").write_text(PIPELINE)
    return folder


PIPELINE = """
name: chain
model: model
seed: 3
stages:
  ingest:
    source: {jsonl: {path: rows.jsonl}}
    group_by: topic
    heldout: {by: group, share: 0.2}
  audit: {kind: label_audit, rows: ingest, max_tokens: 400}
  pool:
    kind: curate
    rows: audit
    steps: [exact_dedup, minhash: {threshold: 0.8}, decontaminate]
  warmup_rows: {kind: curate, rows: pool, steps: [random: {budget: {rows: 12}}]}
  reference: {kind: train, rows: warmup_rows, learning_rate: 1.0e-3, batch_tokens: 512}
  curated:
    kind: curate
    rows: pool
    steps:
      - perplexity: {keep: 0.9}
      - lobass: {reference: reference, budget: {share: 0.8}}
      - sensitivity_sampling: {clusters: 6, budget: {tokens: 3000}}
  adapter: &training {kind: train, rows: curated, learning_rate: 3.0e-2, epochs: 2, batch_tokens: 512, checkpoint_every: 1}
  random_rows: {kind: curate, rows: pool, steps: [random: {budget: {like: curated}}]}
  random: {<<: *training, rows: random_rows}
  evaluate: {rows: audit, candidate: adapter, controls: {random: random}, examples: 1}
  gate:
    evaluation: evaluate
    rules:
      - {name: beats the base, suite: heldout_loss, against: base, require: better}
      - {name: beats the champion, suite: heldout_loss, against: champion, require: better}
      - {name: selection helps, suite: heldout_loss, against: random, require: better, required: false}
  register: {verdict: gate, adapter: adapter, evaluation: evaluate}
  report: {evaluation: evaluate, verdict: gate, registration: register, adapter: adapter, controls: [random]}
"""


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}


def seen(folder: Path) -> dict[str, str]:
    """An environment in which runs are seen by a local Prefect server whose database is in `folder`."""
    return real_server.environment(folder / "prefect", environment())


PRELOADED = ["duckdb", "matplotlib.figure", "mlflow", "pandas", "peft", "pyarrow.parquet", "sklearn.cluster", "torch", "transformers.models.auto.modeling_auto",
             "transformers.generation", "ftpipe.cli"]
"""What commands spend most of their time importing here. Not Prefect, which reads its environment when it is imported."""


@contextmanager
def started(folder: Path, *words: str, env: dict[str, str] | None = None) -> Iterator[tuple[multiprocessing.Process, Path]]:
    """A command of the command line at work in `folder`, and the folder that `out` and `err` are written to.

    It is a process of its own, forked from one that has the libraries already.
    """
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as said:
        process = forks.Process(target=_command, args=(words, str(folder), env or environment(), said))
        process.start()
        try:
            yield process, Path(said)
        finally:
            process.kill()
            process.join()


def ftpipe(folder: Path, *words: str, check: bool = True, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line in `folder`; see `started`."""
    with started(folder, *words, env=env) as (process, said):
        process.join(400)
        assert process.exitcode is not None, f"{words} did not end"
        done = subprocess.CompletedProcess(words, process.exitcode, *((said / name).read_text() for name in ("out", "err")))
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


def _command(words: tuple[str, ...], folder: str, env: dict[str, str], said: str) -> None:
    """What the process does: it becomes what a new one with this environment would be, and ends as one would."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for name, number in (("out", 1), ("err", 2)):
        file = os.open(Path(said) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    sys.argv = ["ftpipe", *words]
    from ftpipe import cli

    try:
        cli.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()


def last_run(folder: Path) -> dict:
    """The record of the newest run."""
    return json.loads(max((folder / ".ftpipe" / "runs").glob("*.json"), key=lambda p: p.stat().st_mtime_ns).read_text())


def adapter_hash(folder: Path, stage: str = "adapter") -> str:
    """SHA-256 of the weights that a training stage last made, as its manifest has it."""
    entry = json.loads((folder / ".ftpipe" / "last" / "chain" / f"{stage}.json").read_text())
    manifest = json.loads((folder / ".ftpipe" / "store" / f"train-{entry['key'][:16]}" / "manifest.json").read_text())
    return manifest["files"]["adapter/adapter_model.safetensors"]["sha256"]
