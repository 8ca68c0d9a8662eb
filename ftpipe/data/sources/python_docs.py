"""The documentation of the Python installation itself, as questions and answers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import pkgutil
import platform
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import Field

from ftpipe.canonical import digest
from ftpipe.data.sources.base import Record, Source
from ftpipe.errors import ConfigError, DataError, nearest
from ftpipe.stages.base import Environment

STDLIB = "stdlib"
SKIPPED = frozenset({"antigravity", "this", "idlelib", "turtledemo", "lib2to3", "distutils", "test", "posix", "nt"})
"""Modules that do something when imported, demos and tests, what setuptools replaces (distutils); posix and nt are documented under `os`."""
TESTS = frozenset({"test", "tests", "testing", "idle_test", "conftest", "__main__"})
QUESTION = {"function": "What does `{call}` do in Python?", "method": "What does the method `{call}` do in Python?",
            "class": "What is the class `{call}` for in Python?"}
Kind = Literal["function", "method", "class"]


class PythonDocs(Source):
    """One row for each documented public function and class (and method, if `kinds` asks for them): a question, and its docstring as the answer.

    Modules are imported to be read, quietly; one that fails, prints or is private is passed over. Packages other than the standard library
    are imported only if `packages` names them. The top-level module is the group. The same qualified name appears once; the same docstring
    under two names appears twice and is left to curation. Content and order depend on the installed versions alone.
    """

    packages: list[str] = Field(default=[STDLIB], min_length=1, description="`stdlib`, and importable packages that are installed.")
    kinds: list[Kind] = Field(default=["function", "class"], min_length=1, description="What is asked about: function, class, method.")
    min_chars: int = Field(default=40, ge=1, description="Shortest docstring, in characters, that counts as an answer.")
    max_chars: int = Field(default=1200, ge=40, description="Longest answer in characters; whole paragraphs are kept up to it.")
    limit: int | None = Field(default=None, ge=1, description="Number of rows: a sample by hash, so that new modules do not change the others' lot.")
    seed: int = Field(default=0, ge=0, description="Seed of that sample.")

    def identity(self, env: Environment) -> dict[str, str]:
        found = {"python": f"{platform.python_implementation()} {platform.python_version()} {sys.platform}"}
        for package in sorted(set(self.packages)):
            found[package] = _files_hash(_roots(package), env.cache, package)
        return found

    def records(self, env: Environment) -> Iterator[Record]:
        rows = {name: (kind, call, answer) for name, kind, call, answer in self._documented()}
        names = list(rows)
        if self.limit is not None:
            if self.limit > len(names):
                raise DataError(f"limit is {self.limit}, but only {len(names)} names ({', '.join(self.kinds)}) have a docstring of {self.min_chars} characters",
                                where="python_docs", remedy="lower `limit`, or add to `packages` or `kinds`")
            chosen = set(sorted(names, key=self._draw)[: self.limit])
            names = [n for n in names if n in chosen]
        lines: dict[str, int] = {}
        for name in names:
            kind, call, answer = rows[name]
            module = name.split(".")[0]
            lines[module] = lines.get(module, 0) + 1
            yield Record(f"python:{module}", lines[module], raw={"prompt": QUESTION[kind].format(call=call), "completion": answer}, group=module,
                         meta={"name": name, "kind": kind})

    def _draw(self, name: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{self.seed}:{name}".encode()).digest(), name

    def _documented(self) -> Iterator[tuple[str, str, str, str]]:
        """(qualified name, kind, call, answer), sorted by name within each module, modules sorted."""
        seen = set()
        for package in sorted(set(self.packages)):
            for module in _modules(package):
                for name, kind, value in _members(module):
                    text = _docstring(value)
                    if kind in self.kinds and name not in seen and text and len(text) >= self.min_chars:
                        seen.add(name)
                        yield name, kind, _call(name, kind, value), shorten(text, self.max_chars)


def shorten(text: str, limit: int) -> str:
    """Whole paragraphs of `text` up to `limit` characters; of a longer first one, whole lines, then words."""
    for separator in ("\n\n", "\n", " "):
        parts = text.split(separator)
        kept, length = [], -len(separator)
        for part in parts:
            length += len(separator) + len(part)
            if length > limit:
                break
            kept.append(part)
        if short := separator.join(kept).strip():
            return short
    return text[:limit]


def _roots(package: str) -> list[Path]:
    """Files and folders that hold a package's code, found without importing it. Raises ConfigError if it is not installed."""
    if package == STDLIB:
        return [Path(sysconfig.get_path("stdlib"))]
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        from importlib.metadata import packages_distributions

        raise ConfigError(f"no package {package!r} can be imported", where="python_docs.packages",
                          remedy=f"install it, or {nearest(package, {STDLIB, *packages_distributions()})}")
    return [Path(p) for p in spec.submodule_search_locations or ([spec.origin] if spec.origin and Path(spec.origin).exists() else [])]


