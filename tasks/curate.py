"""What the UI shows of a curation step, or of any other that keeps some rows: the funnel by reason."""

from __future__ import annotations

from ftpipe.artifacts import Artifact
from tasks.publish import funnel, table


def show(key: str, artifact: Artifact) -> None:
    table(key, funnel(artifact), f"Rows that {artifact.name} kept and dropped, by reason")
