"""Skill-It: more of the skills that help where the loss is high."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from ftpipe.curate.mix._runs import BASE, CANDIDATE, Run, runs_of
from ftpipe.curate.mix._sources import ShareMixer, Sources
from ftpipe.curate.step import StepContext
from ftpipe.errors import DataError, nearest
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import numpy as np

Graph = dict[str, dict[str, float]]


def mixture(graph: np.ndarray, losses: np.ndarray, eta: float) -> np.ndarray:
    """(k,) shares proportional to exp(eta sum_j graph_ij losses_j), for a graph (k trained skills, m evaluated skills) and losses (m,)."""
    import numpy as np

    exponent = eta * (graph @ losses)
    shares = np.exp(exponent - exponent.max())
    return shares / shares.sum()


class SkillIt(ShareMixer):
    """The mixture of the next round of training: share of skill i proportional to exp(eta sum_j A_ij L_j).

    A is the skills graph: A_ij > 0 where training on i lowers the loss on j; its rows are the skills trained on (the sources of these rows), its columns those
    evaluated, which may be others. L_j is the loss on j, summed over the last `window` evaluations, the newest last; with
    `targets` only those columns count, and the mean is taken instead of the sum (the paper's fine-tuning setting; its eta is then that many times
    weaker). Without evaluations, in the first round, every loss is 1. Each round starts from equal shares, no product is carried on.

    The graph is given, or learned from short runs, stages like any others, compared by evaluate stages. `linear`: A_ij is how far a run on i alone lowers
    the loss on j below the base model's. `pairs`: how far a run on i and j together comes below one on j alone, of as many steps. What does not fall is
    no edge: 0. Runs are told apart by what they were trained on. Of the diagonal `pairs` say nothing; it is 1 then, as in the paper's synthetic graphs.
    `edge` replaces what was measured by one weight (0.5 in those), and the diagonal by 1.

    A round is a mix step of `amount` rows, a train stage and an evaluate stage; the next round's step names the evaluations so far, and draws its rows
    anew. In the paper one model is trained through all rounds. A train stage starts from the base model, so here each round trains a new one, on a
    mixture chosen by the losses of those before.
    """

    paper: ClassVar[str] = "Skill-it! A Data-Driven Skills Framework for Understanding and Training Language Models"

    eta: float = Field(default=0.5, ge=0, description="How strongly losses move the shares; 0 gives equal shares.")
    window: int = Field(default=3, ge=1, description="Newest evaluations that count.")
    targets: list[str] = Field(default_factory=list, description="Evaluated skills that matter; all of the graph's if not set.")
    evaluations: list[Ref] = Field(default_factory=list, description="Evaluate stages of the rounds so far (their candidate counts), the newest last.")
    losses: list[dict[str, float]] = Field(default_factory=list, description="The same as numbers: loss by skill, the newest last; in place of evaluations.")
    graph: Graph = Field(default_factory=dict, description="Weights by trained skill, then by evaluated skill; 0 for those not named.")
    learn: Literal["linear", "pairs"] = Field(default="linear", description="How the graph is learned from `probes`.")
    probes: list[Ref] = Field(default_factory=list, description="Evaluate stages of short train stages to learn the graph from; candidate and controls count.")
    edge: float | None = Field(default=None, gt=0, description="Weight of every learned edge between two skills; as measured if not set.")
    suite: str = Field(default="heldout_loss", description="Suite of the evaluations whose losses count, by its label.")

    @model_validator(mode="after")
    def _sources_of_numbers(self) -> SkillIt:
        if bool(self.graph) == bool(self.probes):
            raise ValueError("skill_it needs one of graph (numbers) and probes (evaluate stages to learn it from)")
        if self.evaluations and self.losses:
            raise ValueError("give losses as evaluations (stages) or as losses (numbers)")
        return self

    def purpose(self) -> tuple[str | int, ...]:
        return (self.name(), len(self.evaluations) + len(self.losses))

    def shares(self, sources: Sources, ctx: StepContext) -> np.ndarray:
        import numpy as np

        where = f"{ctx.name} (skill_it)"
        graph = self.graph or self._learned(ctx, where)
        evaluated = sorted({skill for row in graph.values() for skill in row})
        for name, known in [(n, sources.names) for n in graph] + [(t, evaluated) for t in self.targets]:
            if name not in known:
                raise DataError(f"there is no skill {name!r} among the {self.by}s of the rows" if known is sources.names else
                                f"the graph has no evaluated skill {name!r}", where=where, remedy=nearest(name, known))
        missing = [n for n in sources.names if n not in graph]
        if missing:
            raise DataError(f"the graph has no row for the skill {missing[0]!r} of these rows", where=where, remedy="add it, or leave its rows out before")
        columns = self.targets or evaluated
        matrix = np.array([[graph[i].get(j, 0.0) for j in columns] for i in sources.names])
        logged = self._logged(ctx, columns, where)[-self.window:]
        windowed = np.ones(len(columns)) if not logged else (np.mean if self.targets else np.sum)(np.array(logged), axis=0)
        shares = mixture(matrix, windowed, self.eta)
        sources.told.update(graph={i: {j: float(w) for j, w in zip(columns, row) if w} for i, row in zip(sources.names, matrix)},
                            losses=dict(zip(columns, windowed.tolist())), rounds=len(self.evaluations) + len(self.losses),
                            shares=dict(zip(sources.names, shares.tolist())))
        return shares

    def _logged(self, ctx: StepContext, skills: list[str], where: str) -> list[list[float]]:
        """Losses of `skills` at each evaluation, in their order."""
        logged = self.losses or [runs_of(ctx.inputs[ref], self.by, self.suite, where, seen=False)[CANDIDATE].loss for ref in self.evaluations]
        for number, losses in enumerate(logged, 1):
            lacking = [s for s in skills if s not in losses]
            if lacking:
                raise DataError(f"evaluation {number} has no loss of the skill {lacking[0]!r}", where=where, remedy=f"it has {', '.join(sorted(losses))}")
        return [[losses[s] for s in skills] for losses in logged]

    def _learned(self, ctx: StepContext, where: str) -> Graph:
        found = [runs_of(ctx.inputs[ref], self.by, self.suite, where) for ref in self.probes]
        return linear(found, self.edge, where) if self.learn == "linear" else pairs(found, self.edge, where)


def linear(probes: list[dict[str, Run]], edge: float | None, where: str) -> Graph:
    """Falls of each loss below the base model's (run `base` of the same evaluation) by a run on one skill alone; the mean of several runs on the same."""
    falls: dict[str, list[dict[str, float]]] = {}
    for runs in probes:
        for run in runs.values():
            if len(skills := _trained(run)) == 1:
                falls.setdefault(skills[0], []).append({j: runs[BASE].loss[j] - loss for j, loss in run.loss.items()})
    if not falls:
        raise DataError("no probe was trained on one skill alone", where=where, remedy="train one on the rows of each skill, or set `learn: pairs`")
    return {i: {j: _edge(sum(f[j] for f in each) / len(each), i, j, edge) for j in sorted(set.intersection(*map(set, each)))}
            for i, each in sorted(falls.items())}


def pairs(probes: list[dict[str, Run]], edge: float | None, where: str) -> Graph:
    """How far a run on i and j comes below a run on j alone in the loss of j; 1 on the diagonal."""
    every = [run for runs in probes for run in runs.values()]
    alone = {s[0]: run for run in every if len(s := _trained(run)) == 1}
    graph: Graph = {i: {i: 1.0} for i in sorted({s for run in every for s in _trained(run)})}
    both = [(s, run) for run in every if len(s := _trained(run)) == 2]
    if not both:
        raise DataError("no probe was trained on two skills", where=where, remedy="train one on each pair of skills, or set `learn: linear`")
    for skills, run in both:
        for i, j in (skills, skills[::-1]):
            if j in alone and j in run.loss and j in alone[j].loss:
                graph[i][j] = _edge(alone[j].loss[j] - run.loss[j], i, j, edge)
    return graph


def _trained(run: Run) -> list[str]:
    return sorted(skill for skill, tokens in run.tokens.items() if tokens)


def _edge(fall: float, i: str, j: str, edge: float | None) -> float:
    if edge is None:
        return max(fall, 0.0)
    return 1.0 if i == j else edge * (fall > 0)
