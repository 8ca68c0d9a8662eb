"""Tensors of safetensors files, one at a time: what works on models larger than memory reads them so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    import torch

log = logging.getLogger("ftpipe")


def tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors file, in memory of its own: no other part of the file is read or mapped."""
    from safetensors import safe_open

    with safe_open(file, framework="pt", backend="pread") as f:
        return f.get_tensor(name)


class Tensors(Mapping[str, Any]):
    """Tensors by name, each read from its safetensors file when it is asked for; none is kept.

    Args:
        files: the file that holds each tensor.
    """

    def __init__(self, files: Mapping[str, Path]):
        self.files = dict(files)

    def __getitem__(self, name: str) -> torch.Tensor:
        return tensor(self.files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files


class BaseWeights(Tensors):
    """The base model's weights by parameter name, float32 on the CPU, each read from its safetensors file when it is asked for; none is kept.

    An architecture whose parameters are named otherwise than the tensors of its files is loaded whole, with a note in the log.
    """

    def __init__(self, model: str, env: Environment):
        from safetensors import safe_open

        from ftpipe.models.loading import folder
        from ftpipe.models.locate import weight_files

        self.model, self.env = model, env
        files: dict[str, Path] = {}
        for path in weight_files(folder(model, env)):
            with safe_open(path, framework="pt") as f:
                files |= dict.fromkeys(f.keys(), path)
        super().__init__(files)

    @cached_property
    def _loaded(self) -> dict[str, torch.Tensor]:
        from ftpipe.models.loading import load_model

        log.info("not all that is changed is named as the tensors in the files of %s are: it is loaded whole", self.model)
        return dict(load_model(self.model, self.env, dtype="float32", device="cpu").state_dict())

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).float() if name in self.files else self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self.files or name in self._loaded


def base_weights(model: str, env: Environment, facts: Mapping[str, Any] | None = None) -> Callable[[], Mapping[str, torch.Tensor]]:
    """A function that gives the base model's weights, float32 on the CPU; its files are looked at when it is first called.

    facts: those of the adapter. If it was trained on a quantised base, the weights are those that base stands for, which takes the model whole.
    """
    if facts and facts.get("quantize"):
        return lru_cache(lambda: _stood_for(model, env, facts))
    return lru_cache(lambda: BaseWeights(model, env))


def _stood_for(model: str, env: Environment, facts: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    from ftpipe.models.loading import quantized_base

    log.info("the adapter was trained on %s quantised by %s: the weights that stands for are loaded whole", model, next(iter(facts["quantize"])))
    return dict(quantized_base(model, env, facts).state_dict())
