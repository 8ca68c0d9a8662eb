"""Which code decides a stage's result, as hashes of syntax trees.

Comments, docstrings and layout do not count. The code of a stage is its own module, the modules of the methods it uses, and every module
of ftpipe that these import, directly or not; the machinery that only carries (command line, pipeline, report of errors) is left out.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

CARRIERS = ("ftpipe.pipeline", "ftpipe.cli", "ftpipe.errors", "ftpipe.slots", "ftpipe.artifacts", "ftpipe.canonical", "ftpipe.stages.base",
            "ftpipe.secrets", "ftpipe.engines")


def fingerprint(modules: Iterable[str]) -> dict[str, str]:
    """Hash (12 hex digits) of the syntax tree of each module reached from `modules`, by module name."""
    found: dict[str, str] = {}
    queue = list(modules)
    while queue:
        module = queue.pop()
        if module in found or any(module == c or module.startswith(c + ".") for c in CARRIERS):
            continue
        path = _file(module)
        if path is None:
            continue
        found[module], imported = _read(path, tuple(p.stat().st_mtime_ns for p in _sources(path)), module)
        queue.extend(imported)
    return dict(sorted(found.items()))


@lru_cache
def _file(module: str) -> Path | None:
    """A module's source file, found without importing its parents, some of which load torch."""
    try:
        spec = find_spec(module.split(".")[0])
    except (ImportError, ValueError):
        return None
    for end in range(2, len(module.split(".")) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join(module.split(".")[:end]), spec.submodule_search_locations)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _sources(path: Path) -> list[Path]:
    """A module's file, and the C code beside it whose names begin with its own."""
    return [path, *sorted(path.parent.glob(f"{path.stem}*.[ch]"))]


@lru_cache(maxsize=1024)
def _read(path: Path, mtimes: tuple[int, ...], module: str) -> tuple[str, tuple[str, ...]]:
    """Hash of a source file's meaning, and the ftpipe modules it imports anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [a.name for a in node.names if a.name.startswith("ftpipe.")]
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                parent = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [node.module])])
            if parent == "ftpipe" or parent.startswith("ftpipe."):
                imported += [parent, *(f"{parent}.{a.name}" for a in node.names)]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    text = "".join([ast.dump(tree, include_attributes=False), *(p.read_text(encoding="utf-8") for p in _sources(path)[1:])])
    return hashlib.sha256(text.encode()).hexdigest()[:12], tuple(dict.fromkeys(i for i in imported if i != "ftpipe"))


@lru_cache
def library(name: str) -> str:
    """Version of an installed distribution, `absent` if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
