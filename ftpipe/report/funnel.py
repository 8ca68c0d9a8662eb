"""What became of the rows, step by step, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.errors import ArtifactError

DROPPED = "dropped: "


def funnel(artifacts: Iterable[Artifact]) -> list[dict[str, Any]]:
    """One entry for each artifact that decided on rows, in the order given.

    Returns:
        A list of `{"step": stage name, "kind": stage kind, "rows_in": n, "rows_kept": n, "dropped": {reason: n}}`; the reasons are sorted,
        the commonest first. Artifacts whose manifest counts no rows (training, evaluation, ...) are left out.
    """
    return [_entry(a) for a in artifacts if "rows_in" in a.counts]


def row_path(artifact: Artifact) -> list[Artifact]:
    """The artifacts that the rows of `artifact` came through, the oldest first, `artifact` last.

    It follows `meta["rows_from"]`; where rows come from several stages (a mixture), all of them are listed, each once. What is no longer in the store
    is left out.
    """
    order: dict[str, Artifact] = {}

    def visit(current: Artifact) -> None:
        if current.key in order:
            return
        inputs = present_inputs(current)
        for ref in current.meta.get("rows_from", []):
            if ref in inputs:
                visit(inputs[ref])
        order[current.key] = current

    visit(artifact)
    return list(order.values())


def present_inputs(artifact: Artifact) -> dict[str, Artifact]:
    """The inputs of an artifact that are still in the store, by the name the stage knew them under."""
    found = {}
    for ref, entry in artifact.manifest["inputs"].items():
        with suppress(ArtifactError):
            found[ref] = artifact.load(entry["key"])
    return found


def balanced(entry: dict[str, Any]) -> bool:
    """Whether every row of a funnel entry was kept or dropped for a reason."""
    return entry["rows_in"] == entry["rows_kept"] + sum(entry["dropped"].values())


def _entry(artifact: Artifact) -> dict[str, Any]:
    counts = artifact.counts
    dropped = {k.removeprefix(DROPPED): n for k, n in counts.items() if k.startswith(DROPPED)}
    return {"step": artifact.name, "kind": artifact.kind, "rows_in": counts["rows_in"], "rows_kept": counts.get("rows_kept", 0),
            "dropped": dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0])))}
