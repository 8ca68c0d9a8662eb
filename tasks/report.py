"""What the UI shows of the report: where the page is."""

from __future__ import annotations

import socket

from ftpipe.artifacts import Artifact
from tasks.publish import link, markdown


def show(key: str, artifact: Artifact) -> None:
    path = artifact.file("report.html")
    link(key, path.as_uri(), path.name, "The report of this run")
    # Browsers do not follow a link from a web page to a file, so the path is given to copy as well.
    markdown(f"{key}-path", f"The report is on **{socket.gethostname()}** at\n\n```\n{path}\n```", "Where the report is")
