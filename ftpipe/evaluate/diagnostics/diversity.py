"""Whether training narrowed what a system says."""

from __future__ import annotations

from typing import ClassVar

from ftpipe.evaluate.diagnostics._shared import each, table
from ftpipe.evaluate.diagnostics.base import Diagnostic, Dots, Evidence, Finding, Measure, Number
from ftpipe.evaluate.suites.diversity import APART, DISTINCT, UNIQUE
from ftpipe.tables import connect


class Diversity(Diagnostic):
    """Diversity of each system's answers beside the base's, from suites of the method `diversity`.

    The table has suite, metric, system, number of questions, mean over questions, and the mean of the base on the same questions; the numbers are the means.
    Intervals of the differences are among the evaluation's comparisons.
    """

    question: ClassVar[str] = "Did training narrow what it says?"
    measures: ClassVar[dict[str, Measure]] = {
        "unique answers": Measure("share", "different answers among the samples of one question; 0 where all are the same"),
        "distinct ngrams": Measure("share", "different runs of words among all of the samples; falls with the length of the answers"),
        "ngram distance": Measure("share", "runs of words that two samples do not share, mean over pairs; 0 for the same answer again and again"),
    }

    def diagnose(self, evidence: Evidence) -> Finding:
        with connect() as con:
            con.register("items", evidence.items)
            rows = con.sql("""
                select s.suite, s.metric, s.system, count(*) as n, avg(s.score) as mean, avg(b.score) as base
                from items s join items b using (suite, metric, item_id) where b.system = 'base' and s.metric in $metrics
                group by s.suite, s.metric, s.system order by s.suite, s.metric, s.system <> 'base', s.system""",
                params={"metrics": [UNIQUE, DISTINCT, APART]}).fetchall()
        numbers = [Number(metric.replace("_", " "), mean, system, suite) for suite, metric, system, _, mean, _ in rows]
        suites = list(dict.fromkeys(r[0] for r in rows))
        said = [f"{suite}: {each({r[2]: f'{r[4]:.0%}' for r in rows if r[:2] == (suite, APART)})}" for suite in suites]
        words = f"Runs of words that two samples do not share, on {'; '.join(said)}." if said else "No suite of the method `diversity` was asked."
        systems = list(dict.fromkeys(r[2] for r in rows))
        value = {r[:3]: r[4] for r in rows}
        places = list(dict.fromkeys(r[:2] for r in rows))
        dots = Dots("Diversity of the answers", "more is more diverse", [f"{metric.replace('_', ' ')}, {suite}" for suite, metric in places],
                    {system: [value.get((*place, system)) for place in places] for system in systems})
        columns = {"suite": "string", "metric": "string", "system": "string", "n": "int64", "mean": "double", "base": "double"}
        return Finding(words, numbers, table(columns, rows), [dots] if rows else [])
