"""Gate: whether the candidate earned it, by rules that are data."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ftpipe.artifacts import Artifact
from ftpipe.errors import ConfigError
from ftpipe.evaluate.slicing import Way
from ftpipe.stages.base import Environment, Ref, Stage, StageContext


class Rule(BaseModel):
    """One condition on the candidate.

    `better`: the whole confidence interval of the gain lies above `margin`. `not_worse`: the whole interval lies above minus `margin`
    (non-inferiority); a loss that the data cannot rule out counts against the candidate. With `by` the rule is asked of each part of the suite's items
    (a group, a source, a range of lengths), and must hold on all that have `min_items`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="", description="Name in the verdict; made from the rest by default.")
    suite: str = Field(description="Suite of the evaluation whose scores are meant.")
    metric: str = Field(default="", description="Metric of the suite; may be left out where it has one.")
    against: str = Field(default="base", description="`base`, `champion`, the name of a control, or `controls` for each of them.")
    require: Literal["better", "not_worse"] = Field(default="better", description="What the candidate must be.")
    margin: float = Field(default=0.0, ge=0, description="Least gain (better) or largest loss (not_worse), in the metric's unit.")
    required: bool = Field(default=True, description="False: the rule is reported and decides nothing.")
    by: Literal["", Way] = Field(default="", description="Ask each part: `slice` (a row's group), `source` or `length`.")  # type: ignore[valid-type]
    part: str = Field(default="", description="With `by`: only the part of this name.")
    min_items: int = Field(default=8, ge=2, description="With `by`: parts with fewer items are not asked.")

    @model_validator(mode="after")
    def _parted(self) -> Rule:
        if self.part and not self.by:
            raise ValueError("`part` needs `by`: slice, source or length")
        return self


DEFAULT_RULES = (
    Rule(name="better than the base", suite="heldout_loss", against="base"),
    Rule(name="better than the champion", suite="heldout_loss", against="champion"),
    Rule(name="forgets little", suite="general_text", against="base", require="not_worse", margin=0.05),
    Rule(name="better than the control", suite="heldout_loss", against="controls", required=False),
)


class Gate(Stage):
    """Holds the candidate's comparisons against rules and writes a verdict. It never fails on a refusal: it records why.

    All required rules must hold. That is a test of an intersection: its error rate is that of a single rule at most, so nothing needs to be
    corrected for the number of rules. Where each of several gains is to be claimed by itself, or the suite was picked because it looked best, set
    `correction: holm`: a gain must then also stand Holm's correction for all suites and metrics of the evaluation. A rule about the champion is
    skipped, and says so, while there is no champion; if nothing that is required could be tested, the candidate is refused. Controls that no rule
    names are reported too. With `above_noise` a gain must also be larger than what a seed's luck makes, as the evaluation's `replicates` show it.
    """

    produces: ClassVar[str] = "verdict"
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)

    evaluation: Ref = Field(description="The evaluation to judge.")
    rules: list[Rule] = Field(default=list(DEFAULT_RULES), min_length=1, description="The conditions.")
    correction: Literal["none", "holm"] = Field(default="none", description="Correction of each `better` rule for the number of suites and metrics compared.")
    above_noise: bool = Field(default=False, description="A gain must exceed the noise floor of seeds; the evaluation needs `replicates`.")

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        from ftpipe.evaluate.rules import check_names

        evaluate = pipeline[self.evaluation]
        if evaluate.produces != "evaluation":
            raise ConfigError(f"{self.evaluation} is no evaluation but makes {evaluate.produces or 'something else'}", remedy="name an evaluate stage")
        suites = [label for suite in getattr(evaluate, "suites", []) for label in suite.labels()]
        replicates = getattr(evaluate, "replicates", [])
        controls = [c for c in getattr(evaluate, "controls", {}) if c not in replicates]
        if self.above_noise and not replicates:
            raise ConfigError(f"`above_noise` needs the noise floor, and {self.evaluation} has no `replicates`",
                              remedy="train the candidate again with other seeds, and name those trainings in its `controls` and `replicates`")
        for rule in self.rules:
            check_names(rule, suites, controls)
            if rule.against == "champion" and rule.required and not getattr(evaluate, "champion", True):
                raise ConfigError(f"rule {rule.name or rule.suite!r} asks for a champion, and {self.evaluation} does not compare with it",
                                  remedy=f"set `champion: true` in {self.evaluation}, or `required: false` in the rule")

    def run(self, ctx: StageContext) -> None:
        from ftpipe.evaluate.rules import judge

        evaluation = ctx.inputs[self.evaluation]
        about = evaluation.json("evaluation.json")
        verdict: dict[str, Any] = judge(self.rules, evaluation.json("comparisons.json"), about, self.correction, above_noise=self.above_noise,
                                        parted=lambda *of: _parted(evaluation, about, *of)) | {
            "candidate": about["candidate"]["stage"], "content": about["candidate"]["content"], "evaluation": evaluation.content}
        (ctx.out / "verdict.json").write_text(json.dumps(verdict, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        ctx.meta["passed"] = verdict["passed"]
        for rule in verdict["rules"]:
            ctx.log.info("%s: %s", rule["name"], rule["text"])
        ctx.log.info("the candidate %s", "passed" if verdict["passed"] else "is refused")


def _parted(evaluation: Artifact, about: dict[str, Any], suite: str, metric: str, other: str, way: Way) -> dict[str, dict[str, Any]]:
    import pyarrow.parquet as pq

    from ftpipe.evaluate.compare import part_comparisons

    return part_comparisons(pq.read_table(evaluation.file("items.parquet")), suite, metric, "adapter", other, way, **about["statistics"])
