"""Slots and methods: one file in a slot's folder is one method.

A slot is a package of ftpipe with a `base.py`; its name is the package's path (`train/adapt`). `base.py` defines the slot's
abstract base, a subclass of `Method`. Each other module of the package that does not start with an underscore holds one concrete
subclass, and the module's name is the method's name in YAML: `sensitivity_sampling: {clusters: 64}`.

Nothing is registered by hand. Three more sources of methods exist: an installed package may declare an entry point in the group
`ftpipe.<slot with dots>` (`ftpipe.train.adapt`), whose name is the method's name; and a slot's base module may define
`extra_methods() -> dict[str, Callable[[], type[Method]]]` for a whole family that another library already describes.

Method modules must import heavy libraries (torch, transformers, sklearn) inside functions: `ftpipe methods` imports them all.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from ftpipe.errors import ConfigError, nearest

ROOT = Path(__file__).parent


class Method(BaseModel):
    """A method with its hyperparameters. The fields are what the YAML may set; unknown keys are errors.

    Class attributes:
        slot: the slot's name, set by the slot's base.
        paper: exact catalogue title of the paper the method comes from, several titles, or None for plain engineering.
        needs: what a method asks of its surroundings, e.g. `("gpu",)`, `("preference rows",)`; shown by `ftpipe methods`.
        libraries: distributions whose version can change the method's result; they enter the stage key.
        support: ftpipe modules whose code decides the result but which are not imported by name from this module.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    slot: ClassVar[str] = ""
    paper: ClassVar[str | tuple[str, ...] | None] = None
    needs: ClassVar[tuple[str, ...]] = ()
    libraries: ClassVar[tuple[str, ...]] = ()
    support: ClassVar[tuple[str, ...]] = ()
    method_name: ClassVar[str] = ""

    @classmethod
    def name(cls) -> str:
        """The name this method has in YAML."""
        return cls.method_name or cls.__module__.rpartition(".")[2]

    def dump(self) -> dict[str, Any]:
        """`{name: {field: value}}`, the YAML form, with every default written out."""
        return {self.name(): self.model_dump(mode="json")}


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from error
    return value


Pattern = Annotated[str, AfterValidator(_compiles)]
"""Type of a field that holds a regular expression; one that does not compile is refused when the setting is read."""


class InvalidMethod(ValueError):
    """Wraps the validation error of a nested method so that its field locations are not lost."""

    def __init__(self, cls: type[Method], error: ValidationError):
        super().__init__(str(error))
        self.cls, self.error = cls, error


@dataclass(frozen=True)
class Slot:
    """One slot: the package that holds its methods, and its abstract base."""

    name: str

    @property
    def package(self) -> str:
        return "ftpipe." + self.name.replace("/", ".")

    @property
    def folder(self) -> Path:
        return ROOT / self.name

    def base(self) -> type[Method]:
        """The slot's abstract base: the class of `base.py` that states this slot's name."""
        module = importlib.import_module(self.package + ".base")
        return next(c for c in _classes(module) if c.__dict__.get("slot") == self.name)

    def files(self) -> list[str]:
        """Method names that are modules of the slot's package."""
        return [m.name for m in pkgutil.iter_modules([str(self.folder)]) if m.name != "base" and not m.name.startswith("_") and not m.ispkg]

    def _others(self) -> dict[str, Callable[[], type[Method]]]:
        module = importlib.import_module(self.package + ".base")
        found: dict[str, Callable[[], type[Method]]] = {}
        found.update(getattr(module, "extra_methods", dict)())
        found.update({e.name: e.load for e in entry_points(group=self.package)})
        return found

    def refused(self) -> dict[str, str]:
        """Names that a user may expect here, and why they are not offered: what the base module's `refused_methods() -> dict[str, str]` says."""
        return getattr(importlib.import_module(self.package + ".base"), "refused_methods", dict)()

    def names(self) -> list[str]:
        """Every method name of the slot, from files, the base's family and other packages."""
        return sorted({*self.files(), *self._others()})

    def get(self, name: str) -> type[Method]:
        """The method class called `name`. Raises ConfigError with the nearest match for an unknown one."""
        if name in self.files():
            module = importlib.import_module(f"{self.package}.{name}")
            base = self.base()
            own = [c for c in _classes(module) if issubclass(c, base) and c is not base and not inspect.isabstract(c)]
            if len(own) != 1:
                raise ConfigError(f"{module.__name__} must define exactly one {base.__name__}, found {len(own)}")
            return own[0]
        others = self._others()
        if name not in others:
            if why := self.refused().get(name):
                raise ConfigError(f"{name!r} is not offered in slot {self.name}: {why}", remedy=nearest(name, self.names()))
            raise ConfigError(f"no method {name!r} in slot {self.name}", remedy=nearest(name, self.names()))
        cls = others[name]()
        if not (inspect.isclass(cls) and issubclass(cls, self.base())):
            raise ConfigError(f"method {name!r} of slot {self.name} is not a {self.base().__name__}")
        if not cls.method_name and cls.name() != name:
            cls.method_name = name
        return cls


def _classes(module: Any) -> Iterator[type[Method]]:
    for value in vars(module).values():
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__:
            yield value


@lru_cache
def slots() -> dict[str, Slot]:
    """Every slot by name, found by looking for `base.py` files."""
    names = (p.parent.relative_to(ROOT).as_posix() for p in sorted(ROOT.glob("**/base.py")))
    return {name: Slot(name) for name in names}


def find(family: str, name: str) -> type[Method]:
    """The method `name` in the slot `family`, or in any slot below it (`curate` holds `curate/select`, `curate/dedup`, ...)."""
    members = [s for s in slots().values() if s.name == family or s.name.startswith(family + "/")]
    for slot in members:
        if name in slot.files():
            return slot.get(name)
    for slot in members:
        if name in slot.names():
            return slot.get(name)
    for slot in members:
        if name in slot.refused():
            return slot.get(name)
    known = [n for s in members for n in s.names()]
    raise ConfigError(f"no method {name!r} in {family}", remedy=nearest(name, known))


def parse(family: str, value: Any) -> Method:
    """A method from its YAML form: `name`, `{name: {field: value}}`, or a method object already."""
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        value = {value: None}
    if not (isinstance(value, dict) and len(value) == 1):
        raise ValueError(f"write one method of {family} as `name` or `name: {{...}}`, got {value!r}")
    (name, fields), = value.items()
    if fields is not None and not isinstance(fields, dict):
        raise ValueError(f"the settings of {name} must be `key: value` pairs, got {fields!r}")
    try:
        cls = find(family, str(name))
    except ConfigError as error:
        raise ValueError(f"{error.what}; {error.remedy}") from error
    try:
        return cls(**(fields or {}))
    except ValidationError as error:
        raise InvalidMethod(cls, error) from error


def choose(family: str) -> Any:
    """The annotation of a pydantic field that holds one method of `family`: `adapt: choose("train/adapt") = Lora()`."""
    return Annotated[
        Method,
        BeforeValidator(lambda value: parse(family, value)),
        PlainSerializer(lambda method: method.dump(), return_type=dict),
    ]
