"""The plan: for each stage RUN or REUSE, and why."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.canonical import digest
from ftpipe.pipeline.code import fingerprint, library
from ftpipe.pipeline.spec import Pipeline
from ftpipe.pipeline.store import Store, write_atomic

DEEP_LIMIT = 256 * 2**20
"""Artifacts up to this many bytes are hashed whenever they are looked at; larger ones only before a stage reads them."""


@dataclass(frozen=True)
class Planned:
    """What will happen to one stage. `key`, `material` and `artifact` are None where they are not known before an input is made."""

    name: str
    kind: str
    run: bool
    reason: str
    key: str | None = None
    artifact: Artifact | None = None
    altered: str | None = None
    material: dict[str, Any] | None = None


def material(pipeline: Pipeline, name: str, inputs: dict[str, Artifact]) -> dict[str, Any]:
    """Everything that decides a stage's result; its digest is the stage's key."""
    stage = pipeline.stages[name]
    methods = list(stage.methods())
    modules = [type(m).__module__ for m in (stage, *methods)] + [s for m in (stage, *methods) for s in type(m).support]
    libraries = sorted({lib for m in (stage, *methods) for lib in type(m).libraries})
    return {
        "kind": stage.name(),
        "params": stage.key_fields(),
        "inputs": {ref: a.content for ref, a in inputs.items()},
        "externals": stage.externals(pipeline.env) | stage.input_externals(pipeline.env, inputs),
        "code": fingerprint(modules),
        "libraries": {"python": ".".join(platform.python_version_tuple()[:2])} | {lib: library(lib) for lib in libraries},
    }


def plan_stage(pipeline: Pipeline, name: str, store: Store, inputs: dict[str, Artifact], *, force: bool = False) -> Planned:
    """Plan one stage whose inputs exist."""
    stage = pipeline.stages[name]
    made_of = material(pipeline, name, inputs)
    key = digest(made_of)
    found = store.find(stage.name(), key)
    if found is not None:
        problem = found.problem(deep=False) or (found.problem() if found.size() <= DEEP_LIMIT else None)
        if problem:
            return Planned(name, stage.name(), True, problem, key, altered=problem, material=made_of)
        gone = stage.still_true(found, pipeline.env) if stage.side_effects else None
        if gone:
            return Planned(name, stage.name(), True, gone, key, material=made_of)
        if force:
            return Planned(name, stage.name(), True, "forced", key, material=made_of)
        return Planned(name, stage.name(), False, "unchanged", key, found)
    last = None if force else _last(store, pipeline).get(name)
    only_inputs = last is not None and last.manifest["material"] | {"inputs": None} == made_of | {"inputs": None}
    if only_inputs and (enough := stage.good_enough(last, inputs, pipeline.env)):
        return Planned(name, stage.name(), False, enough, last.key, last)
    return Planned(name, stage.name(), True, _why(store, pipeline, name, made_of), key, material=made_of)


def plan(pipeline: Pipeline, store: Store, *, force: set[str] = frozenset()) -> list[Planned]:
    """Plan every stage, in order. Reads files, runs nothing, changes nothing."""
    done: dict[str, Planned] = {}
    for name, stage in pipeline.stages.items():
        waiting = [r for r in stage.refs() if done[r].artifact is None]
        if waiting:
            again = _last(store, pipeline).get(name) is not None
            done[name] = Planned(name, stage.name(), True, f"input {waiting[0]} is made again" if again else f"waits for {waiting[0]}")
            continue
        inputs = {r: done[r].artifact for r in stage.refs()}
        planned = plan_stage(pipeline, name, store, inputs, force=name in force)
        done[name] = planned
    return list(done.values())


def remember(store: Store, pipeline: Pipeline, artifact: Artifact) -> None:
    """Note which artifact a stage of this pipeline last had, so that the next plan can say what changed."""
    path = store.workspace / "last" / pipeline.name / f"{artifact.name.replace('/', '__')}.json"
    write_atomic(path, json.dumps({"key": artifact.key, "kind": artifact.kind}))


def _last(store: Store, pipeline: Pipeline) -> dict[str, Artifact]:
    found = {}
    for path in (store.workspace / "last" / pipeline.name).glob("*.json"):
        entry = json.loads(path.read_text(encoding="utf-8"))
        artifact = store.find(entry["kind"], entry["key"])
        if artifact and not artifact.problem(deep=False):
            found[path.stem.replace("__", "/")] = artifact
    return found


def _why(store: Store, pipeline: Pipeline, name: str, new: dict[str, Any]) -> str:
    previous = _last(store, pipeline).get(name)
    if previous is None:
        return "never built here"
    changes = list(differences(previous.manifest["material"], new))
    shown = "; ".join(changes[:3]) or "its artifact is gone"
    return f"{shown}; and {len(changes) - 3} more" if len(changes) > 3 else shown


def differences(old: dict[str, Any], new: dict[str, Any]):
    for path, before, after in _leaves(old.get("params", {}), new["params"], ""):
        yield f"{path} {_short(before)} → {_short(after)}"
    for ref in {**old.get("inputs", {}), **new["inputs"]}:
        if old.get("inputs", {}).get(ref) != new["inputs"].get(ref):
            yield f"input {ref} changed"
    for path, before, after in _leaves(old.get("externals", {}), new["externals"], ""):
        yield f"{path} changed" if before is not None and after is not None else f"{path} {'is new' if before is None else 'is gone'}"
    for module, _, _ in _leaves(old.get("code", {}), new["code"], None):
        yield f"code of {module} changed"
    for lib, before, after in _leaves(old.get("libraries", {}), new["libraries"], None):
        yield f"{lib} {before} → {after}"


def _leaves(old: Any, new: Any, prefix: str | None):
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            name = key if not prefix else f"{prefix}.{key}"
            yield from _leaves(old.get(key), new.get(key), name)
    elif old != new:
        yield prefix, old, new


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."
