"""Every combination of given values."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator

from ftpipe.tune.base import Trial, Tuner


class Grid(Tuner):
    """The Cartesian product of the values of each setting, in the order written, the last setting moving fastest; or a random part of it.

    `{"stages.adapter.learning_rate": [1.0e-4, 3.0e-4], "stages.adapter.adapt.lora.r": [8, 16]}` is four trials.
    """

    values: dict[str, list[Any]] = Field(min_length=1, description="Values to try for each setting, by its dotted path in the pipeline file.")
    limit: int = Field(default=0, ge=0, description="Try only so many combinations, drawn without repetition; 0 tries all.")
    seed: int = Field(default=0, ge=0, description="Seed of the draw.")

    @field_validator("values")
    @classmethod
    def _some(cls, value: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for path, options in value.items():
            if not options:
                raise ValueError(f"there is no value to try for {path}")
            if any(options.index(o) != i for i, o in enumerate(options)):
                raise ValueError(f"a value of {path} is written twice")
        return value

    def propose(self, done: Sequence[Trial]) -> list[dict[str, Any]]:
        every = [dict(zip(self.values, combination)) for combination in itertools.product(*self.values.values())]
        if self.limit and self.limit < len(every):
            chosen = sorted(random.Random(self.seed).sample(range(len(every)), self.limit))
            every = [every[i] for i in chosen]
        tried = [t.settings for t in done]
        return [s for s in every if s not in tried]
