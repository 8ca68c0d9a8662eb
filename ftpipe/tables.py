"""DuckDB, opened the same way everywhere: bounded memory, spilling to disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb


@contextmanager
def connect(spill: Path | None = None, *, memory: str | None = None, threads: int | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """An in-memory DuckDB connection; no database file is ever shared between processes.

    Args:
        spill: folder for what does not fit in memory; a temporary one by default.
        memory: DuckDB's memory limit, such as "4GB"; by default FTPIPE_DUCKDB_MEMORY, or half of the machine's memory.
        threads: worker threads; by default the processors this process may use.
    """
    import duckdb
    import psutil

    with tempfile.TemporaryDirectory(prefix="duckdb-", dir=spill) as folder:
        # preserve_insertion_order stays on: without it DuckDB 2.0 hands the batches of `execute(... order by ...).to_arrow_table()` over in the
        # order in which its threads finish.
        con = duckdb.connect(":memory:", config={
            "memory_limit": memory or os.environ.get("FTPIPE_DUCKDB_MEMORY") or f"{psutil.virtual_memory().total // 2**21}MB",
            "temp_directory": folder, "preserve_insertion_order": True, "threads": threads or len(os.sched_getaffinity(0)),
            "autoinstall_known_extensions": False, "autoload_known_extensions": False,
        })
        try:
            yield con
        finally:
            con.close()
