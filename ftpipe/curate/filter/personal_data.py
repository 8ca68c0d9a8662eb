"""Personal data and secrets: reported, and removed if asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ftpipe.curate.filter._patterns import KINDS, matches, redact
from ftpipe.curate.filter.base import Filter
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet

if TYPE_CHECKING:
    import pyarrow as pa

KindName = Literal[tuple(KINDS)]  # type: ignore[valid-type]
COLUMNS = ["row_id", "format", "messages", "chosen", "rejected", "text"]
READ, SHOWN = 2000, 5


class PersonalData(Filter):
    """Looks for e-mail addresses, telephone, card, account and social security numbers, IP addresses, keys and tokens, by their form and check sums.

    What has no form of its own (names, street addresses) is not found, so a clean result is no proof. Addresses that belong to nobody are left alone: those of
    example.com, private and documentation networks. The report counts what was found and names rows; it never shows what was found.
    """

    libraries = ()

    action: Literal["report", "drop", "redact"] = Field(default="report", description="`report` keeps all rows; `drop` drops those with a match; `redact` puts "
                                                        "new rows in their place, with [EMAIL] and the like where the match was.")
    kinds: list[KindName] = Field(default=list(KINDS), min_length=1, description="What to look for.")

    def judge(self, rows: RowSet, ctx: StepContext) -> pa.Table:
        import pyarrow as pa

        ids, counts, reasons = [], [], []
        total: Counter[str] = Counter()
        with_kind: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        table = rows.table(columns=COLUMNS).sort_by("row_id")
        for row_ids, founds in ctx.env.engine.map(partial(_look, kinds=tuple(self.kinds)), table.to_batches(max_chunksize=READ), alone=True):
            for row_id, found in zip(row_ids, founds):
                total += found
                with_kind.update(found.keys())
                for kind in found:
                    examples[kind] = [*examples.get(kind, []), row_id][:SHOWN]
                ids.append(row_id)
                counts.append(sum(found.values()))
                reasons.append(f"personal data: {next(k for k in KINDS if k in found)}" if found else None)
            ctx.progress(len(ids), table.num_rows, "rows")
        removing = self.action != "report"
        kept = [not (removing and n) for n in counts]
        ctx.annotate(pa.table({"row_id": pa.array(ids, pa.string()), "personal_data": pa.array(counts, pa.int32())}))
        ctx.report({"n": len(ids), "rows_with": sum(n > 0 for n in counts), "action": self.action, "rows_by_kind": dict(with_kind), "found": dict(total),
                    "rows": examples})
        if with_kind:
            ctx.log.warning("personal data in %d of %d rows: %s", sum(n > 0 for n in counts), len(ids),
                            ", ".join(f"{k} in {n}" for k, n in with_kind.most_common()))
        return pa.table({"row_id": pa.array(ids, pa.string()), "kept": pa.array(kept, pa.bool_()), "score": pa.array(counts, pa.float64()),
                         "reason": pa.array([None if k else r for k, r in zip(kept, reasons)], pa.string())})

    def replacements(self, rows: RowSet, ctx: StepContext) -> Iterator[dict[str, Any]]:
        if self.action != "redact":
            return
        batches = rows.table(columns=COLUMNS).sort_by("row_id").to_batches(max_chunksize=READ)
        for made in ctx.env.engine.map(partial(_cleaned, kinds=tuple(self.kinds)), batches, alone=True):
            yield from made


def _look(batch: pa.RecordBatch, kinds: tuple[str, ...]) -> tuple[list[str], list[Counter[str]]]:
    """Row ids, and how much of each kind was found in each row."""
    rows = batch.to_pylist()
    return [row["row_id"] for row in rows], [Counter(m.kind for text in _texts(row) for m in matches(text, kinds)) for row in rows]


def _cleaned(batch: pa.RecordBatch, kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    """New rows for those with a match."""
    def clean(turns: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        return turns and [turn | {"content": redact(turn["content"] or "", kinds)} for turn in turns]

    return [{"format": row["format"], **{c: clean(row[c]) for c in ("messages", "chosen", "rejected")},
             "text": row["text"] and redact(row["text"], kinds), "parents": [row["row_id"]], "meta": {"redacted": True}}
            for row in batch.to_pylist() if any(matches(text, kinds) for text in _texts(row))]


def _texts(row: dict[str, Any]) -> list[str]:
    return [row["text"] or "", *(turn["content"] or "" for c in ("messages", "chosen", "rejected") for turn in row[c] or ())]
