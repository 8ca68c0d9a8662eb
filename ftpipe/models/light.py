"""Large libraries without what they load by the way and nothing here uses: some seconds less for every process that loads a model.

A rank's libraries and a tiny model took 8.0 CPU-seconds without it and take 5.4 with it (medians of four, taken in turn; torch 2.13, transformers 5.23,
PEFT 0.21, bitsandbytes 0.50, DeepSpeed 0.19). What is left is torch, its _dynamo (which transformers' masks import) and transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def load(name: str) -> ModuleType:
    """The module `name`, imported under `spared` if it is not there yet."""
    if name in sys.modules:
        return sys.modules[name]
    # Hidden for DeepSpeed alone, which only ranks load: in a process that tracks its runs, another thread may be importing it.
    with spared("mlflow") if name.startswith("deepspeed") else spared():
        return importlib.import_module(name)


@contextmanager
def spared(*hidden: str) -> Iterator[None]:
    """While it lasts, importing does not load

    * torch's compiler because a function is marked to be compiled (bitsandbytes, DeepSpeed's Muon) or not to be (transformers): both stay as they are written,
      which is what they compute;
    * scipy.optimize for transformers' losses of object detection: a call of its `linear_sum_assignment` loads it;
    * modules that are `hidden` (MLflow, for DeepSpeed's autotuner).
    """
    import torch

    compiles, disables = torch.compile, torch.compiler.disable
    torch.compile = torch.compiler.disable = _as_written
    stands_in = dict.fromkeys(hidden) | {"scipy.optimize": _scipy_optimize()}
    put = [name for name in stands_in if name not in sys.modules]
    for name in put:
        sys.modules[name] = stands_in[name]  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile, torch.compiler.disable = compiles, disables
        for name in put:
            sys.modules.pop(name, None)


def _as_written(function: Any = None, *args: Any, **options: Any) -> Any:
    """torch.compile and torch.compiler.disable, as a decorator with or without options."""
    return function if function is not None else lambda function: function


def _scipy_optimize() -> ModuleType:
    module = ModuleType("scipy.optimize")

    def linear_sum_assignment(*args: Any, **options: Any) -> Any:
        from scipy.optimize import linear_sum_assignment

        return linear_sum_assignment(*args, **options)

    module.linear_sum_assignment = linear_sum_assignment  # type: ignore[attr-defined]
    return module
