"""The score cache: what is known is not computed again, and no interruption, neighbour or damage changes a number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftpipe.data.rows import RowSet
from ftpipe.models import scores
from ftpipe.models.scores import score_rows
from tests.artifacts import chat, rows_artifact
from tests.models.data import context, some_rows

REPOSITORY = Path(__file__).parents[2]


def score(workspace: Path, rows: list[dict], model: Path, **options) -> tuple[pa.Table, dict]:
    ctx = context(workspace)
    table = score_rows(RowSet(rows_artifact(workspace, rows)), ctx, model=str(model), **options)
    return table, ctx.notes


def shards(workspace: Path) -> list[Path]:
    return sorted((workspace / "cache" / "scores").glob("*/*.parquet"))


def test_the_second_time_nothing_is_scored_and_nothing_loaded(tmp_path, tiny_model, monkeypatch):
    rows = some_rows(8)
    first, notes = score(tmp_path, rows, tiny_model)
    assert (notes["scored"], notes["cached"]) == (8, 0)
    assert first["row_id"].to_pylist() == sorted(first["row_id"].to_pylist())
    monkeypatch.setattr("ftpipe.models.service.ModelService.open", lambda *a, **k: pytest.fail("the model was loaded"))
    second, notes = score(tmp_path, rows, tiny_model)
    assert (notes["scored"], notes["cached"]) == (0, 8) and second.equals(first)


def test_an_edited_row_is_scored_alone_and_the_others_keep_their_bits(tmp_path, tiny_model):
    rows = some_rows(8)
    first, _ = score(tmp_path, rows, tiny_model)
    edited = [*rows[:3], chat("What does time_3 do?", "something else entirely"), *rows[4:]]
    second, notes = score(tmp_path, edited, tiny_model)
    assert (notes["scored"], notes["cached"]) == (1, 7)
    before, after = ({r["row_id"]: r for r in t.to_pylist()} for t in (first, second))
    assert len(before.keys() & after.keys()) == 7 and all(before[i] == after[i] for i in before.keys() & after.keys())


def test_equal_rows_are_scored_once_and_each_gets_its_line(tmp_path, tiny_model):
    rows = some_rows(4)
    table, notes = score(tmp_path, [*rows, rows[0]], tiny_model)
    assert notes["scored"] == 4 and table.num_rows == 5
    lines = [r for r in table.to_pylist() if r["content_id"] + "~2" in table["row_id"].to_pylist()]
    assert len(lines) == 2 and lines[0]["nll"] == lines[1]["nll"]


def test_what_is_asked_for_later_is_added_to_what_is_known(tmp_path, tiny_model):
    rows = some_rows(6)
    both, _ = score(tmp_path / "a", rows, tiny_model)
    embedded, notes = score(tmp_path / "b", rows, tiny_model, want=("embedding",))
    assert embedded["nll"].null_count == 6 and notes["scored"] == 6
    assert embedded["trained_tokens"].equals(both["trained_tokens"])
    some = both["row_id"].to_pylist()[:2]
    losses, notes = score(tmp_path / "b", rows, tiny_model, want=("loss",), only=some)
    assert notes["scored"] == 2 and losses["row_id"].to_pylist() == some and "embedding" not in losses.column_names
    again, notes = score(tmp_path / "b", rows, tiny_model)
    assert notes["scored"] == 4 and again.equals(both)


def test_one_pass_of_the_base_for_the_loss_leaves_the_embeddings_too(tmp_path, tiny_model):
    rows = some_rows(5)
    both, _ = score(tmp_path / "a", rows, tiny_model)
    losses, notes = score(tmp_path / "b", rows, tiny_model, want=("loss",))
    assert notes["scored"] == 5 and "embedding" not in losses.column_names
    embedded, notes = score(tmp_path / "b", rows, tiny_model, want=("embedding",))
    assert (notes["scored"], notes["cached"]) == (0, 5) and embedded["embedding"].equals(both["embedding"])


def test_another_model_precision_length_or_template_is_another_cache(tmp_path, tiny_model):
    import shutil

    from tests.tiny import make_tiny_model

    rows = some_rows(3)
    score(tmp_path, rows, tiny_model)
    other = make_tiny_model(tmp_path / "other", seed=5)
    template = tmp_path / "template"
    shutil.copytree(tiny_model, template)
    path = template / "chat_template.jinja"
    path.write_text(path.read_text().replace("'<|im_start|>'", "'<|im_start|> '"))
    for n, (model, options) in enumerate([(other, {}), (tiny_model, {"dtype": "float32"}), (tiny_model, {"max_length": 20}), (template, {})]):
        _, notes = score(tmp_path, rows, model, **options)
        assert notes["scored"] == 3, n
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    _, notes = score(tmp_path, rows, copy)
    assert notes["cached"] == 3, "the same files in another folder are the same model"


def test_rows_that_cannot_be_scored_say_why_and_are_not_tried_again(tmp_path, tiny_model):
    silent = {"format": "messages", "messages": [{"role": "user", "content": "hello?"}]}
    rows = [*some_rows(2), silent]
    table, _ = score(tmp_path, rows, tiny_model)
    line, = (r for r in table.to_pylist() if r["problem"])
    assert line["problem"] == "no assistant turn to train on" and line["loss"] is None and line["embedding"] is None and line["trained_tokens"] == 0
    _, notes = score(tmp_path, rows, tiny_model)
    assert notes["scored"] == 0


@pytest.mark.parametrize("damage", ["cut", "flipped byte", "not parquet", "empty"])
def test_a_damaged_shard_is_removed_with_a_warning_and_its_rows_scored_again(tmp_path, tiny_model, damage, caplog):
    rows = some_rows(6)
    score(tmp_path, rows[:3], tiny_model)
    damaged, = shards(tmp_path)
    whole, _ = score(tmp_path, rows, tiny_model)
    data = bytearray(damaged.read_bytes())
    if damage == "flipped byte":
        data[len(data) // 4] ^= 0xFF
    damaged.write_bytes({"cut": data[: len(data) // 2], "flipped byte": data, "not parquet": b"hello" * 100, "empty": b""}[damage])
    table, notes = score(tmp_path, rows, tiny_model)
    assert notes["scored"] == 3 and table.equals(whole)
    assert "damaged" in caplog.text and not damaged.exists()
    _, notes = score(tmp_path, rows, tiny_model)
    assert notes["scored"] == 0


def test_no_flipped_byte_of_the_data_goes_unseen(tmp_path, tiny_model):
    table, _ = score(tmp_path, some_rows(12), tiny_model)
    shard, = shards(tmp_path)
    data, contents = shard.read_bytes(), table["content_id"].to_pylist()
    footer = int.from_bytes(data[-8:-4], "little") + 8
    cache = scores.Cache(shard.parent)
    truth = {c: (e.nll, e.embedding.tobytes()) for c, e in cache.read(contents, ("loss", "embedding")).items()}
    unseen = []
    for at in range(4, len(data) - footer, 7):
        shard.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1:])
        found = {c: (e.nll, e.embedding.tobytes()) for c, e in cache.read(contents, ("loss", "embedding")).items()}
        if shard.exists() and found != truth:
            unseen.append(at)
    assert not unseen, f"{len(unseen)} flips changed what was read"


def test_an_interrupted_run_keeps_what_it_had(tmp_path, tiny_model, monkeypatch):
    from ftpipe.models.service import ModelService

    rows, inner, calls = some_rows(8), ModelService._score, []

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return inner(self, *args)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(ModelService, "_score", failing)
        score(tmp_path, rows, tiny_model)
    _, notes = score(tmp_path, rows, tiny_model)
    assert (notes["scored"], notes["cached"]) == (3, 5)


def test_the_shards_of_a_finished_run_are_joined(tmp_path, tiny_model):
    table, _ = score(tmp_path, some_rows(8), tiny_model, flush_seconds=0)
    assert len(shards(tmp_path)) == 1
    assert pq.read_table(shards(tmp_path)[0]).num_rows == 8
    again, notes = score(tmp_path, some_rows(8), tiny_model)
    assert notes["scored"] == 0 and again.equals(table)


SCRIPT = """
import sys, time
from pathlib import Path
from ftpipe.data.rows import RowSet
from ftpipe.models.scores import score_rows
from ftpipe.models.service import ModelService
from tests.artifacts import rows_artifact
from tests.models.data import context, some_rows
workspace, model, n, wait = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
inner = ModelService._score
def slow(self, *args):
    time.sleep(wait)
    return inner(self, *args)
