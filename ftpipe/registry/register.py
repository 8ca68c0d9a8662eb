"""Creating versions and moving aliases: each step can be killed and done again, and ends in one version and one move."""

from __future__ import annotations

import getpass
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ConfigError
from ftpipe.registry import ledger, server, versions
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    from mlflow import MlflowClient

OUTSIDE = "found moved in MLflow"
UNCHECKED = object()
log = logging.getLogger("ftpipe.registry")


class AliasMoved(ConfigError):
    """An alias does not point where the caller thought it did: somebody moved it in between."""


@dataclass(frozen=True)
class Registration:
    """What registering came to. moved: whether the alias points at the version now; if not, `reason` says why. before: where it pointed."""

    version: int
    created: bool
    moved: bool
    before: int | None
    reason: str


def register(env: Environment, name: str, built: versions.Built, *, base: dict[str, Any], stages: dict[str, str], alias: str | None = ledger.CHAMPION,
             beat: str | None = None, against: str | None = None, run: str = "", description: str = "") -> Registration:
    """Make a built folder a version and point `alias` at it.

    The same adapter is never registered twice: its version is found again. The alias moves only if the alias `against` points at the version whose content
    is `beat` (None: at nothing), or `alias` at this adapter already; else the version is created and the result says why the alias stayed.

    Args:
        against: alias of the version that the candidate was compared with, if that is not `alias` itself (a challenger is compared with the champion).
        beat: content of the champion that the candidate was compared with and beat.
        stages: keys of the stages that led here, by name; they become tags.
        run: what registered it, for the history.
    """
    mlflow = server.client(env)
    with ledger.lock(env, name):
        folder, manifest_sha = versions.place(env, name, built)
        reconcile(env, name, mlflow)
        known = {v["content"]: v for v in ledger.read_versions(env, name)}
        created = built.content not in known
        if created:
            tags = {server.CONTENT: built.content, server.MANIFEST_SHA: manifest_sha, **{f"ftpipe.stage.{k}": v for k, v in stages.items()}}
            _create(env, mlflow, name, folder, tags, description, run)
            reconcile(env, name, mlflow)
            known = {v["content"]: v for v in ledger.read_versions(env, name)}
        version = known[built.content]["version"]
        if known[built.content]["manifest"] != manifest_sha:
            # the folder was gone or damaged and has been built anew: what lies there now is what counts
            server.call(mlflow.set_model_version_tag, name, str(version), server.MANIFEST_SHA, manifest_sha)
            reconcile(env, name, mlflow)
        if alias is None:
            return Registration(version, created, False, None, "no alias was asked for")
        return _promote(env, mlflow, name, alias, against or alias, version, beat, created, run)


def _create(env: Environment, mlflow: MlflowClient, name: str, folder: Any, tags: dict[str, str], description: str, run: str) -> None:
    server.ensure_model(mlflow, name, {"ftpipe.pipeline": env.pipeline})
    source, run_id = server.source_of(mlflow, env, name, folder, run or "register")

    def create() -> None:  # looked for again on every try: a try whose answer was lost may have worked
        if not any(v.tags.get(server.CONTENT) == tags[server.CONTENT] for v in server.model_versions(mlflow, name)):
            mlflow.create_model_version(name, source, run_id=run_id, tags=tags, description=description, await_creation_for=0)

    server.call(create)


def _promote(env: Environment, mlflow: MlflowClient, name: str, alias: str, against: str, version: int, beat: str | None, created: bool,
             run: str) -> Registration:
    before = ledger.aliases(env, name).get(alias)
    if before == version:
        return Registration(version, created, True, _previous(env, name, alias), f"it is the {alias} already")
    holder = ledger.champion(env, name, against)
    if holder and holder["version"] == version:
        return Registration(version, created, False, before, f"it is the {against} already")
    if (holder["content"] if holder else None) != beat:
        compared = next((v["version"] for v in ledger.read_versions(env, name) if v["content"] == beat), "another") if beat else None
        found = _words(holder["version"] if holder else None)
        reason = f"{against} points at {found} by now, the candidate was compared with {_words(compared)}; run the pipeline again"
        return Registration(version, created, False, before, reason)
    _move(env, mlflow, name, alias, before, version, run=run, beat=beat)
    return Registration(version, created, True, before, "it passed the gate")


