"""Writes what a curation step decided, and checks it on the way; called through `CurateStep.conclude` only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ftpipe.curate.made import write_made
from ftpipe.curate.step import CurateStep, StepContext, connection
from ftpipe.data.rows import RowSet, write_kept
from ftpipe.errors import DataError

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

DEFAULTS = {"kept": "true", "reason": "null::varchar", "score": "null::double", "keeper": "null::varchar", "times": "1::bigint", "key": "0"}


def write(step: CurateStep, rows: RowSet, ctx: StepContext, verdicts: pa.Table, made: Iterable[dict[str, Any]]) -> None:
    """See `CurateStep.conclude`."""
    import pyarrow as pa

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
        new = write_made(rows, ctx, made)
        con.register("made", new.append_column("number", pa.array(range(new.num_rows), pa.int64())))
        _check_places(step, con)
        con.execute("""create table decided as select t.row_id, coalesce(v.kept, true) and n.row_id is null as kept,
                       coalesce(v.reason, case when n.row_id is not null then coalesce(n.reason, 'replaced') end) as reason, v.score::double as score,
                       coalesce(v.keeper, n.row_id) as keeper, (t.times * coalesce(v.times, 1))::integer as times, v.key, t.position
                       from train t left join verdicts v using (row_id) left join made n on n.replaces = t.row_id""")
        silent = con.sql("select min(row_id) from decided where not kept and reason is null").fetchall()[0][0]
        if silent is not None:
            raise step.fault(f"dropped row {silent} without a reason")
        if not new.num_rows and not con.sql("select count(*) from decided where kept").fetchall()[0][0]:
            reason, n = con.sql("select reason, count(*) n from decided group by reason order by n desc, reason limit 1").fetchall()[0]
            raise DataError(f"no row is left: {n} of the rows were dropped for {reason!r}", where=ctx.name, remedy=f"loosen the settings of {step.name()}")
        kept = con.sql("""
            select row_id, split, times, (row_number() over (order by split = 'heldout', added, key nulls last, position) - 1)::bigint as position from (
                select row_id, 'train' as split, times, false as added, key, position from decided where kept
                union all by name
                select n.row_id, 'train' as split, coalesce(d.times, 1)::integer as times, d.row_id is null as added, d.key,
                       coalesce(d.position, n.number) as position from made n left join decided d on d.row_id = n.replaces
                union all by name
                select row_id, split, times, false as added, position from rows where split = 'heldout')
            order by position""").to_arrow_table()
        decisions = con.sql("select row_id, kept, reason, score, keeper from decided order by row_id").to_arrow_table()
        con.unregister("given")
    write_kept(ctx.out, kept)
    ctx.decide(decisions)
    ctx.log.info("%d of %d rows kept", ctx.counts["rows_kept"], ctx.counts["rows_in"])


def _check_places(step: CurateStep, con: duckdb.DuckDBPyConnection) -> None:
    """A new row takes the place of one train row, which nobody decided on otherwise."""
    wrong = con.sql("""select n.replaces from made n left join train t on t.row_id = n.replaces left join verdicts v on v.row_id = n.replaces
                       where n.replaces is not null group by n.replaces having count(*) > 1 or count(t.row_id) = 0 or bool_or(not v.kept)
                       order by n.replaces limit 1""").fetchall()
    if wrong:
        raise step.fault(f"replaced {wrong[0][0]}, which is no train row here, or was dropped or replaced already")


def _check(step: CurateStep, con: duckdb.DuckDBPyConnection) -> None:
    """The verdicts name train rows of this step, each once."""
    twice = con.sql("select row_id from given group by row_id having count(*) > 1 order by row_id limit 1").fetchall()
    if twice:
        raise step.fault(f"decided twice on row {twice[0][0]}")
    alien = con.sql("select row_id from given anti join train using (row_id) order by row_id limit 1").fetchall()
    if alien:
        raise step.fault(f"decided on {alien[0][0]}, which is not a train row here")
