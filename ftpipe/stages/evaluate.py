"""Evaluate: base, candidate, controls and champion on the same items, item by item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ftpipe.artifacts import Artifact
from ftpipe.errors import ConfigError, DataError
from ftpipe.evaluate.suites.base import Suite
from ftpipe.evaluate.suites.general_text import GeneralText
from ftpipe.evaluate.suites.heldout_loss import HeldoutLoss
from ftpipe.registry.ledger import CHAMPION as CHAMPION_ALIAS
from ftpipe.registry.ledger import adapter_content, champion, champion_to_beat
from ftpipe.slots import choose
from ftpipe.stages.base import Environment, Ref, Stage, StageContext

if TYPE_CHECKING:
    from ftpipe.evaluate.diagnostics.base import Tuned
    from ftpipe.evaluate.systems import System

RESERVED = ("base", "adapter", "champion")


class Evaluate(Stage):
    """Scores the base model, the candidate adapter, the controls and the registered champion on the same items, and compares them in pairs.

    Every item's score is kept (`items.parquet`), and results are cached by system and item, so that the base is not asked again when only
    the adapter changed. The champion is the one the candidate has to beat: for an adapter that became champion through this very pipeline
    it is the one before it, so an unchanged second run has nothing to do.
    """

    produces: ClassVar[str] = "evaluation"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "scipy")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.models.service", "ftpipe.models.loading")

    rows: Ref = Field(description="Stage whose held-out rows are asked.")
    candidate: Ref = Field(description="Stage that makes the adapter to be judged.")
    controls: dict[str, Ref] = Field(default={}, description="Further adapters to compare with, by their name in the tables: {random: random_adapter}.")
    replicates: list[str] = Field(default=[], description="Controls that were trained as the candidate was, but for the seed: they show the noise floor.")
    model: str = Field(default="", description="Base model; the pipeline's by default.")
    seed: int | None = Field(default=None, description="Seed of the resampling and of the choice of examples; the pipeline's by default.")
    suites: list[choose("evaluate/suites")] = Field(default=[HeldoutLoss(), GeneralText()], min_length=1, description="What the systems are asked.")
    diagnostics: list[choose("evaluate/diagnostics")] = Field(default=["slices"], description="What else is looked at; decides nothing.")
    examples: int = Field(default=4, ge=0, le=200, description="Held-out questions that base and candidate answer, for the report.")
    max_new_tokens: int = Field(default=80, ge=1, le=4096, description="Longest answer of an example, in tokens.")
    champion: bool = Field(default=True, description="Compare with the registered champion too, if there is one.")
    registered_as: str = Field(default="", description="Name in the registry whose champion is meant; the pipeline's name by default.")
    alias: str = Field(default=CHAMPION_ALIAS, description="Alias of the version to beat.")
    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="Confidence of the intervals.")
    resamples: int = Field(default=2000, ge=100, le=1_000_000, description="Bootstrap resamples of each interval.")
    interval: Literal["bca", "percentile"] = Field(default="bca", description="Kind of bootstrap interval.")
    resample: Literal["items", "slices"] = Field(default="items", description="What is resampled: items, or whole slices (modules, documents): stricter.")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Type the models are run in.")

    @field_validator("controls")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if name in RESERVED:
                raise ValueError(f"a control cannot be called {name!r}; {', '.join(RESERVED)} are taken")
        return value

    @model_validator(mode="after")
    def _repeated(self) -> Evaluate:
        for name in self.replicates:
            if name not in self.controls or self.replicates.count(name) > 1:
                raise ValueError(f"`replicates` names {name!r}, which is {'named twice' if name in self.controls else 'no control'}")
        return self

    @field_validator("suites")
    @classmethod
    def _labels(cls, value: list[Suite]) -> list[Suite]:
        labels = [label for suite in value for label in suite.labels()]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"two suites are called {label!r}; give one of them a `label`")
        return value

    def externals(self, env: Environment) -> dict[str, Any]:
        from ftpipe.models.loading import identity

        files = {label: found for suite in self.suites if (found := suite.externals(env)) for label in suite.labels()[:1]}
        read = {diagnostic.name(): found for diagnostic in self.diagnostics if (found := diagnostic.externals(env))}
        return {"base": identity(self.model, env), "suites": files} | ({"diagnostics": read} if read else {})

    def input_externals(self, env: Environment, inputs: dict[str, Artifact]) -> dict[str, Any]:
        found = self._champion(env, inputs[self.candidate])
        return {"champion": found["content"] if found else None}

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        from ftpipe.models.loading import identity

        if not self.model:
            raise ConfigError("no base model is named", remedy="set `model` at the top of the pipeline")
        current = champion(env, self._name(env), self.alias) if self.champion else None
        if current is None:
            return
        who = f"{self._name(env)}@{self.alias} (version {current['version']})"
        if current["content"] is None:
            raise ConfigError(f"{who} was not made by ftpipe and cannot be compared with", remedy="move the alias, or set `champion: false`")
        base = identity(self.model, env)
        if current["base"] and any(current["base"].get(k) != base[k] for k in ("weights", "config")):
            raise ConfigError(f"{who} is an adapter for {current['base'].get('model')}, this pipeline trains {self.model}",
                              remedy="register under another name (`registered_as` here, `name` in register), or set `champion: false`")

    def _name(self, env: Environment) -> str:
        return self.registered_as or env.pipeline

    def _champion(self, env: Environment, candidate: Artifact) -> dict[str, Any] | None:
        return champion_to_beat(env, self._name(env), adapter_content(candidate), self.alias) if self.champion else None

    def run(self, ctx: StageContext) -> None:
        from ftpipe.evaluate.compare import comparisons, items_table, noise_floors, write_items
        from ftpipe.evaluate.examples import write_examples

        beaten = self._champion(ctx.env, ctx.inputs[self.candidate])
        adapters = self._adapters(ctx, beaten)
        systems = self._systems(ctx, beaten, adapters)
        found, examples = self._ask(ctx, systems)
        table = items_table(found)
        write_items(table, ctx.out / "items.parquet")
        how = {"confidence": self.confidence, "resamples": self.resamples, "seed": self.seed or 0, "method": self.interval,
               "by_slice": self.resample == "slices"}
        compared = comparisons(table, [s.name for s in systems], **how)
        if not compared:
            raise DataError("no item could be scored under any suite", where=ctx.name, remedy="look at the held-out rows: do they have answers?")
        _write(ctx.out / "comparisons.json", compared)
        write_examples(examples, ctx.out / "examples.parquet")
        noise = noise_floors(table, ["adapter", *self.replicates], confidence=self.confidence) if self.replicates else []
        _write(ctx.out / "evaluation.json", {
            "candidate": {"stage": self.candidate, "content": adapter_content(ctx.inputs[self.candidate])},
            "systems": {s.name: s.identity for s in systems}, "champion": beaten and {k: beaten[k] for k in ("name", "alias", "version", "content")},
            "registered_as": self._name(ctx.env), "alias": self.alias, "suites": {label: s.dump() for s in self.suites for label in s.labels()},
            "statistics": how, "replicates": self.replicates, "noise": noise,
            "forgetting": [label for s in self.suites if s.forgetting for label in s.labels()],
            "diagnostics": self._diagnose(ctx, table, compared, adapters)})
        for c in compared:
            if c["a"] == "adapter":
                ctx.log.info("%s %s: adapter %.4f, %s %.4f, better by %+.4f (%s to %s), %d items", c["suite"], c["metric"], c["mean_a"], c["b"], c["mean_b"],
                             c["difference"], *("unbounded" if c[e] is None else f"{c[e]:+.4f}" for e in ("low", "high")), c["n"])

    def _adapters(self, ctx: StageContext, beaten: dict[str, Any] | None) -> dict[str, Tuned]:
        """The candidate, the controls and the champion."""
        from ftpipe.evaluate.diagnostics.base import Tuned
        from ftpipe.registry.versions import load_version, training_of

        found = {}
        for name, ref in {"adapter": self.candidate, **self.controls}.items():
            artifact = ctx.inputs[ref]
            found[name] = Tuned(artifact.file("adapter"), artifact.json("train.json") if artifact.has("train.json") else {})
        if beaten is not None:
            folder = load_version(ctx.env, beaten["name"], beaten["version"])
            found["champion"] = Tuned(folder, training_of(folder))
            ctx.log.info("the champion to beat is version %d of %s", beaten["version"], beaten["name"])
        return found

    def _systems(self, ctx: StageContext, beaten: dict[str, Any] | None, adapters: dict[str, Tuned]) -> list[System]:
        """The base first, then the candidate, the controls and the champion."""
        from ftpipe.evaluate.systems import System
        from ftpipe.models.loading import default_device, identity
        from ftpipe.models.service import ModelService

        base = {k: v for k, v in identity(self.model, ctx.env).items() if k != "model"}
        same = {"base": base, "dtype": self.dtype, "device": default_device()}

        def system(name: str, content: str | None, folder: Path | None) -> System:
            return System(name, same | {"adapter": content},
                          lambda: ModelService.open(self.model, ctx.env, adapter=folder, dtype=self.dtype), ctx.env.cache / "generations")

        content = {name: adapter_content(ctx.inputs[ref]) for name, ref in {"adapter": self.candidate, **self.controls}.items()}
        if beaten is not None:
            content["champion"] = beaten["content"]
        return [system("base", None, None), *(system(name, content[name], tuned.folder) for name, tuned in adapters.items())]

    def _ask(self, ctx: StageContext, systems: list[System]) -> tuple[list[tuple], list[dict[str, Any]]]:
        """Ask every system everything, one system in memory at a time. Returns (system, item, score) and the answered examples."""
        from ftpipe.data.rows import RowSet
        from ftpipe.evaluate.examples import answer, choose_examples
        from ftpipe.evaluate.suites.base import Given
        from ftpipe.evaluate.systems import results

        rows = RowSet(ctx.inputs[self.rows])
        given = Given(rows, ctx.env, ctx.log)
        asked = [(suite, suite.items(given)) for suite in self.suites]
        questions = choose_examples(rows, self.examples, self.seed or 0)
        total = len(systems) * sum(len(items) for _, items in asked) + 2 * len(questions)
        found: list[tuple] = []
        answered: list[dict[str, Any]] = []
        done = fresh = 0

        def on_item(now: bool) -> None:
            nonlocal done, fresh
            done, fresh = done + 1, fresh + now
            ctx.progress(done, total, "items")

        speed: dict[str, Any] = {}
        for system in systems:
            try:
                for suite, items in asked:
                    found += [(system.name, item, score) for item, scores in results(system, suite, items, ctx.env.cache, on_item) for score in scores]
                if system.name in ("base", "adapter"):
                    answered += answer(system, questions, ctx.env.cache, self.max_new_tokens, on_item)
            finally:
                system.close()
            if system.seconds:
                speed[system.name] = {"tokens": system.tokens, "tokens_per_second": round(system.tokens / system.seconds, 2)}
        if speed:
            ctx.notes["generation"] = speed
        ctx.notes |= {"asked": fresh, "cached": total - fresh}
        ctx.log.info("%d answers and scores, %d of them known from before", total, total - fresh)
        return found, answered

    def _diagnose(self, ctx: StageContext, table: Any, compared: list[dict[str, Any]], adapters: dict[str, Tuned]) -> list[str]:
        """Ask every diagnostic, write what it found, and say which there were."""
        import pyarrow.parquet as pq

        from ftpipe.data.rows import RowSet
        from ftpipe.evaluate.diagnostics.base import Evidence

        rows = RowSet(ctx.inputs[self.rows])
        for diagnostic in self.diagnostics:
            name = diagnostic.name()
            evidence = Evidence(table, compared, self.model, adapters, ctx.env, ctx.log, lambda done, total, n=name: ctx.progress(done, total, n), rows)
            finding = diagnostic.diagnose(evidence)
            folder = ctx.out / "diagnostics"
            folder.mkdir(exist_ok=True)
            _write(folder / f"{name}.json", diagnostic.record(finding))
            if finding.table is not None:
                pq.write_table(finding.table, folder / f"{name}.parquet", compression="zstd")
            ctx.log.info("%s: %s", name, finding.words)
        return [diagnostic.name() for diagnostic in self.diagnostics]


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False), encoding="utf-8")
