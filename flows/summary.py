"""What a run came to, as small JSON and as a page for the UI."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftpipe.artifacts import Artifact
    from ftpipe.pipeline.runner import Run

REPORT = "report.html"


def summary(run: Run) -> dict[str, Any]:
    """`{run, pipeline, state, built, reused, verdict, version, report}`; what the selected stages did not make is None."""
    stages = run.record["stages"]
    verdict, version, report = (_last(run, what) for what in ("verdict", "version", "report"))
    registered = version.json("registration.json") if version and version.has("registration.json") else {}
    return {
        "run": run.id,
        "pipeline": run.pipeline.name,
        "state": run.record["state"],
        "built": [n for n, s in stages.items() if s["state"] == "built"],
        "reused": [n for n, s in stages.items() if s["state"] == "reused"],
        "verdict": {True: "passed", False: "refused"}[verdict.json("verdict.json")["passed"]] if verdict and verdict.has("verdict.json") else None,
        "version": f"{registered['name']}:{registered['version']}" if registered.get("registered") else None,
        "report": str(report.file(REPORT)) if report and report.has(REPORT) else None,
    }


def sentence(found: dict[str, Any]) -> str:
    """The message of the flow run's final state."""
    if not found["built"]:
        return f"nothing to do: all {len(found['reused'])} stages are up to date"
    text = f"{len(found['built'])} of {len(found['built']) + len(found['reused'])} stages ran"
    if found["verdict"]:
        text += f"; the gate {found['verdict']} the candidate" if found["verdict"] == "refused" else "; the candidate passed the gate"
    return text + (f"; registered as {found['version']}" if found["version"] else "")


def page(run: Run) -> str:
    """Markdown: a table of the stages, the funnel of rows, the outcome."""
    found = summary(run)
    lines = [f"**{sentence(found)}**", "", "| stage | kind | | why | seconds | rows |", "|---|---|---|---|---:|---:|"]
    for name, s in run.record["stages"].items():
        artifact = run.artifacts.get(name)
        why = str(s.get("reason") or s.get("error", "")).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {s.get('kind', '')} | {s['state']} | {why} | {s['seconds']:.1f} | {_rows(artifact)} |")
    if found["report"]:
        lines += ["", f"Report: `{found['report']}`"]
    lines += ["", f"`ftpipe status` on {run.record['host']} knows this run as `{run.id}`; its workspace is `{Path(run.pipeline.env.workspace)}`."]
    return "\n".join(lines)


def _rows(artifact: Artifact | None) -> str:
    counts = artifact.counts if artifact else {}
    return f"{counts['rows_kept']:,} of {counts['rows_in']:,}" if "rows_in" in counts else ""


def _last(run: Run, what: str) -> Artifact | None:
    """What the last stage made that produces a `verdict`, a `version` or a `report`."""
    return next((a for name, a in reversed(run.artifacts.items()) if run.pipeline.stages[name].produces == what), None)
