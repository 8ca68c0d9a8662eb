"""Data Mixing Optimization: shares of domains from a scaling law fitted to short runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from ftpipe.curate.mix._runs import BASE, Run, runs_of
from ftpipe.curate.mix._sources import ShareMixer, Sources
from ftpipe.curate.step import StepContext
from ftpipe.errors import DataError
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import numpy as np

    from ftpipe.curate.mix._law import Fit

LEAST = 4
"""Runs that a domain needs: C, beta, E and the worth of the others' tokens."""


class Dmo(ShareMixer):
    """Gives each domain the share of the tokens at which the sum of the domains' predicted losses is smallest.

    A domain's loss on its own held-out rows is taken to follow L = C (own + k rest^alpha)^(-beta) + E, where own and rest are the tokens trained on of it
    and of all others; the law is fitted to short runs by Huber's loss, and the shares are found for the number of tokens that training will see: they
    change with it. The paper's runs are one with n tokens of each of K domains, and for each domain four that change its tokens to n/3, n/2, 2n and 3n.

    Where this is our reading: the paper's text fits losses and its code perplexities; here it is the loss in nats a token. The paper fits a domain to the runs
    that change that domain, in which rest is always the same: they tell k rest^alpha and not the two apart. Every run in which a domain was measured is used
    here, and those that change another domain's tokens have another rest (which takes for granted that all others' tokens are worth the same). If rest
    still never changes, alpha is `alpha`, which the report and a warning say. The law counts tokens as if none were seen twice; a domain that has to be
    repeated will do worse than predicted, and the report says which. A domain's share can be 0 if the others' tokens are worth enough.
    """

    paper: ClassVar[str] = "Data Mixing Optimization for Supervised Fine-Tuning of Large Language Models"
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)

    unit: Literal["tokens"] = Field(default="tokens", description="Shares are of tokens.")
    runs: list[Run] = Field(default_factory=list, description="Short runs as numbers: tokens seen of each domain, and loss on each domain.")
    evaluations: list[Ref] = Field(default_factory=list, description="Evaluate stages of short train stages; candidate and controls are a run each.")
    suite: str = Field(default="heldout_loss", description="Suite of the evaluations whose losses count, by its label.")
    budget: int | None = Field(default=None, gt=0, description="Tokens that training will see, for which the shares are best; those of the epoch if not set.")
    delta: float = Field(default=1e-3, gt=0, description="Distance from the law, in nats, up to which a run counts as noise and not as an outlier.")
    alpha: float = Field(default=0.5, ge=0, le=1, description="Exponent for domains whose runs cannot tell k and alpha apart.")

    @model_validator(mode="after")
    def _some(self) -> Dmo:
        if not (self.runs or self.evaluations):
            raise ValueError("dmo needs short runs: give `evaluations` (stages) or `runs` (numbers)")
        return self

    def shares(self, sources: Sources, ctx: StepContext) -> np.ndarray:
        import numpy as np

        from ftpipe.curate.mix._law import best_shares

        where = f"{ctx.name} (dmo)"
        runs = list(self.runs)
        for ref in self.evaluations:
            runs += [run for system, run in runs_of(ctx.inputs[ref], self.by, self.suite, where).items() if system != BASE]
        unknown = sorted({d for run in runs for d, n in run.tokens.items() if n} - set(sources.names))
        if unknown:
            raise DataError(f"runs were trained on {unknown[0]!r}, which is no {self.by} of these rows", where=where,
                            remedy=f"the rows have {', '.join(sources.names[:20])}")
        total = float(self.budget or self.epoch(sources))
        fits = [self._fit(runs, name, ctx) for name in sources.names]
        laws = [f.law for f in fits]
        shares = best_shares(laws, total)

        def predicted(w: np.ndarray) -> list[float]:
            return [float(law.loss(total * w[i], total * (1 - w[i]))) for i, law in enumerate(laws)]

        mixtures = {"these": shares, "equal": np.full(len(laws), 1 / len(laws)), "proportional": sources.size / sources.size.sum()}
        repeated = [n for n, s, size in zip(sources.names, shares, sources.size) if s * self.epoch(sources) > size]
        if repeated:
            ctx.log.warning("rows of %s are repeated, which the law knows nothing of", ", ".join(repeated))
        sources.told.update(
            budget_tokens=total, runs=len(runs), repeated=repeated,
            laws=[{"source": n, **vars(f.law), "largest_error": f.error, "k_and_alpha_apart": f.apart} for n, f in zip(sources.names, fits)],
            predicted={name: {"sum": sum(predicted(w)), "loss": dict(zip(sources.names, predicted(w)))} for name, w in mixtures.items()})
        return shares

    def _fit(self, runs: list[Run], domain: str, ctx: StepContext) -> Fit:
        import numpy as np

        from ftpipe.curate.mix._law import fit

        measured = [(run.seen(domain), run.all - run.seen(domain), run.loss[domain]) for run in runs if domain in run.loss and run.all > 0]
        own = {m[0] for m in measured}
        if len({m[:2] for m in measured}) < LEAST or len(own) < LEAST - 1:
            raise DataError(f"{len(measured)} runs measured the loss of {domain!r}, with {len(own)} different amounts of its tokens; "
                            f"the law needs {LEAST} runs and {LEAST - 1} amounts", where=f"{ctx.name} (dmo)",
                            remedy="add runs that train on more and on less of it, and evaluate each on held-out rows of every domain")
        fitted = fit(*(np.array(column) for column in zip(*measured)), delta=self.delta, alpha=self.alpha)
        if not fitted.apart:
            ctx.log.warning("the runs cannot tell k and alpha of %s apart: alpha is taken to be %g", domain, self.alpha)
        return fitted
