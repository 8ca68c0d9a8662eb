"""From records to rows: one part of a source after the other, or several at once in processes of their own, with the same result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.data.formats import FormatError, convert, plain
from ftpipe.data.rows import content_id, rows_schema
from ftpipe.data.sources.base import Part, Record
from ftpipe.errors import DataError
from ftpipe.processes import die_with

if TYPE_CHECKING:
    import pyarrow as pa

    from ftpipe.stages.base import Environment, StageContext

STAGED, ASIDE, COUNTED = "staged.parquet", "aside.parquet", "counted.json"
BATCH = 2000
"""Rows held in memory at a time."""
LARGE = 16 * 2**20
"""Bytes from which starting processes pays."""
SHOWN = 5
"""Reasons that an error names."""
UNSEEN_TOOLS = "have `tools` that are no definitions (objects with a name), kept as meta and not shown to the model"
MARKED_BAD = "have `label: false`, an answer called bad: objectives for judged answers (`kto`) learn from it, all others leave the row out"


class Reading:
    """Records become rows of a staging table, or of the quarantine, and are counted.

    Args:
        stage: the ingest stage whose settings decide.
        alone: what is written is all that there is, so if nothing of the beginning can be read the rest need not be.
    """

    def __init__(self, stage: Any, *, alone: bool = False):
        self.stage, self.seed, self.alone = stage, stage.seed or 0, alone
        self.good = 0
        self.sources: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.warnings: Counter[str] = Counter()
        self.examples: dict[str, tuple[str, int, str]] = {}
        self.named_groups: set[str] = set()

    def write(self, records: Iterator[Record], staged: Path, aside: Path, progress: Callable[[int], None]) -> None:
        """Read records into two Parquet files, `BATCH` of them in memory at a time; `progress` hears how many rows were good."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema, aside_schema = self.staging_schema(), self.aside_schema()
        with pq.ParquetWriter(staged, schema, compression="zstd") as rows, pq.ParquetWriter(aside, aside_schema, compression="zstd") as unread:
            good, bad = [], []
            for record in records:
                row = self.row(record)
                (bad if "reason" in row else good).append(row)
                if len(good) >= BATCH:
                    rows.write_table(pa.Table.from_pylist(good, schema))
                    good = []
                    progress(self.good)
                if len(bad) >= BATCH:
                    unread.write_table(pa.Table.from_pylist(bad, aside_schema))
                    bad = []
                    if self.alone and not self.good:
                        break  # not one of the first thousands could be read: no need to read the rest to say so
            rows.write_table(pa.Table.from_pylist(good, schema))
            unread.write_table(pa.Table.from_pylist(bad, aside_schema))

    @staticmethod
    def staging_schema():
        """A row without its id and side, and what decides them: `heldout`, and `rank`, the order in which held-out rows are kept."""
        import pyarrow as pa

        fields = [f for f in rows_schema() if f.name not in ("row_id", "split")]
        return pa.schema([*fields, pa.field("heldout", pa.bool_()), pa.field("rank", pa.float64())])

    @staticmethod
    def aside_schema():
        """`quarantine.parquet`: where the row was, why it was set aside, and what was there."""
        import pyarrow as pa

        return pa.schema([("row_id", pa.string()), ("source", pa.string()), ("line", pa.int64()), ("reason", pa.string()), ("detail", pa.string()),
                          ("raw", pa.string())])

    def row(self, record: Any) -> dict[str, Any]:
        """A record as a row of one schema or the other; the quarantined have a `reason`."""
        if record.error is not None:
            return self._aside(record, record.error, record.detail, record.text)
        try:
            row = convert(record.raw, self.stage.format, self.stage.fields)
            group = self._group(record)
        except FormatError as error:
            return self._aside(record, error.reason, error.detail, json.dumps(plain(record.raw), ensure_ascii=False))
        meta = row.pop("meta") | (record.meta or {})
        row |= {"content_id": content_id(row), "source": record.source, "line": record.line, "meta": json.dumps(meta, ensure_ascii=False, sort_keys=True)}
        row["group"] = group if group is not None else row["content_id"]
        self.good += 1
        self.warnings.update([UNSEEN_TOOLS] * bool(meta.get("tools")) + [MARKED_BAD] * (row["format"] == "unpaired" and row["chosen"] is None))
        self.formats[row["format"]] += 1
        self.sources[record.source] += 1
        return row | {"heldout": self._heldout(row), "rank": draw(self.seed, "rank", row["content_id"])}

    def _group(self, record: Any) -> str | None:
        field = self.stage.group_by
        if field is None:
            return record.group
        value = record.raw.get(field, (record.meta or {}).get(field))
        if value is None or value == "":
            raise FormatError(f"group field {field!r} is missing", f"the row has {', '.join(sorted(map(str, record.raw)))}")
        return plain(value) if isinstance(value, str) else json.dumps(plain(value), ensure_ascii=False, sort_keys=True)

    def _heldout(self, row: dict[str, Any]) -> bool:
        rule = self.stage.heldout
        if rule.groups:
            named = row["group"] in rule.groups
            if named:
                self.named_groups.add(row["group"])
            return named
        return draw(self.seed, "heldout", row["group"] if rule.by == "group" else row["content_id"]) < rule.share

    def _aside(self, record: Any, reason: str, detail: str, raw: str) -> dict[str, Any]:
        self.faults[reason] += 1
        self.sources[record.source] += 1
        if len(self.examples) < 50:
            self.examples.setdefault(reason, (record.source, record.line, detail))
        return {"row_id": _aside_id(record.source, record.line), "source": record.source, "line": record.line, "reason": reason, "detail": detail, "raw": raw}

    def judge(self) -> None:
        """Stop if there is nothing to work with, or too much was unreadable."""
        bad = sum(self.faults.values())
        if not self.good and not bad:
            raise DataError("the sources hold no rows", remedy="check the paths; a file of empty lines has none")
        if not self.good or bad / (self.good + bad) > self.stage.quarantine_limit:
            reasons = "\n".join(f"     {n} x {reason}; first {self.shown().get(reason, '')}" for reason, n in self.faults.most_common(SHOWN))
            share = "none of the rows read so far" if not self.good else f"only {self.good} of {self.good + bad} rows"
            raise DataError(f"{share} can be used (quarantine_limit is {self.stage.quarantine_limit:g}):\n{reasons}",
                            remedy="mend the data, set `format`, `fields` or the source's `encoding`, or raise `quarantine_limit`")

    def counted(self) -> dict[str, Any]:
        """What was counted, as JSON; `add` takes it."""
        return {"good": self.good, "sources": self.sources, "formats": self.formats, "faults": self.faults, "warnings": self.warnings,
                "examples": self.examples, "named_groups": sorted(self.named_groups)}

    def shown(self) -> dict[str, str]:
        """The first row of each fault: where it stands, and what is wrong with it."""
        return {reason: f"{source}:{line}{': ' + detail if detail else ''}" for reason, (source, line, detail) in self.examples.items()}

    def add(self, counted: dict[str, Any], before: int = 0) -> None:
        """Add what the reading of another part counted; parts are added in their order, so that the first example of a fault stays.

        before: lines of the file that come before the part's own.
        """
        self.good += counted["good"]
        for name in ("sources", "formats", "faults", "warnings"):
            getattr(self, name).update(counted[name])
        for reason, (source, line, detail) in counted["examples"].items():
            self.examples.setdefault(reason, (source, line + before, detail))
        self.named_groups |= set(counted["named_groups"])


