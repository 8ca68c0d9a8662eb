"""From a YAML file to a checked pipeline: typed stages, references resolved, errors with line numbers."""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ftpipe import secrets, slots
from ftpipe.engines.local import Local
from ftpipe.errors import ConfigError, nearest
from ftpipe.stages.base import Environment, Stage, with_refs

Path_ = tuple[Any, ...]


class Settings(BaseModel):
    """What a pipeline file holds beside its stages."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="Name of the pipeline and of the model it registers: letters, digits, '-', '_' and '.'.")
    model: str = Field(default="", description="Base model: a hub id, a folder, a .gguf file, or package:NAME for one that a Python package ships.")
    seed: int = Field(default=0, ge=0, description="Seed of everything random, unless a stage sets its own.")
    workspace: str = Field(default=".ftpipe", description="Folder for everything that is written, relative to where ftpipe is started.")
    tracking: str | None = Field(default=None, description="MLflow tracking server; without it a SQLite file in the workspace. ${NAME} stands for an "
                                 "environment variable.")
    registry: str | None = Field(default=None, description="MLflow model registry; without it the tracking server. ${NAME} as in tracking.")
    engine: slots.choose("engines") = Field(default=Local(), description="Where curation's scanning work is done: `local`, or a Ray cluster, as in "  # type: ignore[valid-type]
                                            "{ray: {address: auto}}. It changes no result and no key.")
    notify: list[str] = Field(default_factory=list, description="Prefect notification blocks that are told when a run fails or the gate refuses a candidate, "
                              "such as slack-webhook/team.")
    stages: dict[str, Any] = Field(description="The stages by name.")

    @field_validator("name")
    @classmethod
    def _slug(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", value):
            raise ValueError("use letters, digits, '-', '_' and '.', starting with a letter or digit")
        return value

    @field_validator("notify")
    @classmethod
    def _blocks(cls, value: list[str]) -> list[str]:
        for target in value:
            if not re.fullmatch(r"[a-z0-9-]+/[a-z0-9-]+", target):
                raise ValueError(f"{target!r} names no Prefect block: write its type and its name, such as slack-webhook/team")
        return value


class Pipeline:
    """A checked pipeline.

    Attributes:
        settings: the file's top level.
        stages: every stage by name, chains expanded, in an order in which each comes after its inputs.
        groups: for a chain, its name and the names of the stages it was expanded to.
        env: workspace and servers.
        source: the file it was read from, None if it was built in memory.
    """

    def __init__(self, settings: Settings, stages: dict[str, Stage], groups: dict[str, list[str]], env: Environment, source: Path | None):
        self.settings, self.groups, self.env, self.source = settings, groups, env, source
        graph = {name: stage.refs() for name, stage in stages.items()}
        try:
            self.stages = {name: stages[name] for name in _stable_order(graph)}
        except CycleError as error:
            raise ConfigError(f"these stages wait for each other: {' -> '.join(error.args[1])}", where=str(source or "")) from None

    @property
    def name(self) -> str:
        return self.settings.name

    def check(self) -> None:
        """Look for what cannot work, in every stage, before any of them runs."""
        from ftpipe.registry import server

        server.check(self.env)
        for name, stage in self.stages.items():
            try:
                stage.check(self.env, self.stages)
            except ConfigError as error:
                raise type(error)(error.what, where=error.where or f"stage {name}", remedy=error.remedy) from error

    def resolve(self, name: str) -> str:
        """The full stage name for what a user typed: a name, a chain's name (its last stage), or an unambiguous last part."""
        if name in self.stages:
            return name
        if name in self.groups:
            return self.groups[name][-1]
        ends = [s for s in self.stages if s.split("/")[-1] == name]
        if len(ends) == 1:
            return ends[0]
        raise ConfigError(f"no stage {name!r}", remedy=nearest(name, self.stages))

    def upstream(self, name: str) -> set[str]:
        """`name` and every stage it depends on."""
        found, queue = set(), [name]
        while queue:
            current = queue.pop()
            if current not in found:
                found.add(current)
                queue.extend(self.stages[current].refs())
        return found

    def downstream(self, name: str) -> set[str]:
        """`name` and every stage that depends on it."""
        found = {name}
        for other, stage in self.stages.items():
            if found & set(stage.refs()):
                found.add(other)
        return found


