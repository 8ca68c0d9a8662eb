"""Study: ways of training, each run with several seeds, compared on the same items and by what they cost."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ftpipe.errors import ConfigError
from ftpipe.stages.base import Environment, Ref, Stage, StageContext


class Budget(BaseModel):
    """What every arm of a comparison was to get alike, beside the rows and their order; what it got is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float | None = Field(default=None, gt=0, description="Seconds of steps; as many steps as each other if not set.")
    parameters: int | None = Field(default=None, ge=1, description="Parameters that train, as near as each method's size can come.")
    sizes: dict[str, str] = Field(default={}, description="By arm: the size that was chosen for `parameters`, or why there is none.")


class Study(Stage):
    """Compares arms: what was trained in one way, once for each seed. `ftpipe prove` and `ftpipe compare` write pipelines that end in one.

    Scores come from one evaluation that has every adapter among its systems. Each arm is compared with the base and with the arms in `against` by
    `evaluate/statistics.py: compare_arms`, whose intervals hold for other items and other seeds. What an arm cost (seconds, tokens, memory, size) is
    read from the manifests of the stages that made it: as measured when they ran, wherever that was.
    """

    produces: ClassVar[str] = "study"
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)

    evaluation: Ref = Field(description="Evaluation whose systems hold every adapter of the arms.")
    arms: dict[str, list[Ref]] = Field(min_length=1, description="Stages that make each arm's adapters, in the same order of seeds: {lora: [a, b]}.")
    against: list[str] = Field(default=[], description="Arms that every other arm is compared with; each is compared with the base too.")
    selection: dict[str, Ref] = Field(default={}, description="Stage that chose the rows of an arm, if choosing them cost something.")
    pool: Ref | None = Field(default=None, description="Stage that all selections start from; what comes before it is no arm's cost.")
    budget: Budget | None = Field(default=None, description="What the arms were to get alike; the page shows it beside what they got.")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Confidence of the intervals.")

    @field_validator("arms")
    @classmethod
    def _seeds(cls, value: dict[str, list[str]]) -> dict[str, list[str]]:
        if len({len(stages) for stages in value.values()}) > 1 or not all(value.values()):
            raise ValueError("every arm needs the same number of adapters, one for each seed")
        if "base" in value:
            raise ValueError("an arm cannot be called 'base'")
        return value

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        sizes = self.budget.sizes if self.budget else {}
        for field, names in (("against", self.against), ("selection", self.selection), ("budget.sizes", sizes)):
            for name in names:
                if name not in self.arms:
                    raise ConfigError(f"{field} names {name!r}, which is no arm", remedy=f"the arms are {', '.join(self.arms)}")
        evaluate = pipeline[self.evaluation]
        asked = {getattr(evaluate, "candidate", None), *getattr(evaluate, "controls", {}).values()}
        for arm, stages in self.arms.items():
            for stage in stages:
                if stage not in asked:
                    raise ConfigError(f"{self.evaluation} does not evaluate {stage} (arm {arm})", remedy=f"add it to the controls of {self.evaluation}")

    def run(self, ctx: StageContext) -> None:
        from ftpipe.evaluate.study import costs, results

        made = {arm: [ctx.inputs[stage] for stage in stages] for arm, stages in self.arms.items()}
        found: dict[str, Any] = results(ctx.inputs[self.evaluation], made, self.against, self.confidence)
        found["budget"] = self.budget.model_dump(mode="json") if self.budget else None
        (ctx.out / "study.json").write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        chosen = {arm: ctx.inputs[stage] for arm, stage in self.selection.items()}
        ctx.notes["costs"] = costs(made, chosen, ctx.inputs[self.pool] if self.pool else None)
        for c in found["comparisons"]:
            ctx.log.info("%s %s: %s better than %s by %+.4f (%+.4f to %+.4f), %d items, %d seeds", c["suite"], c["metric"], c["a"], c["b"], c["difference"],
                         c["low"], c["high"], c["n"], c["seeds"])
