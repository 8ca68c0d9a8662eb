"""What the UI shows of the gate: the verdict, rule by rule."""

from __future__ import annotations

from ftpipe.artifacts import Artifact
from tasks.publish import markdown, number

MARKS = {True: "✅", False: "❌", None: "–"}
"""None stands for a rule that was skipped, such as one on a champion that is not there yet."""


def show(key: str, artifact: Artifact) -> None:
    markdown(key, verdict(artifact), "The gate's verdict")


def verdict(artifact: Artifact) -> str:
    found = artifact.json("verdict.json")
    lines = [f"## {'Passed' if found['passed'] else 'Refused'}: {found['candidate']}", "",
             "| | rule | required | value | interval | limit |", "|---|---|---|---:|---:|---:|"]
    for r in found["rules"]:
        interval = f"{number(r.get('low'))} to {number(r.get('high'))}" if r.get("low") is not None else "–"
        lines.append(f"| {MARKS[r['passed']]} | **{r['name']}**: {_cell(r['text'])} | {'yes' if r['required'] else 'no'} | {number(r.get('value'))} "
                     f"| {interval} | {number(r.get('limit'))} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
