"""A version's folder: built beside and renamed into place, never changed afterwards, verified before every use."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from ftpipe.artifacts import Artifact
from ftpipe.canonical import file_digest
from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.registry import ledger
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
PROBE = "probe.safetensors"
TRAINING = "train.json"
EVIDENCE = "evidence"
"""Subfolder of a version with what is not the adapter itself, so that the top level can be handed to PEFT or pushed to the hub as it is."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}
"""Largest allowed difference of a logit between the trained model and the adapter loaded afresh, as a share of the largest logit."""


@dataclass(frozen=True)
class Built:
    """A version's folder that is not yet in its place. content: identity of the adapter. manifest: SHA-256 of `manifest.json`."""

    folder: Path
    content: str
    manifest: str


def build(env: Environment, name: str, adapter: Artifact, card: str, facts: dict[str, Any], extra: dict[str, Path] | None = None) -> Built:
    """Write a version's files beside the registry: the adapter, its card, what it rests on, and a manifest with the hash of each.

    Args:
        adapter: artifact with `adapter/`, and perhaps `probe.safetensors` and `train.json`.
        card: text of README.md.
        facts: JSON for the manifest (base, lineage, verdict).
        extra: further files for `evidence/`, by the name they get there.
    """
    content = ledger.adapter_content(adapter)
    target = ledger.folder(env, name) / f".building-{content[:16]}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
    target.mkdir(parents=True)
    try:
        shutil.copytree(adapter.file(ledger.ADAPTER.rstrip("/")), target, dirs_exist_ok=True)
        copies = dict(extra or {})
        copies |= {file: adapter.file(file) for file in (PROBE, TRAINING) if adapter.has(file)}
        (target / EVIDENCE).mkdir()
        for file, source in copies.items():
            shutil.copyfile(source, target / EVIDENCE / file)
        (target / "README.md").write_text(card, encoding="utf-8")
        files = {p.relative_to(target).as_posix(): {"size": p.stat().st_size, "sha256": file_digest(p)} for p in sorted(target.rglob("*")) if p.is_file()}
        own = {n[len(ledger.ADAPTER):] for n in adapter.manifest["files"] if n.startswith(ledger.ADAPTER)}
        manifest = {"manifest_version": 1, "name": name, "content": content, "adapter_files": sorted(own), "files": files} | facts
        (target / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        if ledger.files_content({n: files[n] for n in own}, str(target)) != content:
            raise ArtifactError("the adapter changed while it was copied", where=str(adapter.path), remedy="run the pipeline again")
        _sync(target)
        return Built(target, content, file_digest(target / MANIFEST))
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def place(env: Environment, name: str, built: Built) -> tuple[Path, str]:
    """Rename a built folder to its final place, or throw it away where the same adapter lies there whole. The caller holds the ledger's lock.

    Returns the folder and the SHA-256 of its manifest. A damaged folder of that name is moved aside, for a look.
    """
    target = ledger.folder(env, name) / built.content
    if target.exists():
        entry = next((v for v in ledger.read_versions(env, name) if v["content"] == built.content), None)
        expected = entry["manifest"] if entry else None
        if not problems(target, expected, built.content):
            shutil.rmtree(built.folder)
            return target, file_digest(target / MANIFEST)
        target.rename(target.with_name(f".damaged-{built.content[:16]}-{uuid.uuid4().hex[:6]}"))
    built.folder.rename(target)
    return target, built.manifest


def problems(folder: Path, manifest_sha: str | None, content: str | None) -> list[str]:
    """Everything that is wrong with a version's folder; empty if it is what was registered.

    Every file is hashed again, the manifest too (against `manifest_sha`, which the ledger and MLflow hold), and nothing else may lie there.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return [f"{path} is missing"]
    found = []
    if manifest_sha is not None and file_digest(path) != manifest_sha:
        found.append(f"{MANIFEST} is not what was registered (its SHA-256 differs)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
        for name, entry in files.items():
            file = folder / name
            if not file.is_file():
                found.append(f"{name} is missing")
            elif file.stat().st_size != entry["size"]:
                found.append(f"{name} has {file.stat().st_size} bytes, {entry['size']} were registered")
            elif file_digest(file) != entry["sha256"]:
                found.append(f"{name} is not what was registered (its SHA-256 differs)")
        own = {n: files[n] for n in manifest["adapter_files"]}
        if content is not None and ledger.files_content(own, str(folder)) != content:
            found.append("the manifest is of another adapter")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [*found, f"{MANIFEST} cannot be read: {error}"]
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return found + [f"{name} was not registered" for name in sorted(there - set(files) - {MANIFEST})]


def verify(env: Environment, name: str, version: int | str) -> list[str]:
    """What is wrong with a registered version, as sentences; empty if every byte is what was registered.

    Hashed again are the version's files, and the ledger that says which they are and how aliases moved.
    """
    found = ledger.problems(env, name)
    if any(problem.startswith(ledger.VERSIONS) for problem in found):
        return found  # it would say which files to look at
    try:
        entry = ledger.find(env, name, version)
    except ConfigError:
        if found:  # the damaged history does not know the alias any more
            return found
        raise
    return found + problems(ledger.folder(env, name) / entry["content"], entry["manifest"], entry["content"])


def training_of(folder: Path) -> dict[str, Any]:
    """`train.json` of the training that made a version's adapter, from its evidence; empty if nothing is known of one."""
    path = folder / EVIDENCE / TRAINING
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def load_version(env: Environment, name: str, version: int | str) -> Path:
    """The adapter folder of a registered version, after hashing every file again. Fetches it first if another workspace registered it.

    Raises ArtifactError for an altered version.
    """
    entry = ledger.find(env, name, version)
    folder = ledger.folder(env, name) / entry["content"]
    if not folder.exists():
        _fetch(env, name, entry, folder)
    found = problems(folder, entry["manifest"], entry["content"])
    if found:
        raise ArtifactError(f"version {entry['version']} of {name} was altered: {'; '.join(found[:3])}", where=str(folder),
                            remedy="roll the alias back to another version, and register this one again from its pipeline")
    return folder


def _fetch(env: Environment, name: str, entry: dict[str, Any], folder: Path) -> None:
    """Bring a version that lies on a server or in another workspace to its place in this one. The caller may hold the ledger's lock."""
    from ftpipe.registry import server

    if server.registry_uri(env) == f"sqlite:///{env.workspace / 'mlflow.db'}":
        raise ArtifactError(f"the files of version {entry['version']} are gone", where=str(folder), remedy="run its pipeline again; it registers them anew")
    from mlflow.artifacts import download_artifacts

    mlflow = server.client(env)
    source = server.call(mlflow.get_model_version_download_uri, name, str(entry["version"]))
    if source.startswith("file:") and not Path(url2pathname(urlparse(source).path)).is_dir():
        raise ArtifactError(f"the files of version {entry['version']} lie in a workspace that cannot be read from here", where=source,
                            remedy="set `tracking:` to an MLflow server, which keeps the files of all, or share that folder; then register it again")
    temporary = folder.with_name(f".fetching-{entry['content'][:16]}-{uuid.uuid4().hex[:6]}")
    try:
        server.call(download_artifacts, artifact_uri=source, dst_path=str(temporary), tracking_uri=server.tracking_uri(env),
                    registry_uri=server.registry_uri(env))
        inner = temporary if (temporary / MANIFEST).exists() else next(p.parent for p in temporary.rglob(MANIFEST))
        try:
            inner.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was quicker
                raise
    except StopIteration:
        raise ArtifactError(f"version {entry['version']} has no {MANIFEST}", where=source) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_model(env: Environment, name: str, version: int | str, model: str, **options: Any) -> Any:
    """The base model `model` with a registered version's adapter on it. `options` are those of `ftpipe.models.loading.load_adapted`.

    Raises ArtifactError for an altered version and for an adapter that was trained on another base.
    """
    from ftpipe.models.loading import load_adapted

    return load_adapted(model, env, load_version(env, name, version), **options)


def check_probe(folder: Path, load: Callable[[], Any]) -> float | None:
    """Load the adapter afresh and compare its logits with those the trained model had in memory.

    `load` returns the adapted model. Returns the largest difference as a share of the largest logit, or None if there is no probe.
    Raises ArtifactError beyond `TOLERANCE`: what was saved is not what was trained.
    """
    from safetensors.torch import load_file

    if not (folder / EVIDENCE / PROBE).is_file():
        return None
    probe = load_file(folder / EVIDENCE / PROBE)
    model = load()
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    expected = probe["logits"].float()
    found = probe_logits(model, probe)
    if found.shape != expected.shape:
        raise ArtifactError(f"the probe has logits of shape {list(expected.shape)}, the adapter loaded afresh gives {list(found.shape)}", where=str(folder))
    gap = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
    limit = TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    if not gap <= limit:
        raise ArtifactError(f"the adapter loaded afresh gives other logits than the trained model: off by {gap:.3g} of the largest, {limit:.3g} is allowed",
                            where=str(folder), remedy="the adapter was not saved as it was trained; train it again, and report this if it happens twice")
    return gap


def probe_logits(model: Any, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of each probe row's last position, shape (rows, vocabulary), float32 on the CPU."""
    import torch

    device = next(model.parameters()).device
    rows = probe["input_ids"]
    lengths = probe["lengths"].tolist() if "lengths" in probe else [rows.shape[1]] * rows.shape[0]
    with torch.inference_mode():
        return torch.stack([model(input_ids=row[:n].unsqueeze(0).to(device)).logits[0, -1].float().cpu() for row, n in zip(rows, lengths)])
