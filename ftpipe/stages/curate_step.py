"""One curation step as a stage of its own; `curate` expands to these, and a pipeline may write one directly."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pydantic import Field

from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError
from ftpipe.slots import choose
from ftpipe.stages.base import Environment, Ref, Stage, StageContext


class CurateStepStage(Stage):
    """Applies one method of a curate slot to the train rows of another stage."""

    produces = "rows"

    rows: Ref = Field(description="Stage whose rows the step works on.")
    step: choose("curate") = Field(description="One method of curate/..., with its settings.")
    model: str = Field(default="", description="Model that scores and embeds, if the step uses one; the pipeline's model by default.")
    seed: int | None = Field(default=None, ge=0, description="Seed, if the step uses one; the pipeline's seed by default.")

    def key_fields(self) -> dict[str, Any]:
        # A step that reads no model must not run again because the model changed; one that does has the model's identity in `externals`.
        fields = self.model_dump(mode="json", exclude={"model"})
        if not self.step.uses_seed:
            del fields["seed"]
        return fields

    def externals(self, env: Environment) -> dict[str, Any]:
        own = self.step.externals(env)
        if not self.step.uses_model:
            return own
        # Not an import statement: the loader's code would enter the keys of steps without a model. Those with one import it themselves.
        identity = import_module("ftpipe.models.loading").identity(self.model, env)
        return own | {"model": {k: v for k, v in identity.items() if k != "model"}}  # the hashes count, not how the model is written

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        if self.step.uses_model and not self.model:
            raise ConfigError(f"{self.step.name()} needs a model", remedy="set `model:` at the top of the file or in this stage")
        env.engine.check()

    def run(self, ctx: StageContext) -> None:
        ctx.meta["rows_from"] = [self.rows]
        ctx.work.mkdir(parents=True, exist_ok=True)
        step = StepContext(**vars(ctx), method=self.step.name(), model=self.model if self.step.uses_model else "",
                           seed=(self.seed or 0) if self.step.uses_seed else 0)
        self.step.apply(RowSet(ctx.inputs[self.rows]), step)