def _stable_order(graph: dict[str, list[str]]) -> list[str]:
    """Topological order that follows the file's order where it can."""
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    rank, order, ready = {n: i for i, n in enumerate(graph)}, [], []
    while sorter.is_active():
        ready.extend(sorter.get_ready())
        ready.sort(key=rank.__getitem__)
        name = ready.pop(0)
        order.append(name)
        sorter.done(name)
    return order


def load(path: str | Path, *, overrides: dict[str, Any] | None = None) -> Pipeline:
    """Read and check a pipeline file.

    Args:
        path: the YAML file. Its key `extends` may name another file, relative to it, whose values it starts from; mappings are merged.
        overrides: values by dotted path (`{"stages.adapter.epochs": 2}`), set after reading.

    Raises:
        ConfigError: with file, line, field and remedy.
    """
    path = Path(path)
    data, lines = _read(path, ())
    for dotted, value in (overrides or {}).items():
        _set(data, dotted, value)
    return build(data, base=path.parent, source=path, lines=lines)


def read(path: str | Path) -> dict[str, Any]:
    """What a pipeline file holds, with what it extends, as plain data. Raises ConfigError if it cannot be read."""
    return _read(Path(path), ())[0]


def _read(path: Path, children: tuple[Path, ...]) -> tuple[Any, dict[Path_, str]]:
    """A file's data merged over the one it extends, and the place ("file:line") of each key and item."""
    if path.resolve() in children:
        raise ConfigError("the file extends itself", where=str(children[-1]))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        where, remedy = (str(children[-1]), f"it extends {path}") if children else (str(path), "`ftpipe init` writes a first configuration")
        raise ConfigError("no such file", where=where, remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path)) from error
    data, places = read_yaml(text, str(path))
    if isinstance(data, dict) and "extends" in data:
        parent, parent_places = _read(path.parent / str(data.pop("extends")), (*children, path.resolve()))
        return _merge(parent, data), parent_places | places
    return data, places


def _merge(old: Any, new: Any) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {k: _merge(old[k], v) if k in old else v for k, v in new.items()}
    return new


def build(data: dict[str, Any], *, base: Path = Path("."), source: Path | None = None, lines: dict[Path_, str] | None = None) -> Pipeline:
    """A pipeline from plain data (what the YAML holds). See `load` for errors."""
    lines, file = lines or {}, str(source) if source else "config"
    if not isinstance(data, dict):
        raise ConfigError("the file must hold `key: value` pairs", where=file)
    if (place := secrets.written_out(data)) is not None:
        raise ConfigError(f"{'.'.join(map(str, place))} holds a password", where=_at(file, lines, place),
                          remedy="give it to the environment; in `tracking` and `registry` write ${NAME} where it stood")
    data = {k: v for k, v in data.items() if not str(k).startswith("x-")}
    try:
        settings = Settings(**data)
    except ValidationError as error:
        raise _explain(error, Settings, (), lines, file) from error
    if not settings.stages:
        raise ConfigError("there are no stages", where=file)
    env = Environment(workspace=Path(settings.workspace).expanduser().absolute(), base=base.absolute(), pipeline=settings.name,
                      tracking_uri=_filled(settings.tracking, "tracking", lines, file), registry_uri=_filled(settings.registry, "registry", lines, file),
                      engine=settings.engine)
    written = {str(n): _stage(str(n), fields, settings, lines, file) for n, fields in settings.stages.items()}
    stages: dict[str, Stage] = {}
    groups: dict[str, list[str]] = {}
    for name, stage in written.items():
        parts = stage.expand(name)
        if list(parts) != [name]:
            groups[name] = list(parts)
        stages.update(parts)
    last = {group: names[-1] for group, names in groups.items()}
    stages = {name: with_refs(stage, lambda r: last.get(r, r)) for name, stage in stages.items()}
    for name, stage in stages.items():
        for ref in stage.refs():
            if ref not in stages:
                raise ConfigError(f"stage {name} reads {ref!r}, which is no stage", where=_at(file, lines, ("stages", name.split("/")[0])),
                                  remedy=nearest(ref, [*stages, *groups]))
    return Pipeline(settings, stages, groups, env, source)


def _filled(uri: str | None, key: str, lines: dict[Path_, str], file: str) -> str | None:
    try:
        return secrets.fill(uri) if uri else uri
    except KeyError as error:
        name = error.args[0]
        raise ConfigError(f"{key} names the environment variable {name}, which is not set", where=_at(file, lines, (key,)),
                          remedy=f"export {name}=...; `deploy/README.md` says where services get theirs from") from None


