"""Where the candidate gained and where it lost, group by group."""

from __future__ import annotations

from pydantic import Field

from ftpipe.evaluate.diagnostics.base import Diagnostic, Evidence, Finding
from ftpipe.tables import connect


class Slices(Diagnostic):
    """The weighted mean of each slice under the base and the adapter, and the difference turned so that more is better.

    A mean gain may hide groups that lost. The table has suite, metric, slice, n, base, adapter and difference, the worst first; the numbers
    are the shares of slices (of `min_items` items or more) that got worse. No interval is given: with a few items a slice, most are noise.
    """

    min_items: int = Field(default=2, ge=1, description="Smallest slice that is listed.")

    def diagnose(self, evidence: Evidence) -> Finding:
        with connect() as con:
            con.register("items", evidence.items)
            table = con.sql("""
                select a.suite, a.metric, a.slice, count(*) as n, sum(b.score * b.weight) / sum(b.weight) as base,
                       sum(a.score * a.weight) / sum(a.weight) as adapter,
                       case when bool_and(a.higher_is_better) then adapter - base else base - adapter end as difference
                from items a join items b using (suite, metric, item_id)
                where a.system = 'adapter' and b.system = 'base' and a.weight > 0
                group by a.suite, a.metric, a.slice having count(*) >= $n order by a.suite, a.metric, difference, a.slice""",
                params={"n": self.min_items}).to_arrow_table()
        worse: dict[str, list[bool]] = {}
        for row in table.to_pylist():
            worse.setdefault(f"{row['suite']} {row['metric']}: share of slices that got worse", []).append(row["difference"] < 0)
        return Finding(numbers={name: sum(each) / len(each) for name, each in worse.items()}, table=table)
