"""WiSE-FT (Wortsman et al. 2022): a model between the base and the tuned one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from ftpipe.errors import ConfigError
from ftpipe.evaluate.suites.general_text import GeneralText
from ftpipe.evaluate.suites.heldout_loss import HeldoutLoss
from ftpipe.merge.base import Merger
from ftpipe.slots import choose
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given


class WiseFt(Merger):
    """`W = (1 - alpha) W_base + alpha W_tuned` for every weight that was tuned, norms and embeddings too; alpha 1 is the tuned model bit for bit.

    A LoRA is interpolated by scaling B alone: scaling A and B both would give alpha squared. With `rows` the artifact lists the score of every suite at
    each alpha of `sweep` and says where a suite that measures forgetting does better than the tuned model; choosing alpha by it is choosing on
    that data. The interpolation by Fisher information is left out.
    """

    paper: ClassVar[str] = "Robust fine-tuning of zero-shot models"
    keeps_rank: ClassVar[bool] = True

    alpha: float = Field(default=0.5, ge=0, le=1, description="Share of the tuned model; 0.5 is the paper's choice where nothing tells better.")
    rows: Ref | None = Field(default=None, description="Stage whose held-out rows the models of the sweep are asked.")
    sweep: list[float] = Field(default=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], description="Alphas that are scored, if rows are given.")
    suites: list[choose("evaluate/suites")] = Field(default=[HeldoutLoss(), GeneralText()], min_length=1, description="What is asked at each alpha.")

    @field_validator("sweep")
    @classmethod
    def _shares(cls, value: list[float]) -> list[float]:
        if any(not 0 <= a <= 1 for a in value):
            raise ValueError("an alpha lies between 0 and 1")
        return value

    @model_validator(mode="after")
    def _distinct(self) -> WiseFt:
        labels = [label for suite in self.suites for label in suite.labels()]
        if len(labels) != len(set(labels)):
            raise ValueError("two suites have one name; give one of them a `label`")
        return self

    def check(self, given: Given) -> None:
        super().check(given)
        if len(given.adapters) != 1:
            raise ConfigError(f"wise_ft is between the base and one adapter, {len(given.adapters)} are given", remedy="merge them first, by another method")

    def prepare(self, given: Given) -> Any:
        given.said["alpha"] = self.alpha
        if self.rows is None:
            return
        from ftpipe.merge._judge import Judge, plain

        judge = Judge(given, self.rows, list(self.suites))
        adapter, = given.adapters
        alphas = sorted({*self.sweep, 1.0})
        found = {}
        for done, alpha in enumerate(alphas):
            found[alpha] = judge.means({adapter: alpha})["selection"]
            given.progress(done + 1, len(alphas), "alphas")
        guarded = [label for suite in self.suites if suite.forgetting for label in suite.labels()]
        given.said["sweep"] = [{"alpha": alpha, **plain({"scores": scores}),
                                "forgets_less": {label: all(m.up > found[1.0][label][k].up for k, m in scores[label].items()) for label in guarded}}
                               for alpha, scores in found.items()]

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        part, = parts.values()
        return part.times(self.alpha)
