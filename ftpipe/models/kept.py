"""Results of long work, kept as they come, so that nothing is done twice and a kill loses little."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 10.0
"""At most so much work is lost by a kill."""
log = logging.getLogger("ftpipe")


@dataclass
class Kept:
    """Values by content hash, in a folder of shards that are only added to; safe for several processes and against kills.

    A shard is named by the hash of its bytes; one that does not match its name is removed with a warning and its items are asked again.
    """

    folder: Path
    pending: list[tuple[str, Any]] = field(default_factory=list)
    flushed: float = field(default_factory=time.monotonic)

    def read(self) -> dict[str, Any]:
        """Every value that is known, by content."""
        known: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                continue
            if hashlib.sha256(data).hexdigest()[:32] != path.stem:
                log.warning("results kept in %s are damaged and are made again", path)
                path.unlink(missing_ok=True)
                continue
            for line in data.decode().split("\n")[:-1]:  # not splitlines: an answer may hold other separators of lines
                content, value = json.loads(line)
                known.setdefault(content, value)
        return known

    def add(self, content: str, value: Any) -> None:
        """Keep a value; it reaches the disk within `FLUSH_SECONDS` of work, or with `flush`."""
        self.pending.append((content, value))
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as a new shard."""
        self.flushed = time.monotonic()
        if not self.pending:
            return
        data = "".join(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n" for entry in self.pending).encode()
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{uuid.uuid4().hex}"
        with temporary.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(self.folder / f"{hashlib.sha256(data).hexdigest()[:32]}.jsonl")
        self.pending = []
