"""The base of every stage kind, and what a stage is given when it runs."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel

from ftpipe.artifacts import DECISIONS, Artifact, decisions_schema
from ftpipe.engines.base import Engine
from ftpipe.engines.local import Local
from ftpipe.slots import Method

if TYPE_CHECKING:
    import pyarrow as pa


class RefMarker:
    """Marks a text field as the name of another stage, whose artifact becomes an input."""


Ref = Annotated[str, RefMarker()]
"""Type of a field that names another stage: `rows: Ref`. It may stand in nested methods, lists and dicts too."""


@dataclass
class Environment:
    """The surroundings that stages may read, but that are not part of any stage's own settings.

    workspace: folder of everything ftpipe writes. base: folder that relative paths of the configuration start from.
    pipeline: the pipeline's name. tracking_uri and registry_uri: MLflow servers, None for the workspace's own SQLite file.
    engine: where work is done that falls into pieces.
    """

    workspace: Path
    base: Path
    pipeline: str
    tracking_uri: str | None = None
    registry_uri: str | None = None
    engine: Engine = field(default_factory=Local)

    @property
    def cache(self) -> Path:
        """Folder of caches shared by all runs of the workspace (scores by row content, converted models)."""
        return self.workspace / "cache"

    def path(self, text: str) -> Path:
        """A path of the configuration, relative to the configuration's folder."""
        path = Path(text).expanduser()
        return path if path.is_absolute() else self.base / path


class Listener:
    """Hears what a stage does while it runs. The command line, Prefect and MLflow each subclass it; all methods may be left out."""

    def started(self, name: str, kind: str, key: str) -> None: ...

    def progress(self, name: str, done: float, total: float | None, unit: str, metrics: dict[str, float]) -> None: ...

    def metrics(self, name: str, values: dict[str, float], step: int) -> None: ...

    def finished(self, name: str, artifact: Artifact, reused: bool) -> None: ...

    def failed(self, name: str, error: BaseException) -> None: ...


@dataclass
class StageContext:
    """What a running stage may touch.

    Attributes:
        name: the stage's name in the pipeline.
        key: its key.
        out: empty folder for the payload; becomes the artifact when the stage returns. A kill throws it away.
        work: folder that outlives a kill and is there again when the same key is run again: checkpoints, partial scores.
        inputs: the input artifacts by the name used in the stage's `Ref` fields.
        env: workspace, caches, servers.
        log: logger; reaches the console, `log.txt` and Prefect.
        listener: hears progress and metrics.
        counts: whole numbers for the manifest (`rows_in`, `rows_kept`, `dropped: reason`); sums must add up.
        meta: JSON for readers of the artifact; part of its content hash, so no times and no paths of this machine.
        notes: JSON that is recorded but not part of the content (timings, throughput, hardware).
    """

    name: str
    key: str
    out: Path
    work: Path
    inputs: dict[str, Artifact]
    env: Environment
    log: logging.Logger
    listener: Listener
    counts: dict[str, int] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def progress(self, done: float, total: float | None = None, unit: str = "", **metrics: float) -> None:
        """Report progress; cheap enough to call for every batch."""
        self.listener.progress(self.name, done, total, unit, metrics)

    def decide(self, table: pa.Table) -> None:
        """Write `decisions.parquet`. `table` holds the columns of `decisions_schema()`; `step` may be left out, missing ones are null.

        Also fills `counts`: rows_in, rows_kept and one `dropped: <reason>` per reason.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        schema = decisions_schema()
        n = table.num_rows
        columns = []
        for f in schema:
            if f.name in table.column_names:
                columns.append(table.column(f.name).cast(f.type))
            elif f.name == "step":
                columns.append(pa.array([self.name] * n, f.type))
            else:
                columns.append(pa.nulls(n, f.type))
        table = pa.Table.from_arrays(columns, schema=schema)
        pq.write_table(table, self.out / DECISIONS, compression="zstd")
        self.counts["rows_in"] = n
        self.counts["rows_kept"] = pc.sum(table["kept"]).as_py() or 0
        dropped = table.filter(pc.invert(table["kept"]))
        for entry in dropped.group_by("reason").aggregate([("row_id", "count")]).to_pylist():
            self.counts[f"dropped: {entry['reason']}"] = entry["row_id_count"]


class Stage(Method):
    """Base of every stage kind.

    A subclass declares its settings as fields, its inputs as fields of type `Ref`, and writes `run`. The fields `model` and `seed`, where
    a stage has them, take the pipeline's value when the YAML leaves them out (declare them as `model: str = ""`, `seed: int | None = None`).
    """

    slot: ClassVar[str] = "stages"
    produces: ClassVar[str] = ""
    """What readers find in the artifact: `rows`, `adapter`, `evaluation`, `verdict`, `version` or `report`."""
    side_effects: ClassVar[bool] = False
    """True for a stage whose effect lies outside its artifact (registering); `still_true` then says whether it still holds."""

    def expand(self, name: str) -> dict[str, Stage]:
        """The stages this one stands for, by name, the last one under the name that others refer to it by. Itself, unless it is a chain."""
        return {name: self}

    def methods(self) -> Iterator[Method]:
        """Every method in this stage's settings, at any depth; their code and libraries enter the key."""
        yield from _nested(self, Method, skip_self=True)

    def refs(self) -> list[str]:
        """Names of the stages this one reads, in the order of its fields."""
        return list(dict.fromkeys(_refs(self)))

    def externals(self, env: Environment) -> dict[str, Any]:
        """Identity (hashes, as JSON) of what the stage reads from outside its inputs: source files, the base model, the champion.

        It must be fast, import nothing heavy, and raise ConfigError or DataError for what does not exist.
        """
        return {}

    def input_externals(self, env: Environment, inputs: dict[str, Artifact]) -> dict[str, Any]:
        """Like `externals`, for what can only be told once the inputs are known: the champion that this very candidate has to beat."""
        return {}

    def key_fields(self) -> dict[str, Any]:
        """The settings that enter the key. Leave out what cannot change the result (number of progress lines, device names)."""
        return self.model_dump(mode="json")

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        """Raise ConfigError for settings that cannot work, before anything of the pipeline runs. `pipeline` holds all stages by name."""

    def good_enough(self, last: Artifact, inputs: dict[str, Artifact], env: Environment) -> str | None:
        """Why the artifact this stage last had serves although its inputs changed (and nothing else did), or None to make it anew."""
        return None

    def still_true(self, artifact: Artifact, env: Environment) -> str | None:
        """For stages with side effects: why the artifact's effect no longer holds, or None."""
        return None

    @abstractmethod
    def run(self, ctx: StageContext) -> None:
        """Do the work: read `ctx.inputs`, write the payload below `ctx.out`, call `ctx.decide` where rows were decided on."""


