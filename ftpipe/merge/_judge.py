"""Scores of merged models on held-out items, through the suites of the evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ftpipe.evaluate.suites.base import Item, Suite
    from ftpipe.evaluate.systems import System
    from ftpipe.merge._given import Given


@dataclass(frozen=True)
class Mean:
    """A metric's weighted mean over items. `better(other)` and `as_good_as(other)` know which way is up."""

    value: float
    higher_is_better: bool

    @property
    def up(self) -> float:
        """The value, turned so that more is better."""
        return self.value if self.higher_is_better else -self.value


class Judge:
    """Asks weighted sums of the adapters' changes, put on the base model in memory, the items of suites. What was asked before is not asked again.

    Args:
        rows: name of the rows stage whose held-out rows the suites ask. share: of the groups of items (slices), the share that choices are made on,
            drawn by a hash of their names; the rest is kept for an honest figure.
    """

    def __init__(self, given: Given, rows: str, suites: list[Suite], *, share: float = 1.0):
        from ftpipe.data.rows import RowSet
        from ftpipe.evaluate.suites.base import Given as Asked

        self.given, self.suites, self.share = given, suites, share
        asked = Asked(RowSet(given.inputs[rows]), given.env, given.log)
        self.items = {label: suite.items(asked) for suite in suites for label in suite.labels()}
        if share < 1 and not (self.chosen(True) and self.chosen(False)):
            raise DataError(f"the held-out rows of {rows} have too few groups to keep a part of them apart", where="merge",
                            remedy="set `share: 1`, and judge the result on other rows")

    def chosen(self, selection: bool) -> set[str]:
        """The slices that choices are made on, or the others."""
        return {i.slice for items in self.items.values() for i in items if self._selects(i) == selection}

    def _selects(self, item: Item) -> bool:
        return self.share >= 1 or int.from_bytes(hashlib.sha256(f"{self.given.seed}/{item.slice}".encode()).digest()[:6], "big") < self.share * 2**48

    def system(self, weights: Mapping[str, float]) -> System:
        """The base model with each adapter's changes added, so many times; none is the base itself."""
        from ftpipe.evaluate.systems import System
        from ftpipe.models.loading import default_device, identity, load_tokenizer
        from ftpipe.models.service import ModelService

        given = self.given
        used = {name: w for name, w in weights.items() if w}

        def opened() -> ModelService:
            changed = given.changed()
            from ftpipe.merge._deltas import add

            for name in sorted({n for adapter in used for n in given.adapters[adapter]}):
                changed.add(name, add([given.adapters[a][name].times(w) for a, w in sorted(used.items(), key=self._content) if name in given.adapters[a]]))
            return ModelService(changed.model.to(default_device()), load_tokenizer(given.model, given.env))

        base = {k: v for k, v in identity(given.model, given.env).items() if k != "model"}
        summed = [[self._content((a, w)), w] for a, w in sorted(used.items(), key=self._content)]
        who = {"base": base, "dtype": given.dtype, "device": default_device(), "sum": summed}
        if given.facts.get("quantize"):
            who["quantize"] = given.facts["quantize"]
        return System("+".join(used) or "base", who, opened)

    def _content(self, weighted: tuple[str, float]) -> str:
        return self.given.contents.get(weighted[0], weighted[0])

    def means(self, weights: Mapping[str, float]) -> dict[str, dict[str, dict[str, Mean]]]:
        """For `selection` and `rest`: each suite's metrics."""
        system = self.system(weights)
        try:
            return means(system, self.suites, self.items, self.given, self._selects)
        finally:
            system.close()


def means(system: System, suites: list[Suite], items: Mapping[str, list[Item]], given: Given, selects: Any = lambda item: True
          ) -> dict[str, dict[str, dict[str, Mean]]]:
    """A system's weighted means: `{"selection" or "rest": {suite: {metric: Mean}}}`."""
    from ftpipe.evaluate.systems import results

    sums: dict[tuple[str, str, str], list[float]] = {}
    up: dict[tuple[str, str, str], bool] = {}
    for suite in suites:
        own = [i for label in suite.labels() for i in items[label]]
        for item, scores in results(system, suite, own, given.env.cache, lambda fresh: None):
            for score in scores:
                key = ("selection" if selects(item) else "rest", item.suite, score.metric)
                entry = sums.setdefault(key, [0.0, 0.0])
                entry[0], entry[1] = entry[0] + score.score * score.weight, entry[1] + score.weight
                up[key] = score.higher_is_better
    found: dict[str, dict[str, dict[str, Mean]]] = {"selection": {}, "rest": {}}
    for (part, label, metric), (total, weight) in sums.items():
        if weight:
            found[part].setdefault(label, {})[metric] = Mean(total / weight, up[part, label, metric])
    if not found["selection"]:
        raise DataError("no item could be scored under any suite", where="merge", remedy="look at the held-out rows: do they have answers?")
    return found


def one_metric(metrics: Mapping[str, Mean], wanted: str, suite: str) -> Mean:
    """The metric called `wanted`, or the only one. Raises ConfigError."""
    if wanted in metrics:
        return metrics[wanted]
    if wanted or len(metrics) != 1:
        raise ConfigError(f"{suite} has the metrics {', '.join(sorted(metrics))}{f', not {wanted!r}' if wanted else ''}", remedy="name one of them in `metric`")
    return next(iter(metrics.values()))


def plain(found: Mapping[str, Mapping[str, Mapping[str, Mean]]]) -> dict[str, Any]:
    """Means as JSON: `{part: {suite: {metric: value}}}`; a part without items is left out."""
    return {part: {suite: {m: mean.value for m, mean in metrics.items()} for suite, metrics in suites.items()} for part, suites in found.items() if suites}
