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


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "ftpipe_adapter.json", "README.md", "manifest.json"])
def test_a_flipped_byte_is_found_by_verify_and_by_load(env: Environment, file: str):
    registered(env, 1)
    assert versions.verify(env, "demo", "champion") == []
    folder = versions.load_version(env, "demo", 1)
    flip(folder / file, 40 if file == "manifest.json" else 5)
    assert any(file in problem for problem in versions.verify(env, "demo", 1))
    with pytest.raises(ArtifactError, match="was altered"):
        versions.load_version(env, "demo", 1)


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


def test_the_ledger_is_read_without_mlflow_or_torch(env: Environment):
    registered(env, 1)
    code = (f"import sys; from pathlib import Path; from ftpipe.stages.base import Environment; from ftpipe.registry import ledger;"
            f"env = Environment(workspace=Path({str(env.workspace)!r}), base=Path('.'), pipeline='demo');"
            f"assert ledger.champion(env, 'demo')['version'] == 1; assert not {{'mlflow', 'torch', 'duckdb'}} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
