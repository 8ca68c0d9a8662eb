"""Everything that a report may show, found by walking from a few artifacts to what they were made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ftpipe.artifacts import Artifact
from ftpipe.errors import ArtifactError
from ftpipe.report.funnel import present_inputs, row_path
from ftpipe.report.summary import summary

if TYPE_CHECKING:
    import pyarrow as pa


class RunData:
    """The artifacts of a run, inputs before what was made of them.

    Args:
        inputs: the artifacts to start from, by stage name.
        roles: which of them is the `evaluation`, `verdict`, `registration` and `adapter`; those left out are looked for, unless the page is about
            studies or data alone.
        studies, data: stage names of the studies and of the descriptions of rows to show.
        controls: stage names of the trainings that the adapter is compared with.
        pipeline: name of the pipeline.
    """

    def __init__(self, inputs: dict[str, Artifact], *, roles: dict[str, str | None], controls: Iterable[str] = (), studies: Iterable[str] = (),
                 data: Iterable[str] = (), pipeline: str = ""):
        self.pipeline = pipeline
        self.missing: list[str] = []
        self.artifacts = list(self._walk(inputs.values()))
        self._named = {a.name: a for a in self.artifacts} | dict(inputs)
        self.studies = [self._named[name] for name in studies]
        self.data = [self._named[name] for name in data]
        self._look = any(roles.values()) or not (self.studies or self.data)
        self.evaluation = self._role(roles.get("evaluation"), "comparisons.json", "items.parquet")
        self.verdict = self._role(roles.get("verdict"), "verdict.json")
        self.registration = self._role(roles.get("registration"), "registration.json")
        self.trainings = [a for a in self.artifacts if self._look and (a.has("metrics.parquet") or a.has("train.json"))]
        self.adapter = self._adapter(roles.get("adapter"))
        self.controls = self._controls(controls)

    @cached_property
    def summary(self) -> dict[str, Any]:
        return summary(self.evaluation, self.verdict, self.registration)

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the evaluation says of itself: `evaluation.json`."""
        return self.evaluation.json("evaluation.json") if self.evaluation and self.evaluation.has("evaluation.json") else {}

    @cached_property
    def path(self) -> list[Artifact]:
        """The stages that the adapter's rows came through, ingest first."""
        return rows_of(self.adapter) if self.adapter else self._longest()

    @cached_property
    def trained_ids(self) -> set[str]:
        """Row ids that the adapter was trained on."""
        if self.adapter and self.adapter.has("seen.parquet"):
            return {i for i, n in zip(*columns(self.adapter, "seen.parquet", "row_id", "times")) if n}
        if self.path and self.path[-1].has("kept.parquet"):
            return {i for i, split in zip(*columns(self.path[-1], "kept.parquet", "row_id", "split")) if split == "train"}
        return set()

    @cached_property
    def heldout_ids(self) -> set[str]:
        """Row ids of the held-out side, wherever rows were made."""
        return {i for a in self.artifacts if a.has("rows.parquet") for i, split in zip(*columns(a, "rows.parquet", "row_id", "split")) if split == "heldout"}

    def having(self, file: str) -> list[Artifact]:
        """Artifacts with a payload file of this name: those on the adapter's path first, nearest to ingest first."""
        on_path = [a for a in self.path if a.has(file)]
        return on_path + [a for a in self.artifacts if a.has(file) and a not in on_path]

    def _walk(self, roots: Iterable[Artifact]) -> Iterator[Artifact]:
        done: set[str] = set()
        stack = [(a, False) for a in reversed(list(roots))]
        while stack:
            artifact, expanded = stack.pop()
            if artifact.key in done:
                continue
            if expanded:
                done.add(artifact.key)
                yield artifact
                continue
            stack.append((artifact, True))
            for entry in reversed(artifact.manifest["inputs"].values()):
                try:
                    stack.append((artifact.load(entry["key"]), False))
                except ArtifactError:
                    self.missing.append(entry["name"])

    def _role(self, name: str | None, *files: str) -> Artifact | None:
        if name:
            return self._named[name]
        return next((a for a in reversed(self.artifacts) if any(a.has(f) for f in files)), None) if self._look else None

    def _adapter(self, name: str | None) -> Artifact | None:
        if name:
            return self._named[name]
        stated = params(self.evaluation).get("candidate") if self.evaluation else None
        return self._named.get(stated) or next((a for a in self.trainings if a.has("adapter")), None)

    def _controls(self, names: Iterable[str]) -> dict[str, Artifact]:
        """The controls by the name that the evaluation knows them under."""
        stated = params(self.evaluation).get("controls") if self.evaluation else None
        called = {stage: system for system, stage in stated.items()} if isinstance(stated, dict) else {}
        return {called.get(n, n): self._named[n] for n in (list(names) or list(called)) if n in self._named}

    def _longest(self) -> list[Artifact]:
        paths = [row_path(a) for a in self.artifacts if a.has("kept.parquet") or a.has("rows.parquet")]
        return max(paths, key=len, default=[])


def rows_of(artifact: Artifact) -> list[Artifact]:
    """The stages that the rows of a training (or of any stage) came through, ingest first."""
    if artifact.has("kept.parquet") or artifact.has("rows.parquet"):
        return row_path(artifact)
    inputs = present_inputs(artifact)
    wanted = params(artifact).get("rows")
    source = inputs.get(wanted) if isinstance(wanted, str) else None
    source = source or next((a for a in inputs.values() if a.has("kept.parquet") or a.has("rows.parquet")), None)
    if source is None:
        source = next(iter(inputs.values()), None)  # a merge or compression: its rows are those of the adapter it was made of
    return rows_of(source) if source else []


def params(artifact: Artifact | None) -> dict[str, Any]:
    """The settings a stage was run with."""
    return artifact.manifest.get("material", {}).get("params", {}) if artifact else {}


def seconds(artifact: Artifact) -> float | None:
    """How long the stage took when it was made."""
    value = artifact.manifest.get("notes", {}).get("seconds")
    return float(value) if isinstance(value, (int, float)) else None


def base_model(run: RunData) -> dict[str, Any]:
    """Identity of the base model: of the adapter, or the first that any stage read."""
    if run.adapter and run.adapter.has("adapter/ftpipe_adapter.json"):
        base = run.adapter.json("adapter/ftpipe_adapter.json").get("base")
        if isinstance(base, dict):
            return base
    for artifact in run.artifacts:
        externals = artifact.manifest.get("material", {}).get("externals", {})
        for model in (externals.get("model"), externals.get("base")):
            if isinstance(model, dict):
                return model
    return {}


def table(artifact: Artifact, file: str, names: Iterable[str] | None = None) -> pa.Table:
    """A Parquet file of an artifact, with those of the columns `names` that it has."""
    import pyarrow.parquet as pq

    path = artifact.file(file)
    wanted = None if names is None else [n for n in names if n in pq.read_schema(path).names]
    return pq.read_table(path, columns=wanted, use_threads=False)


def columns(artifact: Artifact, file: str, *names: str) -> list[list[Any]]:
    """Columns of a Parquet file as Python lists."""
    read = table(artifact, file, names)
    return [read[n].to_pylist() for n in names]
