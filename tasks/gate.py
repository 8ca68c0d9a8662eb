"""What the UI shows of the gate: the verdict, rule by rule."""

from __future__ import annotations

from ftpipe.artifacts import Artifact
from tasks.publish import markdown, number

WORDS = {True: "met", False: "**not met**", None: "skipped"}
"""None stands for a rule that was skipped, such as one on a champion that is not there yet."""


def show(key: str, artifact: Artifact) -> None:
    markdown(key, verdict(artifact), "The gate's verdict")


def verdict(artifact: Artifact) -> str:
    """Markdown: one line of numbers a rule, narrow enough for the UI's page, and what each rule says in words."""
    found = artifact.json("verdict.json")
    table = ["| rule | | required | value | interval | limit |", "|---|---|---|---:|---:|---:|"]
    said = []
    for r in found["rules"]:
        interval = f"{number(r.get('low'))} to {number(r.get('high'))}" if r.get("low") is not None else "–"
        table.append(f"| {_cell(r['name'])} | {WORDS[r['passed']]} | {'yes' if r['required'] else 'no'} | {number(r.get('value'))} | {interval} "
                     f"| {number(r.get('limit'))} |")
        said.append(f"* **{_cell(r['name'])}**: {_cell(r['text'])}")
    return "\n".join([f"## {'Passed' if found['passed'] else 'Refused'}: {found['candidate']}", "", *table, "", *said])


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
