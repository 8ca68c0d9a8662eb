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


class BaseWeights(Mapping[str, Any]):
    """The base model's weights by parameter name, float32 on the CPU, each read from its safetensors file when it is asked for; none is kept.

    An architecture whose parameters are named otherwise than the tensors of its files is loaded whole, with a note in the log.
    """

    def __init__(self, model: str, env: Environment):
        from safetensors import safe_open

        from ftpipe.models.loading import folder
        from ftpipe.models.locate import weight_files

        self.model, self.env = model, env
        self.files: dict[str, Path] = {}
        for path in weight_files(folder(model, env)):
            with safe_open(path, framework="pt") as f:
                self.files |= dict.fromkeys(f.keys(), path)

    @cached_property
    def _loaded(self) -> dict[str, torch.Tensor]:
        from ftpipe.models.loading import load_model

        log.info("the parameters of %s are named otherwise than the tensors in its files: it is loaded whole", self.model)
        return dict(load_model(self.model, self.env, dtype="float32", device="cpu").state_dict())

    def __getitem__(self, name: str) -> torch.Tensor:
        return tensor(self.files[name], name).float() if name in self.files else self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def base_weights(model: str, env: Environment) -> Callable[[], Mapping[str, torch.Tensor]]:
    """A function that gives the base model's weights; its files are looked at when it is first called."""
    return lru_cache(lambda: BaseWeights(model, env))
