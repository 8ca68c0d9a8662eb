"""What the UI shows of a registration: the version, where it is, and which one it replaced."""

from __future__ import annotations

from ftpipe.artifacts import Artifact
from tasks.publish import markdown


def show(key: str, artifact: Artifact) -> None:
    markdown(key, registration(artifact), "The registered version")


def registration(artifact: Artifact) -> str:
    found = artifact.json("registration.json")
    if not found["registered"]:
        return f"## Nothing was registered\n\n{found.get('reason') or ''}"
    lines = [f"## {found['name']} version {found['version']}", "", f"* alias: `{found.get('alias')}`", f"* stored at: `{found.get('uri')}`"]
    if found.get("champion_before"):
        lines.append(f"* took the place of version {found['champion_before']}")
    return "\n".join([*lines, *([f"* {found['reason']}"] if found.get("reason") else [])])