ModelService._score = slow
ctx = context(workspace)
rows = RowSet(rows_artifact(workspace, some_rows(n)))
score_rows(rows, ctx, model=model, flush_seconds=0.05)
print(ctx.notes["scored"], ctx.notes["cached"])
"""


def start(workspace: Path, model: Path, n: int, wait: float) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(workspace), str(model), str(n), str(wait)], env=env, stdout=subprocess.PIPE, text=True)


def test_killed_in_the_middle_it_goes_on_and_comes_to_the_same_table(tmp_path, tiny_model):
    process = start(tmp_path / "killed", tiny_model, 40, 0.05)
    deadline = time.monotonic() + 60
    while len(shards(tmp_path / "killed")) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed, notes = score(tmp_path / "killed", some_rows(40), tiny_model)
    assert notes["cached"] >= 3 and notes["scored"] >= 1 and notes["scored"] + notes["cached"] == 40
    unbroken, _ = score(tmp_path / "unbroken", some_rows(40), tiny_model)
    assert resumed.equals(unbroken)


def test_two_processes_at_once_leave_one_truth(tmp_path, tiny_model):
    processes = [start(tmp_path / "both", tiny_model, 16, 0.02) for _ in range(2)]
    assert [p.wait(timeout=90) for p in processes] == [0, 0]
    table, notes = score(tmp_path / "both", some_rows(16), tiny_model)
    assert notes["scored"] == 0
    assert table.equals(score(tmp_path / "alone", some_rows(16), tiny_model)[0])


def test_reading_starts_again_when_shards_are_joined_meanwhile(tmp_path, tiny_model, monkeypatch):
    table, _ = score(tmp_path, some_rows(4), tiny_model)
    inner, failures = scores.Cache._read, []

    def vanishing(self, *args):
        if not failures:
            failures.append(1)
            raise FileNotFoundError
        return inner(self, *args)

    monkeypatch.setattr(scores.Cache, "_read", vanishing)
    again, notes = score(tmp_path, some_rows(4), tiny_model)
    assert notes["scored"] == 0 and again.equals(table) and failures
