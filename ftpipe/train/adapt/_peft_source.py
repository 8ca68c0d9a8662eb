"""The settings of PEFT's tuners, read from PEFT's source.

Each tuner's configuration is a dataclass in `peft/tuners/<name>/config.py`. The source is parsed and neither imported nor run: importing PEFT takes
seconds, and `ftpipe methods` lists everything. Of Python's annotations those are understood that settings are written in (plain types, lists,
dictionaries, unions, literals, and the enumerations and aliases that the same file defines); a field of any other type is left to PEFT's default.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import lru_cache, reduce
from importlib.util import find_spec
from operator import or_
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from pydantic_core import PydanticUndefined

PLAIN: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict, "tuple": tuple, "List": list, "Dict": dict,
                         "Tuple": tuple, "Any": Any, "None": None}
PROMPT = "PromptLearningConfig"


class NotPlain(Exception):
    """A type or default that is no setting one could write in YAML."""


@dataclass(frozen=True)
class Config:
    """One configuration class: the node, and what its file defines beside it (enumerations and aliases of types, by name)."""

    node: ast.ClassDef
    known: dict[str, ast.expr | ast.ClassDef]

    @property
    def bases(self) -> list[str]:
        return [b.id for b in self.node.bases if isinstance(b, ast.Name)]


@lru_cache
def _read(path: Path) -> dict[str, Config]:
    """The classes of one source file."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    known: dict[str, ast.expr | ast.ClassDef] = {n.name: n for n in body if isinstance(n, ast.ClassDef)}
    known |= {n.targets[0].id: n.value for n in body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
    known |= {n.target.id: n.value for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and n.value is not None}
    return {n.name: Config(n, known) for n in body if isinstance(n, ast.ClassDef)}


@lru_cache
def _classes() -> dict[str, Config]:
    """Every class of PEFT's configuration files by name."""
    spec = find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(spec.submodule_search_locations[0])
    return {name: c for path in (root / "config.py", root / "tuners" / "lycoris_utils.py", *sorted(root.glob("tuners/*/config.py")))
            for name, c in _read(path).items()}


@lru_cache
def tuners() -> dict[str, str]:
    """PEFT's name of each tuner -> the name of its configuration class."""
    spec = find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        return {}
    found = {}
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("tuners/*/config.py")):
        configs = [c for c in _read(path) if c in _classes() and "PeftConfig" in lineage(c)[1:]]
        if configs:
            found[path.parent.name] = configs[0]
    return found


def lineage(name: str) -> list[str]:
    """A configuration class and those it inherits from, nearest first, as far as PEFT defines them."""
    config = _classes().get(name)
    return [name] + [a for b in (config.bases if config else ()) for a in lineage(b)]


def described(name: str) -> str:
    """What the class says about itself, in one paragraph."""
    doc = ast.get_docstring(_classes()[name].node) or f"PEFT's {name}."
    return " ".join(doc.split("\n\n")[0].split())


def fields(name: str, leave_out: set[str]) -> dict[str, tuple[Any, Any]]:
    """Type and pydantic field of each setting of a class and of those it inherits from, but for those of `PeftConfig`."""
    found: dict[str, tuple[Any, Any]] = {}
    for cls in reversed(lineage(name)):
        config = _classes().get(cls)
        if config is None or cls in ("PeftConfig", "PeftConfigMixin"):
            continue
        for node in config.node.body:
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id in leave_out:
                continue
            try:
                found[node.target.id] = _field(node, config.known)
            except NotPlain:
                found.pop(node.target.id, None)
    return found


def _type(node: ast.expr, known: dict[str, Any]) -> Any:
    """The type that an annotation means."""
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name) if name in PLAIN:
            return PLAIN[name]
        case ast.Name(id=name) if name in known:
            return _defined(known[name], known)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _union([_type(left, known), _type(right, known)])
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _union([_type(inner, known), None])
        case ast.Subscript(value=ast.Name(id="Union"), slice=inner):
            return _union([_type(n, known) for n in (inner.elts if isinstance(inner, ast.Tuple) else [inner])])
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return Literal[tuple(_value(n, known) for n in (inner.elts if isinstance(inner, ast.Tuple) else [inner]))]
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if PLAIN.get(name) in (list, dict, tuple):
            of = tuple(_type(n, known) for n in (inner.elts if isinstance(inner, ast.Tuple) else [inner]))
            return PLAIN[name][of if len(of) > 1 else of[0]]
    raise NotPlain(ast.unparse(node))


def _defined(node: ast.expr | ast.ClassDef, known: dict[str, Any]) -> Any:
    """The type behind a name of the file: an alias, or the values of an enumeration."""
    if not isinstance(node, ast.ClassDef):
        return _type(node, known)
    values = [_value(n.value, known) for n in node.body if isinstance(n, ast.Assign)]
    if not values or "Enum" not in ast.unparse(node):
        raise NotPlain(node.name)
    return Literal[tuple(values)]


def _union(types: list[Any]) -> Any:
    # `Union[SomeEnum, str]` is how PEFT writes "one of these names".
    if any(getattr(t, "__origin__", None) is Literal for t in types):
        types = [t for t in types if t is not str]
    return reduce(or_, types)


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    """The plain value of an expression: a literal, or a member of an enumeration."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and isinstance(cls := known.get(node.value.id), ast.ClassDef):
        for member in cls.body:
            if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name) and member.targets[0].id == node.attr:
                return _value(member.value, known)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError) as error:
        raise NotPlain(ast.unparse(node)) from error


def _field(node: ast.AnnAssign, known: dict[str, Any]) -> tuple[Any, Any]:
    annotation, help_text = _type(node.annotation, known), ""
    default, factory = node.value, None
    if isinstance(node.value, ast.Call):
        given = {k.arg: k.value for k in node.value.keywords}
        if "init" in given:
            raise NotPlain("set by PEFT itself")
        default, factory = given.get("default"), given.get("default_factory")
        help_text = _help(given.get("metadata"))
    what: dict[str, Any] = {"description": help_text or "See PEFT's documentation."}
    if factory is not None:
        what["default_factory"] = _type(factory, known)
    else:
        what["default"] = _value(default, known) if default is not None else PydanticUndefined
        annotation = annotation | None if what["default"] is None else annotation
    return annotation, Field(**what)


def _help(node: ast.expr | None) -> str:
    try:
        text = ast.literal_eval(node)["help"] if node is not None else ""
    except (ValueError, KeyError, TypeError, SyntaxError):
        return ""
    return " ".join((text if isinstance(text, str) else "".join(text)).split())