def _previous(env: Environment, name: str, alias: str) -> int | None:
    moves = [m for m in ledger.history(env, name) if m["alias"] == alias and m["state"] == "moved"]
    return moves[-1]["from"] if moves else None


def _move(env: Environment, mlflow: MlflowClient, name: str, alias: str, before: int | None, to: int | None, **said: Any) -> None:
    """Move an alias, in the ledger and in MLflow. The caller holds the lock and has compared.

    With the champion two others move, before it, so that a kill in between leaves nothing that the next try does not find: `previous` to where the champion
    points now, and `challenger`, if the challenger becomes champion, to nothing.
    """
    if alias == ledger.CHAMPION:
        pointing = ledger.aliases(env, name)
        if before is not None and pointing.get(ledger.PREVIOUS) != before:
            _move(env, mlflow, name, ledger.PREVIOUS, pointing.get(ledger.PREVIOUS), before, reason="the champion moves on", run=said.get("run", ""))
        if to is not None and pointing.get(ledger.CHALLENGER) == to:
            _move(env, mlflow, name, ledger.CHALLENGER, to, None, reason="it becomes the champion", run=said.get("run", ""))
    entry = {"alias": alias, "from": before, "to": to, "who": _who(), "run": "", "forced": False, "reason": "", "beat": None} | said
    ledger.append(env, name, entry | {"state": "moving"})
    if to is None:
        server.call(mlflow.delete_registered_model_alias, name, alias)
    else:
        server.call(mlflow.set_registered_model_alias, name, alias, str(to))
    ledger.append(env, name, entry | {"state": "moved"})


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


def move_alias(env: Environment, name: str, alias: str, version: int | str | None, *, expected: int | object | None = UNCHECKED, forced: bool = False,
               reason: str = "", run: str = "") -> dict[str, Any]:
    """Point `alias` at `version` (None: remove it). Returns {alias, from, to}.

    Args:
        expected: version the alias must point at now (None: at nothing); AliasMoved otherwise. Left out, it is not compared.
        forced, reason: recorded in the history as given.
    Raises ConfigError for an unknown model or version, ArtifactError for a version whose files were altered.
    """
    mlflow = server.client(env)
    with ledger.lock(env, name):
        reconcile(env, name, mlflow)
        to = None if version is None else ledger.find(env, name, version)["version"]
        current = ledger.aliases(env, name).get(alias)
        if expected is not UNCHECKED and current != expected:
            raise AliasMoved(f"{name}@{alias} points at {_words(current)}, not at {_words(expected)}", remedy="look at its history, then decide again")
        if to is not None:
            versions.load_version(env, name, to)
        if to != current:
            _move(env, mlflow, name, alias, current, to, forced=forced, reason=reason, run=run, beat=_beaten(env, name, alias, to))
        return {"alias": alias, "from": current, "to": to}


def _words(version: object) -> str:
    return "nothing" if version is None else f"version {version}"


def _beaten(env: Environment, name: str, alias: str, to: int | None) -> str | None:
    """The champion a version beat when it first got the alias; moved by hand, it is still that one it was measured against."""
    return next((m.get("beat") for m in ledger.history(env, name) if m["alias"] == alias and m["to"] == to and m["state"] == "moved"), None)


