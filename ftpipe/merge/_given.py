"""What a merging or compressing method is given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.artifacts import Artifact
from ftpipe.errors import ConfigError, nearest
from ftpipe.stages.base import Environment, StageContext

if TYPE_CHECKING:
    import torch

    from ftpipe.merge._deltas import Delta, Deltas
    from ftpipe.merge._weights import Changed


def _no_base() -> Mapping[str, Any]:
    raise ConfigError("the base model's weights are needed", remedy="name the base model")


@dataclass
class Given:
    """The adapters and the surroundings.

    Attributes:
        adapters: each adapter's changes by its stage's name; a change is read when it is asked for, so ask for one at a time and keep none.
        model: the base model as the configuration names it. base: gives its weights by name, float32, also one at a time.
        facts: those of the first adapter, see `ftpipe_adapter.json`. dtype: type the merged model is run and kept in.
        contents: a hash of each adapter, by which random numbers and results are told apart, whatever the adapter is called.
        inputs: the stage's input artifacts, where a method has `Ref` fields of its own. work: folder that outlives a kill.
        said: JSON for the artifact, which methods add to.
    """

    adapters: Mapping[str, Deltas] = field(default_factory=dict)
    model: str = ""
    env: Environment | None = None
    base: Callable[[], Mapping[str, torch.Tensor]] = _no_base
    facts: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    contents: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, Artifact] = field(default_factory=dict)
    work: Path | None = None
    seed: int = 0
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("ftpipe"))
    progress: Callable[[float, float | None, str], None] = lambda done, total, unit: None
    said: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, ctx: StageContext, model: str, seed: int | None, facts: Mapping[str, Any], **rest: Any) -> Given:
        """What a stage hands to its method. facts: those of the adapters, which are for one base."""
        from ftpipe.models.weights import base_weights

        return cls(model=model, env=ctx.env, base=base_weights(model, ctx.env, facts), facts=facts, dtype=facts.get("dtype", "float32"), inputs=ctx.inputs,
                   work=ctx.work, seed=seed or 0, log=ctx.log, progress=lambda done, total, unit: ctx.progress(done, total, unit), **rest)

    def changed(self) -> Changed:
        """The base model that the adapters are for, whole in memory, to add changes to."""
        from ftpipe.merge._weights import Changed

        return Changed(self.model, self.env, self.dtype, self.facts)

    @cached_property
    def names(self) -> list[str]:
        """Every weight that any adapter changes, in the order they are merged in."""
        return sorted({name for deltas in self.adapters.values() for name in deltas})

    def parts(self, name: str) -> dict[str, Delta]:
        """One weight's changes by adapter, those that have one."""
        return {adapter: deltas[name] for adapter, deltas in self.adapters.items() if name in deltas}

    def generator(self, adapter: str, purpose: str) -> torch.Generator:
        """Random numbers that depend on the seed, on what the adapter is and on the purpose, not on names or order."""
        import torch

        from ftpipe.train.run import derive_seed

        return torch.Generator().manual_seed(derive_seed(self.seed, self.contents.get(adapter, adapter), purpose))

    def known(self, names: Mapping[str, Any]) -> None:
        """Raises ConfigError if one of `names` is not merged here."""
        for name in names:
            if name not in self.adapters:
                raise ConfigError(f"there is a weight for {name!r}, which is not merged", remedy=nearest(name, self.adapters))
