"""PEFT's other tuners as methods, read from PEFT's own source.

Each tuner's configuration is a dataclass in `peft/tuners/<name>/config.py`. Its fields, with types, defaults and help, become the method's
fields. The source is parsed and not imported, because importing PEFT takes seconds and `ftpipe methods` lists everything; the tuner itself is
imported when it is used.
"""

from __future__ import annotations

import ast
import typing
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, create_model

from ftpipe.errors import ConfigError
from ftpipe.slots import Method
from ftpipe.train.adapt._peft import PeftAdapt
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

SET_BY_US = {"inference_mode", "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "runtime_config"}
NOT_ALONE = {"lora": "has a file of its own", "xlora": "mixes trained adapters", "mixed": "mixes trained adapters", "poly": "asks for task ids",
             "adalora": "needs the gradients of each step", "multitask_prompt_tuning": "asks for task ids", "trainable_tokens": "asks for token ids",
             "cartridge": "needs a cache made by another model"}
OWN_TARGETS = {"ia3", "ln_tuning", "adaption_prompt", "shadow"}
"""Tuners that do something else than adapt linear layers, so that `all-linear` is no stand-in for the layers they need."""
TYPES = {n: getattr(typing, n) for n in ("Any", "Literal", "Optional", "Union")}


class PeftTuner(PeftAdapt):
    """A tuner of PEFT with PEFT's own settings."""

    config_class: ClassVar[str] = ""
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._peft", "ftpipe.train.adapt._peft_family")

    def config(self) -> PeftConfig:
        import peft

        try:
            return getattr(peft, self.config_class)(**{n: getattr(self, n) for n in type(self).model_fields}, task_type="CAUSAL_LM")
        except (ValueError, TypeError) as error:
            raise ConfigError(f"PEFT refuses these settings of {self.name()}: {error}") from error

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        """As PEFT does it; where it knows no target modules for an architecture and none are set, all linear layers."""
        try:
            return super().prepare(model, run)
        except ConfigError as error:
            if "target_modules" not in error.what or getattr(self, "target_modules", "") is not None or self.name() in OWN_TARGETS:
                raise
            return self.model_copy(update={"target_modules": "all-linear"}).prepare(model, run)


@lru_cache
def _tuners() -> dict[str, tuple[Path, str]]:
    """Tuner name -> (its config.py, the config class), for those that change modules of the model and need nothing but the model."""
    spec = find_spec("peft")
    if spec is None or not spec.submodule_search_locations:
        return {}
    found = {}
    for path in sorted(Path(spec.submodule_search_locations[0]).glob("tuners/*/config.py")):
        name = path.parent.name
        if name in NOT_ALONE:
            continue
        classes = [c for c in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(c, ast.ClassDef)]
        configs = [c for c in classes if {ast.unparse(b) for b in c.bases} & {"PeftConfig", "LycorisConfig"}]
        if configs:
            found[name] = (path, configs[-1].name)
    return found


def methods() -> dict[str, Callable[[], type[Method]]]:
    """Every tuner by PEFT's name for it."""
    return {name: partial(_method, name) for name in _tuners()}


@lru_cache
def _method(name: str) -> type[Method]:
    path, config_class = _tuners()[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    node = next(c for c in tree.body if isinstance(c, ast.ClassDef) and c.name == config_class)
    fields = {f.target.id: made for f in node.body if isinstance(f, ast.AnnAssign) and (made := _field(f)) and f.target.id not in SET_BY_US}
    doc = (ast.get_docstring(node) or f"PEFT's {config_class}.").split("\n\n")[0]
    made = create_model(config_class.removesuffix("Config"), __base__=PeftTuner, __module__=__name__, __doc__=doc, **fields)
    made.config_class, made.method_name = config_class, name
    return made


def _field(node: ast.AnnAssign) -> tuple[Any, Any] | None:
    """Type and pydantic field of one dataclass field, None for one whose type or default is not plain data."""
    try:
        annotation = eval(compile(ast.Expression(node.annotation), "peft", "eval"), {"__builtins__": {}},
                          TYPES | {t.__name__: t for t in (int, float, bool, str, list, dict, tuple)})
    except (NameError, TypeError, SyntaxError):
        return None
    default, text = node.value, ""
    if isinstance(node.value, ast.Call):
        given = {k.arg: k.value for k in node.value.keywords}
        if "init" in given or "default" not in given:
            return None
        default = given["default"]
        try:
            text = ast.literal_eval(given["metadata"])["help"] if "metadata" in given else ""
            text = " ".join((text if isinstance(text, str) else "".join(text)).split())
        except (ValueError, KeyError, TypeError, SyntaxError):
            text = ""
    try:
        value = ast.literal_eval(default) if default is not None else None
        return (annotation if value is not None else annotation | None), Field(default=value, description=text or "See PEFT's documentation.")
    except (ValueError, TypeError, SyntaxError):
        return None
