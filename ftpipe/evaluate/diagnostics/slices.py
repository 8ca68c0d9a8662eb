"""Where the candidate gained and where it lost: by group, by source, by length."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ftpipe.evaluate.diagnostics._shared import called, table
from ftpipe.evaluate.diagnostics.base import Diagnostic, Dots, Evidence, Finding, Measure, Number
from ftpipe.evaluate.slicing import OF, WAYS, Way, in_order, parts

AGAINST = ("base", "champion")
COLUMNS = {"suite": "string", "metric": "string", "by": "string", "part": "string", "against": "string", "n": "int64", "other": "double", "adapter": "double",
           "difference": "double"}
ENDS = 5
"""Parts at either end that are drawn where there are more."""


class Slices(Diagnostic):
    """The weighted mean of each part of a suite under the adapter and under the base and the champion, and the difference turned so that more is better.

    Parts are an item's own slice, the source of its row, and its length (`evaluate/slicing.py`). A mean gain may hide parts that lost. The table has
    each part with its items, the worst first; the numbers are the shares of parts (of `min_items` items or more) that got worse. No interval is
    given: with a few items a part, most differences are noise. A rule of the gate may ask for each part (`by`), with an interval.
    """

    support: ClassVar[tuple[str, ...]] = ("ftpipe.evaluate.slicing",)
    question: ClassVar[str] = "Where did it gain, and where did it lose?"
    measures: ClassVar[dict[str, Measure]] = {
        "parts that got worse": Measure("share", "parts in which the adapter does worse than the other; without intervals, so a hint")}

    min_items: int = Field(default=2, ge=1, description="Smallest part that is listed.")
    by: list[Way] = Field(default=list(WAYS), min_length=1, description="What the items are parted by.")

    def diagnose(self, evidence: Evidence) -> Finding:
        rows, seen = [], set()
        for way in self.by:
            for (suite, metric), found in self._rows(evidence, way).items():
                cut = (suite, metric, tuple(sorted(r[4:] for r in found)))
                if cut not in seen:  # a source that is the same as a group is told once
                    seen.add(cut)
                    rows += found
        worse: dict[tuple[str, str], list[bool]] = {}
        for suite, metric, way, _, other, *_, difference in rows:
            worse.setdefault((other, f"{suite} {metric} by {OF[way]}"), []).append(difference < 0)
        numbers = [Number("parts that got worse", sum(lost) / len(lost), other, of) for (other, of), lost in worse.items()]
        said = [f"{of}, {sum(lost)} of {len(lost)} against {called(other)}" for (other, of), lost in worse.items()]
        words = f"Parts in which the adapter does worse: {'; '.join(said)}." if said else f"No part has {self.min_items} items or more."
        return Finding(words, numbers, table(COLUMNS, sorted(rows, key=lambda r: (r[0], r[1], r[2], r[8], *r[3:5]))), _plots(rows))

    def _rows(self, evidence: Evidence, way: Way) -> dict[tuple[str, str], list[tuple]]:
        """Rows of the table for one way to part the items, by suite and metric; suites in which there are not two parts are left out."""
        items = evidence.items
        told: dict[tuple[str, str, str], dict[str, tuple[str, float, float, bool]]] = {}
        for r, part in zip(items.to_pylist(), parts(items, way)):
            if part and r["weight"] > 0 and r["system"] in ("adapter", *AGAINST):
                told.setdefault((r["suite"], r["metric"], r["system"]), {})[r["item_id"]] = (part, r["score"], r["weight"], r["higher_is_better"])
        found: dict[tuple[str, str], list[tuple]] = {}
        for (suite, metric, other), theirs in told.items():
            mine = told.get((suite, metric, "adapter"), {})
            both = [(theirs[i], mine[i]) for i in theirs if i in mine] if other in AGAINST else []
            mean: dict[str, list[tuple]] = {}
            for b, a in both:
                mean.setdefault(a[0], []).append((b[1], a[1], a[2], a[3]))
            kept = {part: each for part, each in mean.items() if len(each) >= self.min_items}
            for part in in_order(set(kept), way) if len(kept) > 1 else []:
                total = sum(w for _, _, w, _ in kept[part])
                before, after = (sum(e[k] * e[2] for e in kept[part]) / total for k in (0, 1))
                found.setdefault((suite, metric), []).append((suite, metric, way, part, other, len(kept[part]), before, after,
                                                              after - before if kept[part][0][3] else before - after))
        return found


def _plots(rows: list[tuple]) -> list[Dots]:
    """The differences by part, a plot for each suite, metric and way; of many parts the best and the worst against the base."""
    found = []
    for suite, metric, way in dict.fromkeys(r[:3] for r in rows):
        mine = [r for r in rows if r[:3] == (suite, metric, way)]
        sizes = {r[3]: r[5] for r in mine}
        value = {(r[4], r[3]): r[8] for r in mine}
        names, cut = list(sizes), ""
        if way != "length":
            names.sort(key=lambda n: (-value.get(("base", n), value.get(("champion", n), 0.0)), n))
        if len(names) > 2 * ENDS:
            cut = f", the {ENDS} best and the {ENDS} worst of {len(names)}"
            names = [*names[:ENDS], *names[-ENDS:]]
        series = {other: [value.get((other, n)) for n in names] for other in AGAINST if any(k[0] == other for k in value)}
        unit = f"adapter better than {called(*series)} by" if len(series) == 1 else "adapter better than each by"
        found.append(Dots(f"{suite}, {metric}, by {OF[way]}{cut}", unit, [f"{n} ({sizes[n]} items)" for n in names], series, zero=True))
    return found
