"""What is registered, as files in the workspace: fast to read, and enough for a plan.

    <workspace>/registry/<name>/versions.json      every version: number, content, hash of its manifest, base, stage keys
    <workspace>/registry/<name>/history.jsonl      every move of an alias, one JSON object a line, only ever appended to
    <workspace>/registry/<name>/<content>/         the version itself, named by the hash of its adapter

MLflow gives out the version numbers and holds the aliases; the ledger mirrors them and holds what MLflow has no place for: which champion
each candidate had to beat, who moved an alias, and why. A move is written here as `moving` before MLflow is told and as `moved` after it,
so that a killed run leaves a trace that the next one can finish.

Both files are hashed: `versions.json` holds the SHA-256 of its versions, and each line of the history ends in the SHA-256 of all bytes of the file before
that hash, so that the last line speaks for the whole file (`problems`). The hashes find damage; they are no signature.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.canonical import digest
from ftpipe.errors import ArtifactError, ConfigError, nearest
from ftpipe.stages.base import Environment

VERSIONS = "versions.json"
HISTORY = "history.jsonl"
CHAMPION = "champion"
PREVIOUS, CHALLENGER = "previous", "challenger"
ADAPTER = "adapter/"
SEAL = re.compile(rb', "sha256": "([0-9a-f]{64})"}\Z')
"""How a line of the history ends."""


def root(env: Environment) -> Path:
    """Folder of every registered model of the workspace."""
    return env.workspace / "registry"


def folder(env: Environment, name: str) -> Path:
    """Folder of one registered model. Raises ConfigError for a name that cannot be a folder's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"{name!r} cannot be the name of a registered model", remedy="use letters, digits, '-', '_' and '.', starting with a letter or digit")
    return root(env) / name


def adapter_content(artifact: Artifact) -> str:
    """The identity of the adapter in an artifact: SHA-256 over the names and hashes of the files below `adapter/`, and of nothing else.

    What lies beside the adapter (curves, rows seen) does not count: two runs that come to the same adapter made the same one. Raises ArtifactError
    if the artifact holds no adapter.
    """
    return files_content({n[len(ADAPTER):]: e for n, e in artifact.manifest["files"].items() if n.startswith(ADAPTER)}, str(artifact.path))


def files_content(files: dict[str, dict[str, Any]], where: str) -> str:
    """The identity of an adapter from the entries of its files by name (`{"sha256": ...}`)."""
    if not files:
        raise ArtifactError("there is no adapter in it", where=where, remedy="name a stage that makes one (train, merge, compress)")
    return digest({name: entry["sha256"] for name, entry in files.items()})


def list_models(env: Environment) -> list[str]:
    """Names of the registered models."""
    names = sorted(path.parent.name for path in root(env).glob(f"*/{VERSIONS}"))
    return [name for name in names if read_versions(env, name)]


def list_versions(env: Environment, name: str) -> list[dict[str, Any]]:
    """Every version of a model, oldest first. Raises ConfigError for an unknown model.

    Each holds name, version (number), aliases (that point at it), registered (time, UTC), content (identity of the adapter), manifest (SHA-256 of
    `manifest.json`), base (identity of the base model, None if the files are not in this workspace) and stages (keys of the stages behind it).
    """
    versions = read_versions(env, name)
    if not versions:
        known = [p.parent.name for p in root(env).glob(f"*/{VERSIONS}")]
        raise ConfigError(f"no model {name!r} is registered here", where=str(root(env)), remedy=nearest(name, known))
    pointing = aliases(env, name)
    return [{"name": name} | v | {"aliases": sorted(a for a, number in pointing.items() if number == v["version"])} for v in versions]


def find(env: Environment, name: str, version: int | str) -> dict[str, Any]:
    """The entry of one version, by number (`3`, `"3"`, `"v3"`) or alias. Raises ConfigError with what there is."""
    versions = list_versions(env, name)
    text = str(version)
    number = aliases(env, name).get(text)
    if number is None and re.fullmatch(r"v?\d+", text):
        number = int(text.removeprefix("v"))
    for entry in versions:
        if entry["version"] == number:
            return entry
    known = [*(f"{v['version']}" for v in versions), *aliases(env, name)]
    raise ConfigError(f"{name} has no version or alias {text!r}", where=str(folder(env, name)), remedy=nearest(text, known))


def champion(env: Environment, name: str, alias: str = CHAMPION) -> dict[str, Any] | None:
    """The version that `alias` points at, or None: version, content, base, and `beat`, the content of the champion before it (None if there was none).

    `content` is None for a version that ftpipe did not make.
    """
    move = _last_move(env, name, alias)
    if move is None or move["to"] is None:
        return None
    entry = next((v for v in read_versions(env, name) if v["version"] == move["to"]), None)
    if entry is None:
        return {"name": name, "alias": alias, "version": move["to"], "content": None, "base": None, "beat": None}
    return {"name": name, "alias": alias, "version": entry["version"], "content": entry["content"], "base": entry["base"], "beat": move.get("beat")}


