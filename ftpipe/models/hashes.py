"""SHA-256 of large files, computed once per (path, size, modification time) and kept in the workspace's cache."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftpipe.canonical import file_digest

SETTLED = 2.0
"""Seconds a file must have been left alone before its hash is remembered: a second write within the clock's tick would go unseen."""


def cached_digest(path: Path, cache: Path) -> str:
    """SHA-256 (64 hex digits) of a file, taken from `cache/hashes` if size and modification time (ns) are those of the last time."""
    path = path.resolve()
    stat = path.stat()
    stamp = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return remembered(stamp, stat.st_mtime, lambda: file_digest(path), cache)


def remembered(stamp: dict[str, Any], changed: float | None, compute: Callable[[], str], cache: Path) -> str:
    """What `compute` says, or said when `stamp` was last the same. `stamp` holds the `path`, and what moves when the file is written; `changed` is when
    that was (seconds since 1970), None if it is not known: then nothing is remembered."""
    entry = cache / "hashes" / f"{hashlib.sha256(stamp['path'].encode()).hexdigest()[:32]}.json"
    try:
        known = json.loads(entry.read_text(encoding="utf-8"))
        if changed is not None and {k: known[k] for k in stamp} == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sha256 = compute()
    if changed is not None and time.time() - changed > SETTLED:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(stamp | {"sha256": sha256}), encoding="utf-8")
        os.replace(temporary, entry)
    return sha256
