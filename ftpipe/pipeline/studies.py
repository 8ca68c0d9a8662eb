"""Pipelines that are experiments: written from a user's own pipeline, so that they can be read, changed, scheduled and resumed like any other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ftpipe import slots
from ftpipe.errors import ConfigError, nearest
from ftpipe.pipeline import spec
from ftpipe.stages.train import ENDS, Train

HEADER = """\
# {what}, from {source}. Written by `{command}`.
# It is a pipeline like any other: read it, change it, and run it (again) with
#   ftpipe run {name} --to {last}

"""
CONTROLS = {"random": "random", "length_matched": "length_matched_random"}
"""Arms that every selection must beat, and the selectors that draw them."""


def prove(path: Path, selections: list[str], *, train: str | None = None, evaluation: str | None = None, pool: str | None = None, seeds: int = 3,
          everything: bool = False) -> dict[str, Any]:
    """The pipeline that trains on each selection, on random rows and on random rows of the same lengths, of equal tokens, with several seeds.

    Args:
        path: the pipeline that has the selections.
        selections: curate stages that end in what is to be proved; their tokens should be equal, since the first one's are the controls' budget.
        train: train stage whose settings are used; the one that reads the first selection by default.
        evaluation: evaluate stage whose rows and suites are used; the only one by default.
        pool: stage that the controls draw from; what the first selection starts from by default.
        seeds: trainings of each arm. Selections and controls that draw are drawn anew for each.
        everything: another arm trains on the whole pool.

    Raises:
        ConfigError: for names that are no stages of the right kind, or not to be guessed.
    """
    given = _Given(path)
    chosen = [given.stage(name, "curate") for name in selections]
    pool = pool or chosen[0]["rows"]
    given.exists(pool)
    settings = given.training(train, selections[0])
    stages: dict[str, Any] = {}
    arms: dict[str, list[str]] = {}

    def trained(arm: str, rows: str, seed: int) -> None:
        name = f"prove_{arm}_{seed}"
        stages[name] = settings | {"kind": "train", "rows": rows, "seed": seed}
        arms.setdefault(arm, []).append(name)

    for seed in given.seeds(seeds):
        drawn = []
        for name, stage in zip(selections, chosen):
            rows = name
            if seed != given.seed and given.draws(name):
                rows = f"prove_{name}_rows_{seed}"
                stages[rows] = stage | {"kind": "curate", "seed": seed}
            drawn.append(rows)
            trained(name, rows, seed)
        for arm, method in CONTROLS.items():
            rows = f"prove_{arm}_rows_{seed}"
            stages[rows] = {"kind": "curate", "rows": pool, "seed": seed, "steps": [{method: {"budget": {"like": drawn[0]}}}]}
            trained(arm, rows, seed)
        if everything:
            trained("everything", pool, seed)
    study = {"against": list(CONTROLS), "selection": {name: name for name in selections}, "pool": pool}
    return given.study("prove", stages, arms, evaluation, study)


def compare(path: Path, train: str, arms: dict[str, dict[str, Any]], *, evaluation: str | None = None, seeds: int = 1, seconds: float | None = None,
            parameters: int | None = None) -> dict[str, Any]:
    """The pipeline that trains one stage in several ways: the same rows in the same order, as many steps or as many seconds.

    Args:
        path: the pipeline that has the stage.
        train: the train stage.
        arms: by arm, settings that replace the stage's; every other arm is compared with the first.
        evaluation, seeds: as in `prove`.
        seconds: train each arm for so many seconds of steps, in place of the stage's own end.
        parameters: give each arm the rank or width that trains as near as possible to so many parameters; what was chosen is in the study's `budget`.
    """
    given = _Given(path)
    settings = given.stage(train, "train")
    if seconds is not None:
        for arm, changes in arms.items():
            if own := sorted(set(changes) & set(ENDS)):
                raise ConfigError(f"arm {arm} sets {own[0]}, and all arms are to train for {seconds:g} seconds", remedy=f"leave {own[0]} out of the arm")
        settings = {k: v for k, v in settings.items() if k not in ENDS} | {"seconds": seconds}
    arms = {arm: settings | changes for arm, changes in arms.items()}
    sizes: dict[str, str] = {}
    if parameters is not None:
        for arm, own in arms.items():
            arms[arm], sizes[arm] = given.sized(arm, own, parameters)
    stages, made = {}, {}
    for seed in given.seeds(seeds):
        for arm, own in arms.items():
            name = f"compare_{arm}_{seed}"
            stages[name] = own | {"kind": "train", "seed": seed}
            made.setdefault(arm, []).append(name)
    asked = {"seconds": seconds, "parameters": parameters, "sizes": sizes}
    budget = {"budget": {k: v for k, v in asked.items() if v}} if any(asked.values()) else {}
    return given.study("compare", stages, made, evaluation, {"against": [next(iter(arms))]} | budget)


def write(data: dict[str, Any], out: Path, source: Path, *, what: str, command: str) -> str:
    """Write an experiment beside the pipeline it extends. Returns the name of its last stage. Raises ConfigError for a pipeline that cannot work."""
    last = next(reversed(data["stages"]))
    data = {"extends": os.path.relpath(source, out.parent), **data}
    text = HEADER.format(what=what, source=source.name, command=command, name=out, last=last) + yaml.safe_dump(data, sort_keys=False, width=160)
    new = out.with_name(f".{out.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        spec.load(new).check()
        new.replace(out)
    finally:
        new.unlink(missing_ok=True)
    return last


class _Given:
    """The user's pipeline as it is written, and what can be guessed from it."""

    def __init__(self, path: Path):
        self.path = path
        self.pipeline = spec.load(path)
        self.raw: dict[str, dict[str, Any]] = {str(n): dict(f or {}) for n, f in spec.read(path)["stages"].items()}
        self.seed = self.pipeline.settings.seed

    def seeds(self, n: int) -> Iterable[int]:
        return range(self.seed, self.seed + n)

    def exists(self, name: str) -> None:
        if name not in self.raw and name not in self.pipeline.stages:
            raise ConfigError(f"no stage {name!r}", where=str(self.path), remedy=nearest(name, self.raw))

    def draws(self, name: str) -> bool:
        """Whether a chain of curation has a step that uses the seed, so that another seed chooses other rows."""
        return any(self.pipeline.stages[step].step.uses_seed for step in self.pipeline.groups[name])

    def of_kind(self, kind: str) -> list[str]:
        return [name for name, fields in self.raw.items() if fields.get("kind", name) == kind]

    def stage(self, name: str, kind: str) -> dict[str, Any]:
        """A stage's settings as written, without its kind."""
        if name not in self.of_kind(kind):
            raise ConfigError(f"{name!r} is no {kind} stage", where=str(self.path), remedy=f"those of that kind are {', '.join(self.of_kind(kind)) or 'none'}")
        return {k: v for k, v in self.raw[name].items() if k != "kind"}

    def training(self, name: str | None, rows: str) -> dict[str, Any]:
        found = [name] if name else [n for n in self.of_kind("train") if self.raw[n].get("rows") == rows]
        if len(found) != 1:
            raise ConfigError(f"{len(found) or 'no'} train stages read {rows}", where=str(self.path),
                              remedy="name the one whose settings to use: --train STAGE")
        return self.stage(found[0], "train")

    def sized(self, arm: str, settings: dict[str, Any], parameters: int) -> tuple[dict[str, Any], str]:
        """A train stage's settings with the size of its method that trains nearest to `parameters`, and what was chosen."""
        from ftpipe.train.sizes import fitted, trainable

        model = settings.get("model") or self.pipeline.settings.model
        if not model:
            raise ConfigError("no base model is named", where=str(self.path), remedy="set `model:` at the top of the file or in the train stage")
        try:
            method = slots.parse("train/adapt", settings.get("adapt", Train.model_fields["adapt"].default))
        except ValueError as error:
            raise ConfigError(f"arm {arm}: {error}", where=str(self.path), remedy="`ftpipe methods train/adapt` lists what there is") from error
        found = fitted(method, parameters, lambda m: trainable(m, model, self.pipeline.env, seed=self.seed))
        return settings | {"adapt": found.method.dump()}, found.note

    def evaluation(self, name: str | None) -> dict[str, Any]:
        """The evaluation's settings, without the systems it compares and what only a report of one adapter shows."""
        found = [name] if name else self.of_kind("evaluate")
        if len(found) != 1:
            raise ConfigError(f"the pipeline has {len(found) or 'no'} evaluate stages", where=str(self.path), remedy="name one: --evaluation STAGE")
        kept = {k: v for k, v in self.stage(found[0], "evaluate").items() if k not in ("candidate", "controls", "registered_as", "alias")}
        return kept | {"kind": "evaluate", "champion": False, "examples": 0, "diagnostics": []}

    def study(self, word: str, stages: dict[str, Any], arms: dict[str, list[str]], evaluation: str | None, study: dict[str, Any]) -> dict[str, Any]:
        """The stages of the arms, and those that evaluate, compare and show them."""
        first, *others = [stage for made in arms.values() for stage in made]
        ask = self.evaluation(evaluation) | {"candidate": first, "controls": {name: name for name in others}}
        end = {f"{word}_evaluation": ask, f"{word}_study": {"kind": "study", "evaluation": f"{word}_evaluation", "arms": arms} | study,
               f"{word}_report": {"kind": "report", "studies": [f"{word}_study"], "title": f"{self.pipeline.name} · {word}"}}
        return {"stages": stages | end}