def champion_to_beat(env: Environment, name: str, candidate: str, alias: str = CHAMPION) -> dict[str, Any] | None:
    """The version a candidate has to beat, or None: the champion, and for the champion itself the version it beat when it became it.

    `candidate` is an `adapter_content`. So the champion's own pipeline, run again unchanged, asks the same question as the first time
    and not whether the champion is better than itself.
    """
    current = champion(env, name, alias)
    if current is None or current["content"] != candidate:
        return current
    if current["beat"] is None:
        return None
    before = next((v for v in read_versions(env, name) if v["content"] == current["beat"]), None)
    return None if before is None else {"name": name, "alias": alias, "version": before["version"], "content": before["content"], "base": before["base"],
                                        "beat": None}


def aliases(env: Environment, name: str) -> dict[str, int]:
    """Where each alias points, by the ledger."""
    found: dict[str, int] = {}
    for move in history(env, name):
        if move["state"] == "moved":
            found.pop(move["alias"], None)
            if move["to"] is not None:
                found[move["alias"]] = move["to"]
    return found


def history(env: Environment, name: str) -> list[dict[str, Any]]:
    """Every line of the history, oldest first. A line that a kill cut short, or that is damaged, is passed over; `problems` tells."""
    path = folder(env, name) / HISTORY
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    return list(_lines(lines))


def _lines(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.keys() >= {"state", "alias", "from", "to", "reason"}:
            yield entry


def _last_move(env: Environment, name: str, alias: str) -> dict[str, Any] | None:
    return next((m for m in reversed(history(env, name)) if m["alias"] == alias and m["state"] == "moved"), None)


def append(env: Environment, name: str, entry: dict[str, Any]) -> None:
    """Add one line to the history, durably, in one write. The caller holds `lock`."""
    path = folder(env, name) / HISTORY
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {k: v for k, v in entry.items() if k != "sha256"} | {"when": datetime.now(UTC).isoformat(timespec="milliseconds")}
    line = json.dumps(said, sort_keys=True, ensure_ascii=False).encode()[:-1]
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = path.read_bytes()
        start = b"\n" if before and not before.endswith(b"\n") else b""  # a kill cut the last line short
        seal = hashlib.sha256(before + start + line).hexdigest()
        os.write(descriptor, start + line + f', "sha256": "{seal}"}}\n'.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_versions(env: Environment, name: str) -> list[dict[str, Any]]:
    """The entries of `versions.json`, by number; none if there is no such model."""
    path = folder(env, name) / VERSIONS
    try:
        return json.loads(path.read_text(encoding="utf-8"))["versions"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"the ledger cannot be read: {error}", where=str(path),
                            remedy="delete it; the next registration writes it anew from MLflow") from error


def write_versions(env: Environment, name: str, versions: list[dict[str, Any]]) -> None:
    """Replace `versions.json` in one step. The caller holds `lock`."""
    path = folder(env, name) / VERSIONS
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(_written(name, sorted(versions, key=lambda v: v["version"])))
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def _written(name: str, versions: list[dict[str, Any]]) -> str:
    """The text of `versions.json`."""
    return json.dumps({"name": name, "sha256": digest([name, versions]), "versions": versions}, indent=1, sort_keys=True, ensure_ascii=False)


def problems(env: Environment, name: str) -> list[str]:
    """What is wrong with a model's ledger, as sentences: bytes of `versions.json` or of the history that are not what was written."""
    found = []
    path = folder(env, name) / VERSIONS
    try:
        text = path.read_text(encoding="utf-8")
        whole = text == _written(name, json.loads(text)["versions"])
    except FileNotFoundError:
        whole = True
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        found.append(f"{VERSIONS} is not what was written (its SHA-256 differs); delete it, and the next registration writes it anew from MLflow")
    data = (folder(env, name) / HISTORY).read_bytes() if (folder(env, name) / HISTORY).exists() else b""
    if data and not data.endswith(b"\n"):
        found.append(f"the last line of {HISTORY} is cut short, by a kill or by damage")
    elif data:
        seal = SEAL.search(data[:-1])
        if seal is None or hashlib.sha256(data[: seal.start()]).hexdigest() != seal[1].decode():
            found.append(f"{HISTORY} is not what was written (its SHA-256 differs)")
    return found


@contextmanager
def lock(env: Environment, name: str) -> Iterator[None]:
    """The only right to change a model's versions and aliases from this workspace, and see `server.turn`. A killed holder releases it."""
    from filelock import FileLock

    from ftpipe.registry.server import turn

    path = folder(env, name).parent / ".locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path), turn(env, name):
        yield
