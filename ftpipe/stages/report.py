"""The report: one HTML page about a run, for those who decide on the adapter and those who made it."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.stages.base import Environment, Ref, Stage, StageContext

PAGE = "report.html"


class Report(Stage):
    """Writes `report.html`: verdict, comparison, what became of the rows, scores, training, examples, label audit and lineage.

    It follows its inputs back to everything they were made of. What is not there is left out of the page.
    """

    produces = "report"
    libraries = ("matplotlib", "jinja2", "markupsafe", "numpy", "pyarrow")

    evaluation: Ref | None = Field(default=None, description="Evaluation stage whose comparisons lead the page.")
    verdict: Ref | None = Field(default=None, description="Gate stage.")
    registration: Ref | None = Field(default=None, description="Register stage.")
    adapter: Ref | None = Field(default=None, description="Training stage of the candidate.")
    controls: list[Ref] = Field(default=[], description="Training stages that the candidate is compared with.")
    studies: list[Ref] = Field(default=[], description="Study stages to show: methods side by side.")
    data: list[Ref] = Field(default=[], description="Describe stages to show: what the rows are like.")
    title: str | None = Field(default=None, max_length=200, description="Line above the heading; the pipeline's name by default.")

    def externals(self, env: Environment) -> dict[str, Any]:
        from ftpipe.report.page import templates_digest

        return {"templates": templates_digest(), "pipeline": env.pipeline}

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        if not self.refs():
            raise ConfigError("the report is about nothing", remedy="name at least one of evaluation, verdict, registration, adapter, studies and data")
        makes = {"evaluation": "evaluation", "verdict": "verdict", "registration": "version", "adapter": "adapter", "controls": "adapter",
                 "studies": "study", "data": "description"}
        for field, wanted in makes.items():
            named = getattr(self, field)
            for name in named if isinstance(named, list) else [named] if named else []:
                made = pipeline[name].produces
                if made != wanted:
                    raise ConfigError(f"`{field}` names {name}, which makes {made or 'something else'}",
                                      remedy=f"name a stage that makes: {wanted}")

    def run(self, ctx: StageContext) -> None:
        from ftpipe.report.collect import RunData
        from ftpipe.report.page import render

        roles = {name: getattr(self, name) for name in ("evaluation", "verdict", "registration", "adapter")}
        run = RunData(ctx.inputs, roles=roles, controls=self.controls, studies=self.studies, data=self.data, pipeline=ctx.env.pipeline)
        text = render(run, self.title)
        (ctx.out / PAGE).write_text(text, encoding="utf-8")
        for name in run.missing:
            ctx.log.warning("artifact of stage %s is no longer in the store; the page goes without it", name)
        ctx.log.info("%s: %d kB about %d artifacts", PAGE, len(text.encode()) // 1000, len(run.artifacts))
