"""Curation: a list of steps, each of which becomes a stage with its own key, artifact, decisions and log."""

from __future__ import annotations

from pydantic import Field

from ftpipe.slots import choose
from ftpipe.stages.base import Ref, Stage, StageContext
from ftpipe.stages.curate_step import CurateStepStage


class Curate(Stage):
    """A chain of curation steps; stands for the stages `<name>/<method>` (`<name>/<method>-2` for a method's second time)."""

    produces = "rows"

    rows: Ref = Field(description="Stage whose rows are curated.")
    steps: list[choose("curate")] = Field(min_length=1, description="Methods of curate/..., applied one after the other.")
    model: str = Field(default="", description="Model that scores and embeds, for the steps that use one; the pipeline's model by default.")
    seed: int | None = Field(default=None, ge=0, description="Seed of the steps that use one; the pipeline's seed by default.")

    def expand(self, name: str) -> dict[str, Stage]:
        stages: dict[str, Stage] = {}
        seen: dict[str, int] = {}
        rows = self.rows
        for step in self.steps:
            seen[step.name()] = n = seen.get(step.name(), 0) + 1
            full = f"{name}/{step.name()}" + (f"-{n}" if n > 1 else "")
            stages[full] = CurateStepStage(rows=rows, step=step, model=self.model, seed=self.seed)
            rows = full
        return stages

    def run(self, ctx: StageContext) -> None:
        raise NotImplementedError("a curate stage stands for its steps; see expand")
