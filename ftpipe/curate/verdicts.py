"""Writes what a curation step decided, and checks it on the way; called through `CurateStep.conclude` only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ftpipe.curate.made import write_made
from ftpipe.curate.step import CurateStep, StepContext, connection
from ftpipe.data.rows import TRAIN, RowSet, write_kept
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

DEFAULTS = {"kept": "true", "reason": "null::varchar", "score": "null::double", "keeper": "null::varchar", "times": "1::bigint", "key": "0"}


def write(step: CurateStep, rows: RowSet, ctx: StepContext, verdicts: pa.Table, made: Iterable[dict[str, Any]]) -> None:
    """See `CurateStep.conclude`."""
    unknown = set(verdicts.column_names) - {"row_id", *DEFAULTS}
    if unknown or "row_id" not in verdicts.column_names:
        raise step.fault(f"gave verdicts with the columns {verdicts.column_names}; row_id and {list(DEFAULTS)} have a meaning")
    with connection(rows, ctx) as con:
        con.execute("create table train as select row_id, times, position from rows where split = 'train'")
        if not con.sql("select count(*) from train").fetchall()[0][0]:
            raise DataError("there are no train rows", where=ctx.name, remedy="see the decisions of the stages before (`ftpipe status`)")
        con.register("given", verdicts)
        _check(step, con)
        columns = ", ".join(f"coalesce({c if c in verdicts.column_names else d}, {d}) as {c}" for c, d in DEFAULTS.items() if c != "key")
        key = "key" if "key" in verdicts.column_names else "0 as key"
        con.execute(f"create table verdicts as select row_id, times > 0 and kept as kept, reason, score, keeper, times, key "
                    f"from (select row_id, {columns}, {key} from given)")
        con.execute("""create table decided as select t.row_id, coalesce(v.kept, true) as kept, v.reason, v.score::double as score, v.keeper,
                       (t.times * coalesce(v.times, 1))::integer as times, v.key, t.position from train t left join verdicts v using (row_id)""")
        silent = con.sql("select min(row_id) from decided where not kept and reason is null").fetchall()[0][0]
        if silent is not None:
            raise step.fault(f"dropped row {silent} without a reason")
        most = con.sql("select reason, count(*) n from decided where not kept group by reason order by n desc, reason limit 1").fetchall()
        kept = con.sql("""
            select row_id, split, times, (row_number() over (order by split = 'heldout', key nulls last, position) - 1)::bigint as position from (
                select row_id, 'train' as split, times, key, position from decided where kept
                union all by name
                select row_id, split, times, position from rows where split = 'heldout')
            order by position""").to_arrow_table()
        decisions = con.sql("select row_id, kept, reason, score, keeper from decided order by row_id").to_arrow_table()
        con.unregister("given")
    kept = write_made(rows, ctx, made, kept)
    if TRAIN not in kept["split"].unique().to_pylist():
        (reason, n), = most
        raise DataError(f"no row is left: {n} of the rows were dropped for {reason!r}", where=ctx.name, remedy=f"loosen the settings of {step.name()}")
    write_kept(ctx.out, kept)
    ctx.decide(decisions)
    ctx.log.info("%d of %d rows kept", ctx.counts["rows_kept"], ctx.counts["rows_in"])


def _check(step: CurateStep, con: duckdb.DuckDBPyConnection) -> None:
    """The verdicts name train rows of this step, each once."""
    twice = con.sql("select row_id from given group by row_id having count(*) > 1 order by row_id limit 1").fetchall()
    if twice:
        raise step.fault(f"decided twice on row {twice[0][0]}")
    alien = con.sql("select row_id from given anti join train using (row_id) order by row_id limit 1").fetchall()
    if alien:
        raise step.fault(f"decided on {alien[0][0]}, which is not a train row here")
