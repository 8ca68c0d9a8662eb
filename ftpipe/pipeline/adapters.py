"""An adapter by whatever a user calls it: a registered version, a stage, a key, or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ftpipe.artifacts import MANIFEST, Artifact
from ftpipe.errors import ConfigError, nearest
from ftpipe.models.adapters import read_manifest
from ftpipe.pipeline.store import Store
from ftpipe.stages.base import Environment

FACTS = "ftpipe_adapter.json"
LAST = "last"


@dataclass(frozen=True)
class Found:
    """name: how to speak of it. One of the others is set: a folder, the artifact of a stage or key, or a registered (model, version or alias)."""

    name: str
    folder: Path | None = None
    artifact: Artifact | None = None
    version: tuple[str, str] | None = None


@dataclass(frozen=True)
class Located:
    """name: how to speak of it. folder: what `models.loading.load_adapted` takes. model: its base, as a pipeline names it. env: where both are found."""

    name: str
    folder: Path
    model: str
    env: Environment


def find(env: Environment, text: str) -> Found:
    """The adapter that `text` names: a folder; NAME, NAME@ALIAS or NAME@VERSION of the registry (NAME means its champion); a stage that made one in the latest
    run (STAGE@last where the registry has the name too); or the first 8 digits or more of an artifact's key. In this order.

    Raises:
        ConfigError: if nothing is called so. ArtifactError: for a key that no artifact has.
    """
    from ftpipe.registry.ledger import list_models

    path = Path(text).expanduser()
    if (path / FACTS).is_file():
        return Found(path.absolute().name, folder=path)
    name, _, which = text.partition("@")
    known = list_models(env)
    if name in known and which != LAST:
        return Found(f"{name}@{which or 'champion'}", version=(name, which or "champion"))
    store = Store(env.workspace)
    last = [a for artifacts in store.current().values() for a in artifacts if a.has("adapter")]
    if named := [a for a in last if text in (a.name, f"{a.name}@{LAST}")]:
        return Found(text, artifact=named[-1])
    if len(text) >= 8 and all(c in "0123456789abcdef" for c in text):
        return Found(text, artifact=store.get(text))
    if path.is_dir():
        raise ConfigError(f"the folder holds no {FACTS}", where=str(path), remedy="name a folder that ftpipe wrote")
    raise ConfigError(f"no adapter is called {text!r} in {env.workspace}", remedy=nearest(name, [*known, *(a.name for a in last)]))


def locate(workspace: Path, text: str, *, model: str | None = None, registry: str | None = None) -> Located:
    """Where the adapter that `text` names (see `find`) and its base are.

    A registered version is hashed again before it is used. `model` says where the base is, if it is not where the training found it.

    Raises:
        ConfigError: if nothing is called so. ArtifactError: for a version that was altered.
    """
    from ftpipe.registry.versions import load_version

    env = Environment(workspace=workspace.absolute(), base=Path.cwd(), pipeline="", registry_uri=registry)
    found = find(env, text)
    folder = load_version(env, *found.version) if found.version else found.artifact.file("adapter") if found.artifact else found.folder
    assert folder is not None
    base = model or str(read_manifest(folder)["base"].get("model", ""))
    if not base:
        raise ConfigError("the adapter does not say which base model it belongs to", where=str(folder), remedy="name it with --model")
    return Located(found.name, folder, base, env)


def trained(workspace: Path, text: str) -> Artifact:
    """The artifact of the training that made the adapter that `text` names (see `find`). Raises ConfigError if no training of this workspace made it itself."""
    from ftpipe.registry import show
    from ftpipe.registry.ledger import adapter_content

    store = Store(workspace)
    env = Environment(workspace=workspace.absolute(), base=workspace.absolute(), pipeline="")
    found = find(env, text)
    made = found.artifact
    if found.version:
        version = show(env, *found.version)
        candidates = (store.get(key) for key in version["stages"].values())
        made = next((a for a in candidates if a.has("seen.parquet") and adapter_content(a) == version["content"]), None)
    elif found.folder and (found.folder.parent / MANIFEST).exists():
        made = Artifact(found.folder.parent, store.get)
    if made is None:
        raise ConfigError(f"{found.name} was not trained in this workspace", where=str(workspace),
                          remedy="ask in the workspace that trained it; --workspace names it")
    if not made.has("seen.parquet"):
        others = sorted(e["name"] for e in made.manifest["inputs"].values())
        raise ConfigError(f"{found.name} was not trained but made by {made.kind} of {', '.join(others)}", where=str(made.path), remedy="ask about those")
    return made
