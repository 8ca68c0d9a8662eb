"""Nothing is lost and nothing half done is seen: kill -9, full disk, altered files, two runs at once."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftpipe.errors import ArtifactError, InfrastructureError
from ftpipe.pipeline import spec
from ftpipe.pipeline.plan import plan
from ftpipe.pipeline.runner import Selection, run, runs
from ftpipe.pipeline.store import Store
from tests.kinds import ran
from tests.stages_for_tests import wait_for

ROOT = Path(__file__).parents[2]
CHILD = ("from tests import kinds; kinds.install(); from ftpipe.pipeline import spec, runner; import sys; "
         "runner.run(spec.load('pipeline.yaml', overrides={'stages.big.wait': 'go'}))")


def start(project: Path) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", CHILD], cwd=project, env=env, stderr=subprocess.PIPE)


def test_killed_run_leaves_no_half_artifact_and_the_next_one_finishes(project: Path) -> None:
    child = start(project)
    wait_for(lambda: ran(project / ".ftpipe", "above") == 1, 120, every=0.02, what="the stage's start")
    child.send_signal(signal.SIGKILL)
    child.wait()
    store = Store(project / ".ftpipe")
    assert [a.name for a in store.all()] == ["numbers"]
    assert next((project / ".ftpipe" / "work").glob("above-*/partial")).read_text() == "resumable"
    assert runs(project / ".ftpipe")[0]["state"] == "killed"
    done = run(spec.load("pipeline.yaml"))
    assert done.artifacts["total"].json("sum.json") == 38
    assert not list((project / ".ftpipe" / "tmp").iterdir())
    assert not list((project / ".ftpipe" / "work").iterdir())


def test_two_runs_at_once_build_each_artifact_once(project: Path) -> None:
    children = [start(project), start(project)]
    wait_for(lambda: ran(project / ".ftpipe", "above") >= 1, 120, every=0.02, what="the stage's start")
    time.sleep(0.5)
    (project / ".ftpipe" / "go").touch()
    assert [c.wait(timeout=60) for c in children] == [0, 0]
    assert ran(project / ".ftpipe", "numbers") == 1
    assert ran(project / ".ftpipe", "above") == 3
    assert ran(project / ".ftpipe", "sum") == 1


def test_full_disk_is_named_and_leaves_nothing_behind(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.write_text

    def full(self: Path, *args, **kwargs):
        if self.name == "half.json":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InfrastructureError, match="the disk is full") as caught:
        run(spec.load("pipeline.yaml"))
    assert caught.value.retryable
    monkeypatch.undo()
    from tests import kinds

    kinds.install(monkeypatch)
    os.chdir(project)
    assert [a.name for a in Store(project / ".ftpipe").all()] == ["numbers"]
    assert run(spec.load("pipeline.yaml")).artifacts["total"].json("sum.json") == 38


@pytest.mark.skipif(os.geteuid() != 0 or not os.access("/sbin/mke2fs", os.X_OK), reason="needs root to mount a small file system")
def test_really_full_file_system(project: Path, tmp_path: Path) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        (project / "numbers.txt").write_text("\n".join(map(str, range(60_000))))
        with pytest.raises(InfrastructureError, match="the disk is full"):
            run(spec.load("pipeline.yaml", overrides={"workspace": str(disk / "ws")}))
        assert Store(disk / "ws").all() == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_one_flipped_byte_is_found_and_the_artifact_is_made_again(project: Path) -> None:
    done = run(spec.load("pipeline.yaml"))
    flip(done.artifacts["big"].file("numbers.json"))
    pipeline = spec.load("pipeline.yaml")
    planned = {p.name: p for p in plan(pipeline, Store(pipeline.env.workspace))}
    assert planned["big"].run and "SHA-256 differs" in planned["big"].reason
    again = run(pipeline)
    assert again.record["stages"]["big"]["state"] == "built"
    assert again.record["stages"]["total"]["state"] == "reused"
    kept = list((project / ".ftpipe" / "quarantine").iterdir())
    assert len(kept) == 1 and "SHA-256 differs" in (kept[0] / "QUARANTINE.txt").read_text()


def test_vanished_file_and_cut_manifest_are_found(project: Path) -> None:
    done = run(spec.load("pipeline.yaml"))
    done.artifacts["big"].file("numbers.json").unlink()
    assert run(spec.load("pipeline.yaml")).record["stages"]["big"]["reason"] == "file numbers.json is missing"
    manifest = done.artifacts["numbers"].path / "manifest.json"
    whole = manifest.read_text()
    for damaged in (whole[:100], whole.replace('"rows_kept": 4', '"rows_kept": 5'), "{}", "[]"):
        manifest.write_text(damaged)
        assert run(spec.load("pipeline.yaml")).record["stages"]["numbers"]["state"] == "built", damaged[:80]


def test_input_altered_while_the_run_is_under_way_stops_the_reader(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ftpipe.pipeline.runner import Run

    pipeline = spec.load("pipeline.yaml")
    at_work = Run(pipeline)
    at_work.execute("numbers")
    flip(at_work.artifacts["numbers"].file("numbers.json"))
    with pytest.raises(ArtifactError, match="input numbers was altered"):
        at_work.execute("big")


def test_interrupt_is_recorded_as_cancelled(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import kinds

    def interrupted(self, ctx):
        raise KeyboardInterrupt

    monkeypatch.setattr(kinds.SumStage, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(spec.load("pipeline.yaml"))
    assert runs(project / ".ftpipe")[0]["state"] == "cancelled"


def test_selection_of_one_stage_leaves_the_others_alone(project: Path) -> None:
    pipeline = spec.load("pipeline.yaml")
    run(pipeline, selection=Selection.of(pipeline, to="big"))
    assert {a.name for a in Store(project / ".ftpipe").all()} == {"numbers", "big"}
