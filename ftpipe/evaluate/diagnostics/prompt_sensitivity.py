"""How much a system's scores depend on how an instruction is worded."""

from __future__ import annotations

from statistics import mean, stdev
from typing import ClassVar

from pydantic import Field

from ftpipe.evaluate.diagnostics._shared import each, table
from ftpipe.evaluate.diagnostics.base import Diagnostic, Dots, Evidence, Finding, Measure, Number
from ftpipe.evaluate.suites.rephrased import OBSERVED, UNOBSERVED
from ftpipe.tables import connect


class PromptSensitivity(Diagnostic):
    """Mean, spread and fall of the scores over wordings, from suites of the method `rephrased`.

    The score of a wording is the weighted mean over its questions. Within a suite every wording counts alike: the mean over wordings, their sample
    standard deviation, the worst one, and the gap, the mean of the observed less that of the unobserved ones (positive where new wordings do worse; for a
    metric of which less is better its sign is turned). Then every suite and metric counts alike. A spread over fewer than `wordings` wordings of a
    kind is little more than an anecdote and is not given; the table, with each wording's score, always is.

    What a spread means: with n questions a share p scatters by about sqrt(p (1-p) / n) between any two sets of questions; but here all wordings get the
    same questions, and less than that is left to chance.
    """

    paper: ClassVar[str] = "Evaluating the Zero-shot Robustness of Instruction-tuned Language Models"
    question: ClassVar[str] = "How much hangs on how a question is worded?"
    measures: ClassVar[dict[str, Measure]] = {
        "mean over wordings": Measure("", "mean score, every wording counting alike"),
        "worst wording": Measure("", "mean score under the wording that it did worst with"),
        "mean over observed wordings": Measure("", "mean score under wordings that training showed"),
        "mean over unobserved wordings": Measure("", "mean score under wordings that training did not show"),
        "standard deviation over observed wordings": Measure("", "how far the scores of such wordings lie apart"),
        "standard deviation over unobserved wordings": Measure("", "how far the scores of such wordings lie apart"),
        "gap, observed less unobserved": Measure("", "how much worse new wordings do; about 0 is what one wants"),
    }

    wordings: int = Field(default=5, ge=2, description="Wordings of a kind from which on a standard deviation is given.")

    def diagnose(self, evidence: Evidence) -> Finding:
        with connect() as con:
            con.register("items", evidence.items)
            cells = con.sql("""
                select system, suite, metric, slice as wording, starts_with(slice, $o) as observed, count(*) as n, sum(score * weight) / sum(weight) as score,
                       bool_and(higher_is_better) as higher
                from items where starts_with(slice, $o) or starts_with(slice, $u)
                group by system, suite, metric, slice having sum(weight) > 0 order by suite, metric, system, observed desc, slice""",
                params={"o": OBSERVED, "u": UNOBSERVED}).fetchall()
        by: dict[str, dict[tuple[str, str], list[tuple]]] = {}
        for cell in cells:
            by.setdefault(cell[0], {}).setdefault(cell[1:3], []).append(cell)
        numbers: list[Number] = []
        for system, tasks in by.items():
            found: dict[str, list[float]] = {}
            for cells_of_one in tasks.values():
                for name, value in self._of(cells_of_one).items():
                    found.setdefault(name, []).append(value)
            numbers += [Number(name, mean(values), system) for name, values in found.items()]
        gaps = {n.system: f"{n.value:+.3f}" for n in numbers if n.measure == "gap, observed less unobserved"}
        words = f"New wordings do worse than known ones by: {each(gaps)} (positive is worse)." if gaps else "No suite of the method `rephrased` was asked."
        columns = {"system": "string", "suite": "string", "metric": "string", "wording": "string", "observed": "bool", "n": "int64", "score": "double"}
        return Finding(words, numbers, table(columns, [c[:7] for c in cells]), _plots(cells))

    def _of(self, cells: list[tuple]) -> dict[str, float]:
        """The figures of one system on one suite and metric; cells as in the table, and whether more is better."""
        observed, unobserved = ([c[6] for c in cells if c[4] is kind] for kind in (True, False))
        turned = 1 if cells[0][7] else -1
        found = {"mean over wordings": mean([*observed, *unobserved]), "worst wording": turned * min(turned * v for v in (*observed, *unobserved))}
        for kind, values in (("observed", observed), ("unobserved", unobserved)):
            if values:
                found[f"mean over {kind} wordings"] = mean(values)
            if len(values) >= self.wordings:
                found[f"standard deviation over {kind} wordings"] = stdev(values)
        if observed and unobserved:
            found["gap, observed less unobserved"] = turned * (mean(observed) - mean(unobserved))
        return found


def _plots(cells: list[tuple]) -> list[Dots]:
    """The score of each wording under each system, a plot for each suite and metric."""
    found = []
    for suite, metric in dict.fromkeys(c[1:3] for c in cells):
        mine = [c for c in cells if c[1:3] == (suite, metric)]
        wordings = list(dict.fromkeys(c[3] for c in mine))
        value = {(c[0], c[3]): c[6] for c in mine}
        found.append(Dots(f"Score by wording: {suite}, {metric}", metric, wordings,
                          {system: [value.get((system, w)) for w in wordings] for system in dict.fromkeys(c[0] for c in mine)}))
    return found
