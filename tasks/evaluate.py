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
        "means": f"{number(c['mean_a'])} / {number(c['mean_b'])}",
        "difference": number(c["difference"]), f"interval ({c['confidence']:.0%})": f"{number(c['low'])} to {number(c['high'])}", "better": better(c),
    } for c in artifact.json("comparisons.json")]


def better(comparison: dict[str, Any]) -> str:
    """The system that is better by more than chance, if either is."""
    low, high = comparison["low"], comparison["high"]
    return comparison["a"] if low is not None and low > 0 else comparison["b"] if high is not None and high < 0 else "undecided"