def rollback(env: Environment, name: str, alias: str = ledger.CHAMPION, *, reason: str = "", run: str = "") -> dict[str, Any]:
    """Point an alias back at the version it pointed at before its last move. The move back is a move of its own in the history."""
    current = ledger.aliases(env, name).get(alias)
    trail: list[int | None] = []  # where the alias pointed, with moves back taken off again
    for move in ledger.history(env, name):
        if move["alias"] == alias and move["state"] == "moved":
            if len(trail) > 1 and move["reason"].startswith("rollback") and trail[-2] == move["to"]:
                trail.pop()
            else:
                trail.append(move["to"])
    if len(trail) < 2 or trail[-2] is None:
        raise ConfigError(f"{name}@{alias} has no earlier version to go back to", where=str(ledger.folder(env, name) / ledger.HISTORY))
    return move_alias(env, name, alias, trail[-2], expected=current, reason=f"rollback{': ' + reason if reason else ''}", run=run)


def reconcile(env: Environment, name: str, mlflow: MlflowClient) -> list[str]:
    """Bring the ledger in line with MLflow, which others may have changed, and say what was found. The caller holds the lock.

    Versions are read from MLflow (those with ftpipe's tags), aliases moved outside get a line in the history, and a move that a kill
    interrupted is closed as `moved` or `abandoned`, as MLflow shows.
    """
    found: list[str] = []
    there = server.model_aliases(mlflow, name)
    if there is None and not ledger.read_versions(env, name):
        return found
    old = {v["version"]: v for v in ledger.read_versions(env, name)}
    new = {}
    for v in server.model_versions(mlflow, name) if there is not None else []:
        if server.CONTENT in v.tags:
            number, content = int(v.version), v.tags[server.CONTENT]
            kept = old.get(number, {})
            base = kept["base"] if kept.get("content") == content else _base(env, name, content)
            stages = {k.removeprefix("ftpipe.stage."): t for k, t in sorted(v.tags.items()) if k.startswith("ftpipe.stage.")}
            new[number] = {"version": number, "content": content, "manifest": v.tags.get(server.MANIFEST_SHA), "base": base,
                           "registered": _time(v.creation_timestamp), "stages": stages}
    for number in sorted(set(old) - set(new)):
        found.append(f"version {number} is no longer in MLflow")
    if new != old:
        ledger.write_versions(env, name, list(new.values()))
    for pending in _pending(env, name):
        done = (there or {}).get(pending["alias"]) == pending["to"]
        ledger.append(env, name, pending | {"state": "moved" if done else "abandoned"})
    for alias in sorted({*(there or {}), *ledger.aliases(env, name)}):
        known, real = ledger.aliases(env, name).get(alias), (there or {}).get(alias)
        if known != real:
            found.append(f"{alias} points at {_words(real)} in MLflow, the ledger had {_words(known)}")
            ledger.append(env, name, {"alias": alias, "from": known, "to": real, "who": "outside ftpipe", "run": "", "forced": False, "reason": OUTSIDE,
                                      "beat": _beaten(env, name, alias, real), "state": "moved"})
    for sentence in found:
        log.warning("registry %s: %s", name, sentence)
    return found


def _pending(env: Environment, name: str) -> list[dict[str, Any]]:
    """Moves that were begun and neither finished nor abandoned."""
    begun: dict[str, dict[str, Any]] = {}
    for move in ledger.history(env, name):
        if move["state"] == "moving":
            begun[move["alias"]] = move
        else:
            begun.pop(move["alias"], None)
    return list(begun.values())


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _base(env: Environment, name: str, content: str) -> dict[str, Any] | None:
    import json

    try:
        return json.loads((ledger.folder(env, name) / content / versions.MANIFEST).read_text(encoding="utf-8"))["base"]
    except (OSError, ValueError, KeyError):
        return None


def show(env: Environment, name: str, version: int | str) -> dict[str, Any]:
    """Everything known of a version: its ledger entry, its manifest (None if its files are not here), and the moves of aliases that touched it."""
    import json

    entry = ledger.find(env, name, version)
    path = ledger.folder(env, name) / entry["content"] / versions.MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        manifest = None
    moves = [m for m in ledger.history(env, name) if entry["version"] in (m["from"], m["to"]) and m["state"] == "moved"]
    return entry | {"folder": str(path.parent), "manifest": manifest, "manifest_sha256": entry["manifest"], "history": moves}