def _files_hash(roots: list[Path], cache: Path, package: str) -> str:
    """Hash of the source files' contents, remembered under a hash of their names, sizes and times (thousands of files: one entry, not one each)."""
    from ftpipe.canonical import file_digest
    from ftpipe.models.hashes import SETTLED
    from ftpipe.pipeline.store import write_atomic

    files = [(p.relative_to(root).as_posix() if p != root else p.name, p) for root in roots for p in _code(root)]
    stamps = digest([[name, *_stamp(path)] for name, path in files])
    entry = cache / "python_docs" / f"{package}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(entry.read_text(encoding="utf-8"))
        if known["stamps"] == stamps:
            return str(known["sha256"])
    sha256 = digest([[name, file_digest(path)] for name, path in files])
    if all(time.time() - path.stat().st_mtime > SETTLED for _, path in files):  # an edit within the clock's tick would go unseen
        write_atomic(entry, json.dumps({"stamps": stamps, "sha256": sha256}))
    return sha256


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _code(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    passed = TESTS | SKIPPED | {"__pycache__", "site-packages", "dist-packages"}
    found = []
    for folder, folders, names in root.walk() if hasattr(root, "walk") else _walk(root):
        folders[:] = sorted(f for f in folders if f not in passed and not f.startswith("config-"))
        found += [folder / n for n in sorted(names) if n.endswith((".py", ".so", ".pyd"))]
    return sorted(found)


def _walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    import os

    for folder, folders, names in os.walk(root):
        yield Path(folder), folders, names


def _modules(package: str) -> Iterator[ModuleType]:
    names = sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in SKIPPED) if package == STDLIB else [package]
    for name in names:
        yield from _import(name, required=package != STDLIB)


def _import(name: str, required: bool = False) -> Iterator[ModuleType]:
    """The module and its public submodules, sorted by name; nothing for one that fails or prints."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stdout(heard), contextlib.redirect_stderr(heard), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # a module may raise anything when it does not fit this system
        if required:
            raise DataError(f"package {name!r} cannot be imported: {type(error).__name__}: {error}", where="python_docs.packages") from error
        return
    if heard.getvalue():
        return
    yield module
    for child in sorted(m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []))):
        if not child.startswith("_") and child not in TESTS:
            yield from _import(f"{name}.{child}")


def _members(module: ModuleType) -> Iterator[tuple[str, Kind, Any]]:
    """What the module makes public: the names in `__all__`, and whatever public was defined in it."""
    declared = {n for n in getattr(module, "__all__", ()) if isinstance(n, str)}
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not (name in declared or getattr(value, "__module__", None) == module.__name__):
            continue
        if inspect.isclass(value):
            yield f"{module.__name__}.{name}", "class", value
            for method, entry in sorted(vars(value).items()):
                function = entry.__func__ if isinstance(entry, (staticmethod, classmethod)) else entry
                if not method.startswith("_") and inspect.isroutine(function):
                    yield f"{module.__name__}.{name}.{method}", "method", function
        elif inspect.isroutine(value):
            yield f"{module.__name__}.{name}", "function", value


def _docstring(value: Any) -> str:
    text = getattr(value, "__doc__", None)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", inspect.cleandoc(text)).strip() if isinstance(text, str) else ""


def _call(name: str, kind: str, value: Any) -> str:
    """`name(parameters)`, without annotations, and without defaults whose text could differ between runs."""
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (ValueError, TypeError, NameError):
        return name if kind == "class" else f"{name}()"
    if kind == "method" and parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    plain = [p.replace(annotation=p.empty, default=p.default if _simple(p.default) else ...) for p in parameters]
    try:
        text = str(inspect.Signature(plain)).replace("Ellipsis", "...")
    except ValueError:
        return f"{name}()"
    return f"{name}{text}" if len(text) <= 160 else f"{name}(...)"


def _simple(value: Any) -> bool:
    return value is inspect.Parameter.empty or value is None or type(value) in (bool, int, float) or (type(value) in (str, bytes) and len(value) <= 40)
