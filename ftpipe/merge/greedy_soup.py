"""Greedy model soup (Wortsman et al. 2022): average the models that help, best first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftpipe.evaluate.suites.heldout_loss import HeldoutLoss
from ftpipe.merge.base import Merger
from ftpipe.slots import choose
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given


class GreedySoup(Merger):
    """Scores every model on held-out items, sorts them, starts from the best, and walks the list once: a model joins if the average with it is no worse.

    The average is of equal weights at every step; nobody is asked twice. So the soup is at least as good as its best ingredient on the items it was
    chosen on, which promises nothing elsewhere: the choice is made on a `share` of the held-out groups, and merge.json gives the scores on the rest too.
    The paper lets a model in whose soup is as good as before (`accept: not_worse`), its code only one that is better. Ties in the first sorting go to
    the order of the adapters' content hashes, so that the order in the configuration does not matter.
    """

    paper: ClassVar[str] = "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference time"
    keeps_rank: ClassVar[bool] = True

    rows: Ref = Field(description="Stage whose held-out rows choose the ingredients.")
    suite: choose("evaluate/suites") = Field(default=HeldoutLoss(), description="What the models are asked.")
    metric: str = Field(default="", description="The metric that decides, where the suite has several.")
    share: float = Field(default=0.5, gt=0, le=1, description="Share of the held-out groups that the choice is made on; 1 keeps none apart.")
    accept: Literal["not_worse", "better"] = Field(default="not_worse", description="Whether a soup as good as the one before lets a model in.")

    def prepare(self, given: Given) -> list[str]:
        from ftpipe.merge._judge import Judge, one_metric, plain

        judge = Judge(given, self.rows, [self.suite], share=self.share)
        label = self.suite.labels()[0]
        full: dict[tuple[str, ...], Any] = {}

        def score(names: tuple[str, ...]) -> float:
            full[names] = judge.means(dict.fromkeys(names, 1 / len(names)))
            given.progress(len(full), 2 * len(given.adapters) - 1, "models")
            return one_metric(full[names]["selection"][label], self.metric, label).up

        order = sorted(given.adapters, key=lambda a: (given.contents.get(a, a), a))
        chosen, steps = greedy(order, score, self.accept)
        best = max(((n,) for n in order), key=lambda n: one_metric(full[n]["selection"][label], self.metric, label).up)
        given.said |= {"ingredients": chosen, "accept": self.accept, "share": self.share,
                       "steps": [{"models": list(s), "accepted": ok, **plain(full[s])} for s, ok in steps],
                       "soup": plain(full[tuple(chosen)]), "best_single": {"model": best[0], **plain(full[best])}}
        given.log.info("the soup is of %s", ", ".join(chosen))
        return chosen

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        from ftpipe.merge._deltas import add

        used = [parts[a].times(1 / len(state)) for a in state if a in parts]
        return add(used) if used else next(iter(parts.values())).times(0.0)


def greedy(names: Sequence[str], score: Callable[[tuple[str, ...]], float], accept: str) -> tuple[list[str], list[tuple[tuple[str, ...], bool]]]:
    """The ingredients in the order they joined, and every question asked with whether its soup was kept (a single model: whether it was the first).

    `score` tells how good the average of some models is, more being better; it is asked once for each model and once for each but the first.
    """
    alone = {name: score((name,)) for name in names}
    ranked = sorted(names, key=lambda n: -alone[n])
    soup, best = [ranked[0]], alone[ranked[0]]
    asked = [((n,), n == ranked[0]) for n in names]
    for name in ranked[1:]:
        tried = score((*soup, name))
        joins = tried > best or (accept == "not_worse" and tried == best)
        asked.append(((*soup, name), joins))
        if joins:
            soup, best = [*soup, name], tried
    return soup, asked