def _stage(name: str, fields: Any, settings: Settings, lines: dict[Path_, str], file: str) -> Stage:
    where = ("stages", name)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ConfigError(f"{name!r} cannot be a stage's name", where=_at(file, lines, where), remedy="use letters, digits, '-' and '_'")
    if not isinstance(fields, dict | None):
        raise ConfigError(f"stage {name} must hold `key: value` pairs", where=_at(file, lines, where))
    fields = dict(fields or {})
    kind = fields.pop("kind", name)
    try:
        cls = slots.slots()["stages"].get(str(kind))
    except ConfigError as error:
        hint = "" if "kind" in (settings.stages[name] or {}) else f"give stage {name} a `kind:`; "
        raise ConfigError(f"no kind of stage is called {kind!r}", where=_at(file, lines, where), remedy=f"{hint}{error.remedy}") from None
    for inherited in ("model", "seed"):
        if inherited in cls.model_fields and fields.get(inherited) in (None, ""):
            fields[inherited] = getattr(settings, inherited)
    try:
        return cls(**fields)  # type: ignore[return-value]
    except ValidationError as error:
        raise _explain(error, cls, where, lines, file) from error


def _explain(error: ValidationError, cls: type[BaseModel], prefix: Path_, lines: dict[Path_, str], file: str) -> ConfigError:
    """The first error of a validation in words, with the line of the nearest thing that has one."""
    first = error.errors()[0]
    where = prefix + tuple(first["loc"])
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, slots.InvalidMethod):
        return _explain(cause.error, cause.cls, (*where, cause.cls.name()), lines, file)
    field = ".".join(str(p) for p in where)
    if first["type"] == "extra_forbidden":
        owner = _model_at(cls, first["loc"][:-1])
        return ConfigError(f"unknown key {first['loc'][-1]!r} in {'.'.join(map(str, where[:-1])) or 'the file'}", where=_at(file, lines, where),
                           remedy=nearest(str(first["loc"][-1]), owner.model_fields))
    if first["type"] == "missing":
        return ConfigError(f"{field} is missing", where=_at(file, lines, where), remedy=f"set it ({_describe(cls, first['loc'])})")
    value = "" if isinstance(first.get("input"), (dict, list)) else f" (got {first.get('input')!r})"
    message = str(cause) if cause else first["msg"]
    return ConfigError(f"{field}: {message[:1].lower() + message[1:]}{value}", where=_at(file, lines, where),
                       remedy=_describe(cls, first["loc"]) or None)


def _model_at(cls: type[BaseModel], loc: Path_) -> type[BaseModel]:
    """The model class that a location inside `cls` belongs to, as far as annotations tell."""
    for part in loc:
        info = cls.model_fields.get(str(part))
        if info is None:
            continue
        for candidate in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                cls = candidate
                break
    return cls


def _describe(cls: type[BaseModel], loc: Path_) -> str:
    info = _model_at(cls, loc[:-1]).model_fields.get(str(loc[-1])) if loc else None
    return (info.description or "").rstrip(".") if info else ""


def _at(file: str, lines: dict[Path_, str], where: Path_) -> str:
    while where and where not in lines:
        where = where[:-1]
    return lines.get(where, file)


def read_yaml(text: str, file: str) -> tuple[Any, dict[Path_, str]]:
    """The file's data, and the place (file and line, from 1) of every key and item by its path. Raises ConfigError for bad YAML and repeated keys."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"not valid YAML: {getattr(error, 'problem', None) or error}", where=f"{file}:{mark.line + 1}" if mark else file) from error
    lines: dict[Path_, str] = {}
    if node is not None:
        _walk(node, (), lines, file)
    return data, lines


def _walk(node: yaml.Node, path: Path_, lines: dict[Path_, str], file: str) -> None:
    if isinstance(node, yaml.MappingNode):
        own = set()
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    _walk(merged, path, lines, file)
                continue
            if key.value in own:
                raise ConfigError(f"key {key.value!r} is written twice", where=f"{file}:{key.start_mark.line + 1}", remedy="keep one of them")
            own.add(key.value)
            lines[(*path, key.value)] = f"{file}:{key.start_mark.line + 1}"
            _walk(value, (*path, key.value), lines, file)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[(*path, i)] = f"{file}:{item.start_mark.line + 1}"
            _walk(item, (*path, i), lines, file)


def _set(data: Any, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for part in parents:
        data = data[int(part)] if isinstance(data, list) else data.setdefault(part, {})
    if isinstance(data, list):
        data[int(last)] = value
    else:
        data[last] = value
