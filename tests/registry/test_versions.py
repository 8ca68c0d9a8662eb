"""A version's files are hashed again before every use; one flipped byte is found wherever it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from ftpipe.errors import ArtifactError
from ftpipe.registry import ledger, server, versions
from ftpipe.stages.base import Environment
from tests.registry.helpers import adapter_artifact, built, content, registered


def flip(path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_found_in_any_file_of_a_version(env: Environment):
    """Every file below the model's folder, at its beginning, its end and many places between; in the ledger every single byte."""
    registered(env, 1)
    registered(env, 2, beat=content(env, 1))
    folder = versions.load_version(env, "demo", 1)
    mine = sorted(p for p in folder.rglob("*") if p.is_file())
    assert {p.relative_to(folder).as_posix() for p in mine} == {"README.md", "adapter_model.safetensors", "ftpipe_adapter.json", "manifest.json",
                                                                "evidence/train.json"}
    of_all = [ledger.folder(env, "demo") / n for n in (ledger.VERSIONS, ledger.HISTORY)]
    other = versions.load_version(env, "demo", 2)
    assert {p for p in ledger.folder(env, "demo").rglob("*") if p.is_file() and other not in p.parents} == {*mine, *of_all}, "no file that nobody looks at"
    assert versions.verify(env, "demo", 1) == [] == versions.verify(env, "demo", "champion")
    for path in (*mine, *of_all):
        whole = path.read_bytes()
        places = range(len(whole)) if path in of_all else {0, len(whole) - 1, *range(0, len(whole), 1 + len(whole) // 8)}
        for at in places:
            flip(path, at)
            found = ledger.problems(env, "demo") if path in of_all and at % 50 else versions.verify(env, "demo", 1)
            assert any(path.name in problem for problem in found), f"byte {at} of {path.name}"
            if path in mine and at == 0:
                with pytest.raises(ArtifactError, match="was altered"):
                    versions.load_version(env, "demo", 1)
            path.write_bytes(whole)
    assert versions.verify(env, "demo", 1) == []


def test_a_history_that_lost_its_middle_or_its_hash_is_found(env: Environment):
    registered(env, 1)
    registered(env, 2, beat=content(env, 1))
    path = ledger.folder(env, "demo") / ledger.HISTORY
    lines = path.read_bytes().splitlines(keepends=True)
    for shorter in (lines[:2] + lines[3:], [*lines[:-1], lines[-1].replace(b"sha256", b"sha255")], [*lines, b"{}\n"]):
        path.write_bytes(b"".join(shorter))
        assert versions.verify(env, "demo", 1) == ["history.jsonl is not what was written (its SHA-256 differs)"]
    path.write_bytes(b"".join(lines)[:-9])
    assert "cut short" in versions.verify(env, "demo", 1)[0]


def test_missing_and_added_files_are_found(env: Environment):
    registered(env, 1)
    folder = versions.load_version(env, "demo", 1)
    (folder / "README.md").unlink()
    (folder / "payload.pkl").write_bytes(b"x")
    assert versions.verify(env, "demo", 1) == ["README.md is missing", "payload.pkl was not registered"]


def test_a_manifest_rewritten_to_match_an_altered_file_is_found(env: Environment):
    registered(env, 1)
    folder = versions.load_version(env, "demo", 1)
    flip(folder / "README.md", 0)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["README.md"]["sha256"] = ledger.files_content({"x": {"sha256": ""}}, "")[:64]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json is not what was registered (its SHA-256 differs)" in versions.verify(env, "demo", 1)


def test_a_damaged_version_is_made_whole_by_registering_it_again(env: Environment):
    registered(env, 1)
    folder = versions.load_version(env, "demo", 1)
    flip(folder / "adapter_model.safetensors")
    again = registered(env, 1)
    assert (again.version, again.created) == (1, False)
    assert versions.verify(env, "demo", 1) == []
    assert len(list(ledger.folder(env, "demo").glob(".damaged-*"))) == 1, "kept for a look"


def test_a_version_whose_files_are_gone_says_so(env: Environment):
    import shutil

    registered(env, 1)
    shutil.rmtree(ledger.folder(env, "demo") / content(env, 1))
    with pytest.raises(ArtifactError, match="are gone"):
        versions.load_version(env, "demo", 1)
    assert registered(env, 1).version == 1
    assert versions.verify(env, "demo", 1) == []


def test_the_manifest_hash_in_mlflow_is_the_one_of_the_folder(env: Environment):
    from ftpipe.canonical import file_digest

    registered(env, 1)
    tags = server.client(env).get_model_version("demo", "1").tags
    assert tags["ftpipe.manifest"] == file_digest(ledger.folder(env, "demo") / content(env, 1) / "manifest.json")


def test_building_the_same_adapter_twice_gives_the_same_bytes(env: Environment):
    from ftpipe.pipeline.store import Store

    artifact = adapter_artifact(Store(env.workspace), 1)
    one, two = built(env, "demo", artifact), built(env, "demo", artifact)
    assert (one.content, one.manifest) == (two.content, two.manifest)
    told = built(env, "demo", adapter_artifact(Store(env.workspace), 1, extra={"steps": 7}))
    assert versions.training_of(told.folder) == {"steps": 7} and versions.training_of(env.workspace) == {}


def test_the_ledger_is_read_without_mlflow_or_torch(env: Environment):
    registered(env, 1)
    code = (f"import sys; from pathlib import Path; from ftpipe.stages.base import Environment; from ftpipe.registry import ledger;"
            f"env = Environment(workspace=Path({str(env.workspace)!r}), base=Path('.'), pipeline='demo');"
            f"assert ledger.champion(env, 'demo')['version'] == 1; assert not {{'mlflow', 'torch', 'duckdb'}} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
