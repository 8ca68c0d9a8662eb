"""LiNeS (Wang et al. 2024): a change grows with depth, from alpha in the first block to alpha + beta in the last."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.merge.base import Merger
from ftpipe.merge.task_arithmetic import TaskArithmetic
from ftpipe.slots import choose

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given

BLOCK = re.compile(r"^(?P<list>(?:[^.\d]+\.)*?(?:layers|layer|blocks|block|h))\.(?P<number>\d+)\.")
"""A parameter of a numbered block. Only the outermost list counts, so that numbered experts inside a block are no depth."""


class Lines(Merger):
    """Multiplies the change in block l of L (from 0) by `alpha + beta l / (L - 1)`; everything outside the blocks by alpha.

    With one adapter it keeps the shallow layers near the base, which forgets less: choose alpha (the paper searches 0, 0.1, ..., 1) and leave beta out,
    so that the last block keeps its whole change. With several it scales what `method` makes of them; alpha is then
    `1/T ||sum_t D_t||_1 / ||D_merged||_1`, which is 1/T for their plain sum, and beta is searched like the scale of the method. Embeddings, final norm
    and output layer count as outside, as in the authors' code. A model of a single block gives it `alpha + beta`.
    """

    paper: ClassVar[str] = "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging"

    alpha: float | None = Field(default=None, ge=0, le=10, description="Factor of the first block and of all outside blocks; computed for several adapters.")
    beta: float | None = Field(default=None, ge=-10, le=10, description="Added to alpha over the depth; 1 - alpha if not given.")
    method: choose("merge") = Field(default=TaskArithmetic(scale=1.0), description="How several adapters are combined first.")

    def low_rank(self) -> bool:
        return self.method.low_rank()

    def check(self, given: Given) -> None:
        super().check(given)
        inner = self.method
        if inner.rank or inner.whole:
            raise ConfigError(f"`rank` and `whole` stand in the settings of {inner.name()}, inside lines", remedy="move them to the settings of lines")
        if self.low_rank():
            inner.check(given)
        else:
            inner.model_copy(update={"whole": True}).check(given)
        if len(given.adapters) == 1 and self.alpha is None:
            raise ConfigError("lines over one adapter needs `alpha`", remedy="give one between 0 and 1; the paper searches 0, 0.1, ..., 1 on held-out data")
        depth(given.base())

    def prepare(self, given: Given) -> Any:
        state = self.method.prepare(given)
        alpha = self.alpha
        if alpha is None:
            summed = merged = 0.0
            for name in given.names:
                parts = given.parts(name)
                summed += float(sum(p.dense().double() for p in parts.values()).abs().sum())
                merged += float(self.method.combine(name, parts, given, state).dense().double().abs().sum())
            if not merged:
                raise ConfigError(f"{self.method.name()} leaves nothing of the adapters, so there is nothing to scale", remedy="give `alpha`")
            alpha = summed / merged / len(given.adapters)
        beta = 1 - alpha if self.beta is None else self.beta
        given.said |= {"alpha": alpha, "beta": beta, "blocks": depth(given.base())[1]}
        return state, alpha, beta, depth(given.base())

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        inner, alpha, beta, (blocks, count) = state
        found = BLOCK.match(name)
        share = 0.0
        if found and found["list"] == blocks:
            share = int(found["number"]) / (count - 1) if count > 1 else 1.0
        return self.method.combine(name, parts, given, inner).times(alpha + beta * share)


def depth(names: Iterable[str]) -> tuple[str, int]:
    """The name of the model's list of blocks, and how many there are. Raises ConfigError for none, or for two (encoder and decoder have no one depth)."""
    lists: dict[str, int] = {}
    for name in names:
        if found := BLOCK.match(name):
            lists[found["list"]] = max(lists.get(found["list"], 0), int(found["number"]) + 1)
    if len(lists) != 1:
        raise ConfigError(f"the model has {len(lists)} lists of numbered blocks ({', '.join(sorted(lists)) or 'none'}), so its layers have no one depth",
                          remedy="use another merging method")
    return next(iter(lists.items()))
