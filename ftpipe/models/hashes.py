"""SHA-256 of large files, computed once per (path, size, modification time) and kept in the workspace's cache."""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from pathlib import Path

from ftpipe.canonical import file_digest

SETTLED = 2.0
"""Seconds a file must have been left alone before its hash is remembered: a second write within the clock's tick would go unseen."""


def cached_digest(path: Path, cache: Path) -> str:
    """SHA-256 (64 hex digits) of a file, taken from `cache/hashes` if size and modification time (ns) are those of the last time."""
    path = path.resolve()
    stat = path.stat()
    entry = cache / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    stamp = {"path": str(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    try:
        known = json.loads(entry.read_text(encoding="utf-8"))
        if {k: known[k] for k in stamp} == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    sha256 = file_digest(path)
    if time.time() - stat.st_mtime > SETTLED:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(stamp | {"sha256": sha256}), encoding="utf-8")
        os.replace(temporary, entry)
    return sha256