@dataclass(frozen=True)
class Task:
    """One part to read: of which source of the stage, into which folder, and whether it is all that there is."""

    stage: Any
    source: int
    part: Part
    env: Environment
    folder: Path
    alone: bool = False

    def done(self) -> bool:
        return (self.folder / COUNTED).exists()

    def read(self, progress: Callable[[int], None] = lambda n: None) -> Path:
        """Read the part into its folder. The counts are written last: where they are, the part is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        reading, lines = Reading(self.stage, alone=self.alone), 0

        def records() -> Iterator[Record]:
            nonlocal lines
            lines = yield from self.stage.all_sources()[self.source].part(self.part, self.env)

        reading.write(records(), self.folder / STAGED, self.folder / ASIDE, progress)
        new = self.folder / f"{COUNTED}.new"
        new.write_text(json.dumps(reading.counted() | {"lines": lines}), encoding="utf-8")
        new.replace(self.folder / COUNTED)
        return self.folder


def read_all(stage: Any, ctx: StageContext, staged: Path, aside: Path) -> Reading:
    """Read every part of every source into one staging table and one quarantine, in the order of the sources.

    Several parts are read at once, on as many processors as there are. A part that was read before a kill is not read again.
    """
    parts = [(i, n, part) for i, source in enumerate(stage.all_sources()) for n, part in enumerate(source.parts(ctx.env))]
    tasks = [Task(stage, i, part, ctx.env, ctx.work / f"part-{i}-{n}", alone=len(parts) == 1) for i, n, part in parts]
    todo = [task for task in tasks if not task.done()]
    large = sum(task.part.size for task in todo) >= LARGE
    workers = min(len(todo), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) if large else 1
    if workers <= 1:
        for task in todo:
            task.read(lambda n: ctx.progress(n, None, "rows"))
    else:
        _side_by_side(todo, workers, ctx, len(tasks))
    whole, before, lines = Reading(stage), [], 0
    for task in tasks:
        counted = json.loads((task.folder / COUNTED).read_text(encoding="utf-8"))
        before.append(lines if task.part.start else 0)
        whole.add(counted, before[-1])
        lines = before[-1] + (counted["lines"] or 0)
    if len(tasks) == 1:  # nothing to join: its files move away, so it counts as read no more
        (tasks[0].folder / COUNTED).unlink()
    _join([task.folder / STAGED for task in tasks], before, staged)
    _join([task.folder / ASIDE for task in tasks], before, aside)
    return whole


def _side_by_side(todo: list[Task], workers: int, ctx: StageContext, of: int) -> None:
    import multiprocessing

    # A new interpreter for each: a fork of a process with threads (DuckDB, Arrow) may hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=die_with, initargs=(os.getpid(),)) as pool:
        running = [pool.submit(task.read) for task in todo]
        try:
            for n, future in enumerate(as_completed(running), start=of - len(todo) + 1):
                future.result()
                ctx.progress(n, of, "parts")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in (pool._processes or {}).values():
                process.terminate()
            raise


def _join(parts: list[Path], before: list[int], out: Path) -> None:
    """One Parquet file of several, batch by batch. `before`: lines that come before each part's own in its file."""
    import pyarrow.parquet as pq

    if len(parts) == 1:
        shutil.move(parts[0], out)
        return
    with pq.ParquetWriter(out, pq.read_schema(parts[0]), compression="zstd") as joined:
        for path, lines in zip(parts, before):
            with pq.ParquetFile(path) as part:
                for batch in part.iter_batches(batch_size=BATCH):
                    joined.write_batch(_numbered(batch, lines) if lines else batch)


def _numbered(batch: pa.RecordBatch, before: int) -> pa.RecordBatch:
    """Rows with the lines of their file in place of those of their part, and the ids that quarantined rows have from them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = {name: batch[name] for name in batch.schema.names}
    columns["line"] = pc.add(batch["line"], before)
    if "row_id" in columns:
        columns["row_id"] = pa.array([_aside_id(*at) for at in zip(batch["source"].to_pylist(), columns["line"].to_pylist())], pa.string())
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=batch.schema)


def _aside_id(source: str, line: int) -> str:
    """The id of a row in quarantine, which has no content to be known by."""
    return "q:" + hashlib.sha256(f"{source}:{line}".encode()).hexdigest()


def draw(seed: int, purpose: str, text: str) -> float:
    """A number in [0, 1) that depends on its arguments alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}:{text}".encode()).digest()[:6], "big") / 2**48
