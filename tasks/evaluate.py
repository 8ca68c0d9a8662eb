"""What the UI shows of an evaluation: the paired comparisons."""

from __future__ import annotations

from typing import Any

from ftpipe.artifacts import Artifact
from tasks.publish import number, table


def show(key: str, artifact: Artifact) -> None:
    table(key, comparisons(artifact), "Paired comparisons on the same items; a positive difference means that the first system is better")


def comparisons(artifact: Artifact) -> list[dict[str, Any]]:
    """One row per comparison, with its confidence interval."""
    return [{
        "suite": c["suite"], "metric": c["metric"], "systems": f"{c['a']} against {c['b']}", "items": c["n"],
        c_mean("first"): number(c["mean_a"]), c_mean("second"): number(c["mean_b"]), "difference": number(c["difference"]),
        "interval": f"{number(c['low'])} to {number(c['high'])} ({c['confidence']:.0%})", "better": c["better"] or "undecided",
    } for c in artifact.json("comparisons.json")]


def c_mean(which: str) -> str:
    return f"mean of the {which}"
