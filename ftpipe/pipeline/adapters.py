"""An adapter by whatever a user calls it: a registered version, a stage, a key, or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ftpipe.errors import ConfigError
from ftpipe.models.adapters import read_manifest
from ftpipe.pipeline.lineage import current
from ftpipe.pipeline.store import Store
from ftpipe.stages.base import Environment

FACTS = "ftpipe_adapter.json"


@dataclass(frozen=True)
class Located:
    """name: how to speak of it. folder: what `models.loading.load_adapted` takes. model: its base, as a pipeline names it. env: where both are found."""

    name: str
    folder: Path
    model: str
    env: Environment


def locate(workspace: Path, text: str, *, model: str | None = None, registry: str | None = None) -> Located:
    """The adapter that `text` names: NAME, NAME@ALIAS or NAME@VERSION of the registry (NAME means its champion), a folder, the name of a stage that made
    one in the latest run, or the first 8 digits or more of an artifact's key.

    A registered version is hashed again before it is used. `model` says where the base is, if it is not where the training found it.

    Raises:
        ConfigError: if nothing is called so. ArtifactError: for a version that was altered.
    """
    env = Environment(workspace=workspace.absolute(), base=Path.cwd(), pipeline="", registry_uri=registry)
    name, folder = _folder(env, text)
    base = model or str(read_manifest(folder)["base"].get("model", ""))
    if not base:
        raise ConfigError("the adapter does not say which base model it belongs to", where=str(folder), remedy="name it with --model")
    return Located(name, folder, base, env)


def _folder(env: Environment, text: str) -> tuple[str, Path]:
    from ftpipe.registry.ledger import list_models
    from ftpipe.registry.versions import load_version

    if (path := Path(text).expanduser()).is_dir():
        if not (path / FACTS).exists():
            raise ConfigError(f"the folder holds no {FACTS}", where=str(path), remedy="name a folder that ftpipe wrote")
        return path.name, path
    name, _, which = text.partition("@")
    known = list_models(env)
    if name in known:
        return f"{name}@{which or 'champion'}", load_version(env, name, which or "champion")
    store = Store(env.workspace)
    last = [a for artifacts in current(store).values() for a in artifacts if a.has("adapter")]
    if named := [a for a in last if a.name == text]:
        return text, named[-1].file("adapter")
    if len(text) >= 8 and all(c in "0123456789abcdef" for c in text):
        return text, store.get(text).file("adapter")
    from ftpipe.errors import nearest

    raise ConfigError(f"no adapter is called {text!r} in {env.workspace}", remedy=nearest(name, [*known, *(a.name for a in last)]))
