"""What was made of what, with which settings and libraries, and how to ask further."""

from __future__ import annotations

from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.report.collect import RunData, base_model, params, seconds
from ftpipe.report.numbers import count, number, setting, short_key, size
from ftpipe.report.numbers import seconds as duration
from ftpipe.report.plots.dag import BOX, TALL, layout
from ftpipe.report.sections.training import _flat

LETTERS = 21
MANY = 5
"""Stages of one kind that are made of the same and read by the same share a box from this number on."""


def build(run: RunData) -> dict[str, Any] | None:
    if not run.artifacts:
        return None
    return {"stages": [_stage(a) for a in run.artifacts], "dag": _dag(run), "libraries": _libraries(run), "base": _base(run), "commands": _commands(run),
            "missing": run.missing}


def _stage(artifact: Artifact) -> dict[str, Any]:
    material, counts = artifact.manifest.get("material", {}), artifact.counts
    rows = f"{count(counts['rows_in'])} → {count(counts.get('rows_kept', 0))}" if "rows_in" in counts else ""
    return {"name": artifact.name, "kind": artifact.kind, "key": short_key(artifact.key), "full_key": artifact.key, "content": artifact.content,
            "inputs": [{"name": e["name"], "key": short_key(e["key"])} for e in artifact.manifest["inputs"].values()], "rows": rows,
            "seconds": duration(seconds(artifact)), "size": size(artifact.size()), "files": len(artifact.manifest["files"]),
            "settings": list(_flat(material.get("params") or {}).items()),
            "externals": [(k, _short(v)) for k, v in _flat(material.get("externals") or {}).items()],
            "libraries": ", ".join(f"{k} {v}" for k, v in sorted((material.get("libraries") or {}).items())), "code": len(material.get("code") or {}),
            "found": _found(artifact)}


def _found(artifact: Artifact) -> list[tuple[str, str]]:
    """The plain numbers of a curation step's own JSON."""
    found = []
    for name in sorted(artifact.manifest["files"]):
        if artifact.kind == "curate_step" and name.endswith(".json") and "/" not in name:
            stated = artifact.json(name)
            found += [(k.replace("_", " "), number(v) if isinstance(v, float) else setting(v)) for k, v in (stated.items() if isinstance(stated, dict) else ())
                      if isinstance(v, (int, float, str)) and len(str(v)) < 100]
    return found


def _short(value: str) -> str:
    return value if len(value) <= 80 else value[:77] + "…"


def _alike(run: RunData) -> dict[str, str]:
    """Names of stages by that of the box they are shown in: the steps of a chain share one, and so do many stages that stand in the same place."""
    box = {a.name: _group(a.name) for a in run.artifacts}
    readers: dict[str, set[str]] = {}
    for artifact in run.artifacts:
        for entry in artifact.manifest["inputs"].values():
            readers.setdefault(entry["name"], set()).add(box[artifact.name])
    places: dict[tuple, list[str]] = {}
    for a in run.artifacts:
        if list(box.values()).count(box[a.name]) == 1:
            places.setdefault((a.kind, frozenset(e["name"] for e in a.manifest["inputs"].values()), frozenset(readers.get(a.name, ()))), []).append(a.name)
    return box | {name: f"{len(names)} \N{MULTIPLICATION SIGN} {kind.replace('_', ' ')}"
                  for (kind, *_), names in places.items() if len(names) >= MANY for name in names}


def _dag(run: RunData) -> dict[str, Any]:
    """Boxes for stages; see `_alike`."""
    box = _alike(run)
    groups: dict[str, list[Artifact]] = {}
    for artifact in run.artifacts:
        groups.setdefault(box[artifact.name], []).append(artifact)
    read = {g: [box.get(e["name"], "") for a in members for e in a.manifest["inputs"].values()] for g, members in groups.items()}
    edges = {g: [i for i in dict.fromkeys(inputs) if i in groups and i != g] for g, inputs in read.items()}
    try:
        placed = layout(edges, frozenset((box.get(ref, ref), g) for g, members in groups.items() for a in members for ref in a.meta.get("rows_from", [])))
    except ValueError:  # steps of two chains that feed each other: a group would be above and below itself
        groups = {a.name: [a] for a in run.artifacts}
        placed = layout({a.name: [e["name"] for e in a.manifest["inputs"].values() if e["name"] in groups] for a in run.artifacts})
    boxes = []
    for name, members in groups.items():
        x, y = placed["boxes"][name]
        last = members[-1]
        chain = len(members) > 1 and name == _group(last.name)
        kind = f"{len(members)} steps" if chain else "" if len(members) > 1 or last.kind == name else last.kind.replace("_", " ").removeprefix("curate ")
        took = f"{count(last.counts['rows_kept'])} rows" if "rows_kept" in last.counts else duration(seconds(last))
        if len(members) > 1 and not chain:
            took = f"{duration(sum(seconds(a) or 0.0 for a in members))} together"
        role = "decision" if last in (run.verdict, run.registration) else "training" if last in run.trainings else "stage"
        shown = name if len(name) <= LETTERS else name[:LETTERS - 1] + "…"
        boxes.append({"x": x, "y": y, "name": shown, "under": " · ".join(filter(None, (kind, took))), "role": role})
    return {"width": placed["width"], "height": placed["height"], "lines": placed["lines"], "boxes": boxes, "box": BOX, "tall": TALL}


def _group(name: str) -> str:
    return name.split("/")[0]


def _libraries(run: RunData) -> list[tuple[str, str]]:
    found: dict[str, set[str]] = {}
    for artifact in run.artifacts:
        for name, version in (artifact.manifest.get("material", {}).get("libraries") or {}).items():
            found.setdefault(name, set()).add(version)
    return [(name, " and ".join(sorted(versions))) for name, versions in sorted(found.items(), key=lambda item: (item[0] != "python", item[0]))]


def _base(run: RunData) -> list[tuple[str, str]]:
    order = {k: i for i, k in enumerate(("model", "revision", "weights", "config", "tokenizer", "chat_template"))}
    lines = [(k.replace("_", " "), v) for k, v in sorted(_flat(base_model(run)).items(), key=lambda item: order.get(item[0], len(order)))]
    if run.adapter and run.adapter.has("adapter/ftpipe_adapter.json"):
        described = run.adapter.json("adapter/ftpipe_adapter.json")
        names = {k for k, _ in lines}
        lines += [(k.replace("_", " "), setting(described[k])) for k in ("tokenizer", "chat_template", "dtype", "quantize")
                  if described.get(k) and k.replace("_", " ") not in names]
    return lines


def _commands(run: RunData) -> list[tuple[str, str]]:
    commands = [("ftpipe plan CONFIG", "what would run again, and which setting, input or code moved")]
    if run.trained_ids:
        commands.append((f"ftpipe why {min(run.trained_ids)[:12]}", "what every step decided about a row (this one was trained on)"))
    registration = run.summary["registration"]
    if registration and registration.get("registered"):
        commands.append((f"ftpipe trace {registration['name']}@{registration['version']}", "the rows that made this version, and how often each was seen"))
    elif run.adapter:
        commands.append((f"ftpipe trace {run.adapter.name}", "the rows that made the adapter, and how often each was seen"))
    if run.adapter:
        commands.append((f"ftpipe log {run.adapter.name}", "what training logged"))
        commands.append((f"ftpipe stage {run.adapter.name} CONFIG --force", "this stage alone, on the inputs it had"))
    if params(run.adapter):
        commands.append(("ftpipe run CONFIG", "everything that is not up to date; an unchanged pipeline runs nothing"))
    return commands
