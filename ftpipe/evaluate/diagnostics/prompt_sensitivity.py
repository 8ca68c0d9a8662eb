"""How much a system's scores depend on how an instruction is worded."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.evaluate.diagnostics._shared import svg, table
from ftpipe.evaluate.diagnostics.base import Diagnostic, Evidence, Finding
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
    libraries: ClassVar[tuple[str, ...]] = ("matplotlib",)

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
        numbers: dict[str, float] = {}
        for system, tasks in by.items():
            found: dict[str, list[float]] = {}
            for each in tasks.values():
                for name, value in self._of(each).items():
                    found.setdefault(name, []).append(value)
            numbers |= {f"{system}: {name}": mean(values) for name, values in found.items()}
        columns = {"system": "string", "suite": "string", "metric": "string", "wording": "string", "observed": "bool", "n": "int64", "score": "double"}
        return Finding(numbers, table(columns, [c[:7] for c in cells]), svg(lambda axes: _draw(axes, cells)) if cells else None)

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


def _draw(axes: Any, cells: list[tuple]) -> None:
    systems = list(dict.fromkeys(c[0] for c in cells))
    for observed, shift, marker in ((True, -0.12, "o"), (False, 0.12, "x")):
        points = [(systems.index(c[0]) + shift, c[6]) for c in cells if c[4] is observed]
        axes.scatter([x for x, _ in points], [y for _, y in points], marker=marker, label="observed" if observed else "unobserved")
    axes.set_xticks(range(len(systems)), systems)
    axes.set(ylabel="score of a wording")
    axes.legend(frameon=False)