def _nested(value: Any, kind: type, *, skip_self: bool = False) -> Iterator[Any]:
    if isinstance(value, kind) and not skip_self:
        yield value
    if isinstance(value, BaseModel):
        value = [getattr(value, f) for f in type(value).model_fields]
    elif isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _nested(item, kind)


def _refs(model: BaseModel) -> Iterator[str]:
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if value is None:
            continue
        if any(isinstance(m, RefMarker) for m in info.metadata) or _marks(info.annotation):
            yield from _named(value)
        else:
            for child in _nested(value, BaseModel):
                yield from _refs(child)


def _named(value: Any) -> Iterator[str]:
    """The names in a field that holds references: one, or lists and dicts of them."""
    if isinstance(value, str):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _named(item)


def _renamed(value: Any, rename: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return rename(value)
    return {k: _renamed(v, rename) for k, v in value.items()} if isinstance(value, dict) else [_renamed(v, rename) for v in value]


def _marks(annotation: Any) -> bool:
    """Whether a type such as `Ref | None`, `list[Ref]` or `dict[str, Ref]` holds a reference."""
    if any(isinstance(m, RefMarker) for m in getattr(annotation, "__metadata__", ())):
        return True
    return any(_marks(a) for a in getattr(annotation, "__args__", ()))


def with_refs(stage: Stage, rename: Callable[[str], str]) -> Stage:
    """A copy of `stage` whose references are passed through `rename` (chains rename the stage that stands for them)."""
    return _rename(stage, rename)


def _rename(value: Any, rename: Callable[[str], str]) -> Any:
    if isinstance(value, BaseModel):
        changes = {}
        for name, info in type(value).model_fields.items():
            old = getattr(value, name)
            if old is not None and (any(isinstance(m, RefMarker) for m in info.metadata) or _marks(info.annotation)):
                new = _renamed(old, rename)
            else:
                new = _rename(old, rename)
            if new != old:
                changes[name] = new
        return value.model_copy(update=changes) if changes else value
    if isinstance(value, dict):
        return {k: _rename(v, rename) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rename(v, rename) for v in value)
    return value
