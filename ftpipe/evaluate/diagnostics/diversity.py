"""Whether training narrowed what a system says."""

from __future__ import annotations

from typing import Any, ClassVar

from ftpipe.evaluate.diagnostics._shared import svg, table
from ftpipe.evaluate.diagnostics.base import Diagnostic, Evidence, Finding
from ftpipe.evaluate.suites.diversity import APART, DISTINCT, UNIQUE
from ftpipe.tables import connect


class Diversity(Diagnostic):
    """Diversity of each system's answers beside the base's, from suites of the method `diversity`.

    The table has suite, metric, system, number of questions, mean over questions, and the mean of the base on the same questions; the numbers are the means.
    Intervals of the differences are among the evaluation's comparisons.
    """

    libraries: ClassVar[tuple[str, ...]] = ("matplotlib",)

    def diagnose(self, evidence: Evidence) -> Finding:
        with connect() as con:
            con.register("items", evidence.items)
            rows = con.sql("""
                select s.suite, s.metric, s.system, count(*) as n, avg(s.score) as mean, avg(b.score) as base
                from items s join items b using (suite, metric, item_id) where b.system = 'base' and s.metric in $metrics
                group by s.suite, s.metric, s.system order by s.suite, s.metric, s.system <> 'base', s.system""",
                params={"metrics": [UNIQUE, DISTINCT, APART]}).fetchall()
        numbers = {f"{system}: {metric.replace('_', ' ')} on {suite}": mean for suite, metric, system, _, mean, _ in rows}
        columns = {"suite": "string", "metric": "string", "system": "string", "n": "int64", "mean": "double", "base": "double"}
        return Finding(numbers, table(columns, rows), svg(lambda axes: _draw(axes, rows)) if rows else None)


def _draw(axes: Any, rows: list[tuple]) -> None:
    places = list(dict.fromkeys((suite, metric) for suite, metric, *_ in rows))
    for system in dict.fromkeys(r[2] for r in rows):
        mine = [r for r in rows if r[2] == system]
        axes.scatter([places.index(r[:2]) for r in mine], [r[4] for r in mine], label=system)
    axes.set_xticks(range(len(places)), [f"{metric.replace('_', ' ')}\n{suite}" for suite, metric in places], fontsize="small")
    axes.set(ylabel="diversity of the answers", ylim=(-0.03, 1.03))
    axes.legend(frameon=False)
