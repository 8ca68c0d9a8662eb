"""Rows that no later run may use: a list in the workspace, which `ftpipe forget` writes and ingest obeys."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from ftpipe.errors import DataError

FILE = "forgotten.jsonl"


def forgotten(workspace: Path) -> list[str]:
    """Content ids on the list, sorted. A row is known by its content, so every copy of it is meant, whatever file it comes from.

    Raises DataError for a line that cannot be read: going on without it would use a row that must not be used.
    """
    path = workspace / FILE
    found = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines, start=1):
        try:
            found.add(str(json.loads(line)["content_id"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError("this line of the list of forgotten rows cannot be read", where=f"{path}:{number}",
                            remedy="mend it (each line is {\"content_id\": ...}) or name the row again with `ftpipe forget`") from error
    return sorted(found)


def forget(workspace: Path, contents: Iterable[str], reason: str = "") -> list[str]:
    """Put contents on the list; their text is not kept there. Returns those that were not on it yet."""
    path, locks = workspace / FILE, workspace / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "forgotten.lock"):
        known = set(forgotten(workspace))
        new = [c for c in dict.fromkeys(contents) if c not in known]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with path.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps({"content_id": c, "when": now} | ({"reason": reason} if reason else {}), ensure_ascii=False) + "\n" for c in new)
            out.flush()
            os.fsync(out.fileno())
    return new
